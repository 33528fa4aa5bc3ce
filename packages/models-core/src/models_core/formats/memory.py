"""Host memory that a CPU device can use without a copy."""

from __future__ import annotations

import math
import mmap

import numpy as np

# XLA's CPU client aliases host memory only if its address is a multiple of this, in bytes.
ALIGNMENT = 64

# Arrays of at least this many bytes get pages of their own, which return to the system as soon as the array is freed.
_OWN_PAGES = 1 << 20


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device can alias."""
  nbytes = math.prod(shape) * dtype.itemsize
  if nbytes < _OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
  else:
    # The kernel provides each page when a reading thread first writes to it. This costs more than the read itself, so
    # the threads should share it.
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory, start = np.frombuffer(pages, np.uint8), 0
  return memory[start : start + nbytes].view(dtype).reshape(shape)
