"""Host memory that a CPU device can use without a copy, in huge pages where the system has them.

Fresh memory costs a page fault for each page. Pages of 4 kB take longer than the reads that fill them; those of 2 MB do
not. The kernel provides a page when a thread first writes to it, so the threads that read share that work, too.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np

# XLA's CPU client aliases host memory only if its address is a multiple of this, in bytes.
ALIGNMENT = 64

# Bytes of a huge page of x86-64, and of arm64 with pages of 4 kB.
_HUGE_PAGE = 2 << 20
# Arrays below this share the allocator's pages: they are too few bytes of a checkpoint to matter.
_SMALL = 64 << 10
# A mapping that arrays share has this many bytes of addresses. It gets a page only where an array lies.
_CHUNK = 256 << 20
# An array has a mapping of its own if its last page wastes at most this fraction of it.
_MOST_WASTE = 1 / 64


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device can alias.

  The memory returns to the system when the last view of it is dropped, each array's by itself.
  """
  nbytes = math.prod(shape) * dtype.itemsize
  if nbytes < _SMALL or not hasattr(mmap, "MAP_ANONYMOUS"):
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    memory = memory[start : start + nbytes]
  elif -nbytes % _HUGE_PAGE <= nbytes * _MOST_WASTE:
    memory = _Chunk(nbytes).memory[:nbytes]
  else:
    memory = _shared.take(nbytes)
  return memory.view(dtype).reshape(shape)


class _Chunk:
  """Fresh memory, from the beginning of a huge page on.

  Attributes:
    pages: the mapping, which ends when no array refers to it.
    start: where in the mapping the first huge page begins.
    memory: the bytes from there on.
  """

  def __init__(self, nbytes: int):
    self.pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
      # A kernel without huge pages refuses: the memory has small ones.
      with contextlib.suppress(OSError):
        self.pages.madvise(mmap.MADV_HUGEPAGE)
    self.start = -np.frombuffer(self.pages, np.uint8, 1).ctypes.data % _HUGE_PAGE
    self.memory = np.frombuffer(self.pages, np.uint8, nbytes, self.start)


class _SharedChunks:
  """Memory of arrays that are no multiples of a huge page: they lie side by side, so that only the last page is not full.

  Each array gives its pages back when it is dropped. Of a huge page that a neighbour still uses, the kernel takes the
  free part when memory is short.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._chunk: _Chunk | None = None
    self._used = 0

  def take(self, nbytes: int) -> np.ndarray:
    with self._lock:
      if self._chunk is None or self._used + nbytes > _CHUNK:
        self._chunk, self._used = _Chunk(_CHUNK), 0
      chunk, first = self._chunk, self._chunk.start + self._used
      self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
    # The base of all views of the array, as the mapping is no array: when it is dropped, no view of it is left.
    memory = np.frombuffer(chunk.pages, np.uint8, nbytes, first)
    weakref.finalize(memory, _give_back, chunk.pages, first, first + nbytes).atexit = False
    return memory


def _give_back(pages: mmap.mmap, first: int, last: int) -> None:
  """Returns the whole pages within a range of a mapping to the system."""
  first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
  last = last // mmap.PAGESIZE * mmap.PAGESIZE
  if first < last:
    pages.madvise(mmap.MADV_DONTNEED, first, last - first)


_shared = _SharedChunks()
