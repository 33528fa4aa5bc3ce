"""A checksum that runs at the speed of memory, against accidents: flipped bits, pages of zeros, pages that changed places.

Memory is taken as rows of 4 kB. The sums of each row and, over up to a megabyte, of each column, in integers of 64 bits
that wrap around, are hashed in order. Any change of a single word changes a row and a column; a change that none shows
must change at least four words, by amounts that cancel in two rows and in two columns. It protects from nobody who
changes files on purpose.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Bytes of a row: a page, which disks and kernels lose or misplace as a whole.
_ROW = 4096
# Rows that are summed at a time: a megabyte, which stays in a core's cache between its two sums.
_ROWS = 256


def checksum(memory: np.ndarray) -> bytes:
  """The checksum of contiguous bytes, uint8 [n]: 16 bytes."""
  whole = memory.size // _ROW * _ROW
  found = hashlib.blake2b(memory[whole:].tobytes(), digest_size=16)
  words = memory[:whole].view(np.uint64).reshape(-1, _ROW // 8)
  for start in range(0, len(words), _ROWS):
    part = words[start : start + _ROWS]
    found.update(np.add.reduce(part, axis=0).tobytes())
    found.update(np.add.reduce(part, axis=1).tobytes())
  return found.digest()
