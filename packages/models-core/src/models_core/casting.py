"""Numbers from one type into another: what does not fit is an error, never an infinity."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import ml_dtypes
import numpy as np

# Bytes of what is checked and then cast: it and its source stay in a core's own cache.
_BLOCK = 512 << 10

_BF16, _F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
_UNSIGNED = {np.dtype(kind).itemsize: np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32, np.uint64)}


def cast_into(target: np.ndarray, source: np.ndarray) -> None:
  """Copies numbers into memory of any type, rounded to nearest even.

  Infinities and NaNs stay what they are; an infinity becomes NaN in a type that has none.

  Args:
    target: of any strides.
    source: of the same shape.

  Raises:
    OverflowError: if a finite number does not fit, such as 1e5 into float16. The target is partly filled then.
  """
  if source.dtype == target.dtype and (plain := _UNSIGNED.get(target.dtype.itemsize)) is not None:
    # numpy copies types that are not its own, such as bfloat16, element by element through a function.
    np.copyto(target.view(plain), source.view(plain))
  elif source.dtype == _BF16 and target.dtype == _F32 and target.flags.c_contiguous:
    # A bfloat16 is the upper half of a float32: integer moves are several times faster than the cast.
    bits = target.view(np.uint32)
    np.copyto(bits, source.view(np.uint16))
    np.left_shift(bits, np.uint32(16), out=bits)
  elif not np.can_cast(source.dtype, target.dtype, "unsafe"):
    # ml_dtypes has no cast between float8_e8m0fnu and other types of 8 bits; float32 holds both.
    cast_into(target, source.astype(np.float32))
  elif holds(target.dtype, source.dtype):
    np.copyto(target, source, casting="unsafe")
  else:
    with np.errstate(over="ignore", invalid="ignore"):
      for part, numbers in _blocks(target, source):
        fits = _surely_fits(numbers, target.dtype)
        np.copyto(part, numbers, casting="unsafe")
        if not fits:
          _refuse_lost(part, numbers)


@functools.cache
def holds(target: np.dtype, source: np.dtype) -> bool:
  """Whether a type's range includes that of another."""
  (low, high), (least, most) = _range(source), _range(target)
  return least <= low and high <= most


def _range(dtype: np.dtype) -> tuple[float, float]:
  """The least and the largest finite number of a type."""
  if dtype == np.bool_:
    return 0, 1
  info = ml_dtypes.iinfo(dtype) if _is_integer(dtype) else ml_dtypes.finfo(dtype)
  return float(info.min), float(info.max)


@functools.cache
def _is_integer(dtype: np.dtype) -> bool:
  try:
    ml_dtypes.iinfo(dtype)
  except ValueError:
    return False
  return True


def _blocks(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """The same parts of both, of no more bytes than a block."""
  if target.nbytes <= _BLOCK:
    if target.size:
      yield target, source
    return
  if rows := _BLOCK // (target.nbytes // len(target)):
    for start in range(0, len(target), rows):
      yield target[start : start + rows], source[start : start + rows]
    return
  for row, numbers in zip(target, source, strict=True):
    yield from _blocks(row, numbers)


def _surely_fits(numbers: np.ndarray, target: np.dtype) -> bool:
  """Whether all numbers lie within a type's range; False where a closer look is needed."""
  limits = _limits(numbers.dtype, target)
  # The source is read first: it is in the cache when it is cast, while reading the target again costs a pass.
  return bool(limits) and all(np.maximum.reduce(numbers.view(kind), None) <= most for kind, most in limits)


@functools.cache
def _limits(source: np.dtype, target: np.dtype) -> tuple[tuple[np.dtype, int], ...]:
  """How the largest number of either sign that fits reads as a signed and an unsigned integer.

  A float's sign and magnitude are one pattern: of positive ones the largest number is the largest signed integer, of
  negative ones the largest unsigned one. Infinities lie beyond. Empty where that does not hold.
  """
  low, high = _range(target)
  if _is_integer(source) or _range(source)[0] >= 0 or low != -high:
    return ()
  most = np.array([high, low]).astype(source)
  # Where the source has no such number, the next one towards zero.
  rounded_up = int(float(most[0]) > high)
  kinds = (np.dtype(f"i{source.itemsize}"), np.dtype(f"u{source.itemsize}"))
  return tuple((kind, int(most.view(kind)[at]) - rounded_up) for at, kind in enumerate(kinds))


def _refuse_lost(target: np.ndarray, source: np.ndarray) -> None:
  """Refuses a finite number that is another one or none in the target."""
  lost = target != source if _is_integer(target.dtype) else np.isfinite(source) & ~np.isfinite(target)
  if np.any(lost):
    # Python's own digits: numpy's depend on its version.
    raise OverflowError(f"{source[lost].flat[0].item()} does not fit into {target.dtype}")
