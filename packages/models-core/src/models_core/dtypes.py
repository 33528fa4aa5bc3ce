"""Dtypes: what a `dtype=` argument means, and which dtype combines arrays of two different dtypes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike


def as_dtype(dtype: Any) -> np.dtype | None:
  """The floating-point dtype that a `dtype=` argument names; None stays None.

  Args:
    dtype: anything that `jnp.dtype` accepts, such as `jnp.bfloat16` or "float32".

  Raises:
    TypeError: if it is not a floating-point type, or has 64 bits while `jax_enable_x64` is off.
  """
  if dtype is None:
    return None
  try:
    kind = jnp.dtype(dtype)
  except TypeError:
    raise TypeError(
      f"dtype={dtype!r} is not a data type: use a floating-point type such as jnp.bfloat16 or 'float32'"
    ) from None
  if not jnp.issubdtype(kind, jnp.floating):
    raise TypeError(
      f"dtype is {kind}, expected a floating-point type such as 'bfloat16': integers keep their dtype"
    )
  if jax.dtypes.canonicalize_dtype(kind) != kind:
    raise TypeError(
      f"dtype is {kind}, which JAX supports only with jax_enable_x64: enable it, or use 'float32'"
    )
  return kind


def common_dtype(a: DTypeLike, b: DTypeLike) -> np.dtype:
  """The dtype in which arrays of two dtypes are combined.

  This is the float of a float and an integer, otherwise the wider of the two; float32 if they differ but have the same
  width, as float16 and bfloat16 do.
  """
  a, b = np.dtype(a), np.dtype(b)
  if a == b:
    return a
  if (a.kind in "iub") != (b.kind in "iub"):
    return b if a.kind in "iub" else a
  if a.itemsize == b.itemsize:
    return np.dtype(np.float32)
  return a if a.itemsize > b.itemsize else b


def float_dtypes(*dtypes: Any) -> set[np.dtype]:
  """The different ones of some dtypes, None aside; those of floating-point numbers, if there are any."""
  kinds = {np.dtype(dtype) for dtype in dtypes if dtype is not None}
  return {kind for kind in kinds if kind.kind not in "iub"} or kinds
