"""Host memory that a CPU device can alias."""

from __future__ import annotations

import math
import mmap

import numpy as np

# XLA's CPU client aliases host memory that starts at such a multiple, in bytes.
ALIGNMENT = 64

# From this many bytes on, memory is pages of its own, which go back to the system one by one.
_OWN_PAGES = 1 << 20


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device can alias."""
  nbytes = math.prod(shape) * dtype.itemsize
  if nbytes < _OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
  else:
    # The system gives the pages, which costs more than reading into them, to the threads that read.
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory, start = np.frombuffer(pages, np.uint8), 0
  return memory[start : start + nbytes].view(dtype).reshape(shape)
