"""Element types: which one products of mixed weights and activations use."""

import numpy as np
from numpy.typing import DTypeLike


def common_dtype(a: DTypeLike, b: DTypeLike) -> np.dtype:
  """The float type that holds both: the wider, or float32 where neither does (float16 and bfloat16)."""
  a, b = np.dtype(a), np.dtype(b)
  if a == b:
    return a
  if (a.kind in "iub") != (b.kind in "iub"):
    return b if a.kind in "iub" else a
  if a.itemsize == b.itemsize:
    return np.dtype(np.float32)
  return a if a.itemsize > b.itemsize else b
