"""Element types: what an argument means, and which one products of mixed weights and activations use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike


def as_dtype(dtype: Any) -> np.dtype | None:
  """What an argument `dtype=` says, which parameters shall have; None stays None.

  Raises:
    TypeError: if it is no floating-point type, or one of 64 bits while JAX has none.
  """
  if dtype is None:
    return None
  try:
    kind = jnp.dtype(dtype)
  except TypeError:
    raise TypeError(f"dtype={dtype!r} is no data type; use jnp.bfloat16, 'float32', ...") from None
  if not jnp.issubdtype(kind, jnp.floating):
    raise TypeError(f"dtype is {kind}, expected a floating-point type: that of floating-point parameters")
  if jax.dtypes.canonicalize_dtype(kind) != kind:
    raise TypeError(f"dtype is {kind}, which JAX has with jax_enable_x64 alone")
  return kind


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
