"""Codes of a few bits: how words hold them, what numbers they stand for, and the programs that turn them into floats.

The numbers are (code - zero) * scale + bias, computed in float32 and rounded once. The programs are XLA's for a CPU:
there a pass over memory does it all, where NumPy needs four.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

_F32, _BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
# Elements of a program's largest input. Lines of smaller ones are padded to a power of two: each shape is compiled.
_LARGEST = 1 << 20
# Words, scale, zero, bias and table; those that a format lacks are None.
_Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Codes:
  """How numbers are stored in a few bits each.

  Attributes:
    bits: of a code.
    stand_for: what the codes are: unsigned or signed integers, floats of 8 bits (E4M3) or of 4 (E2M1), or the places in
      a table of 16 floats.
    order: which code of a word, or of a byte, comes first: that in the lowest bits ("low"), that in the highest bits
      of each byte ("high"), or AWQ's order of eight columns. "whole" is "low", without codes that cross words.
    axis: of the words along which codes are packed, counted from the last.
  """

  bits: int
  stand_for: Literal["unsigned", "signed", "e4m3", "e2m1", "table"] = "unsigned"
  order: Literal["low", "high", "awq", "whole"] = "low"
  axis: int = -1

  @property
  def crosses(self) -> bool:
    """Whether codes cross words, or leave bits of a word unused: they are unpacked before the program runs."""
    return 32 % self.bits != 0

  @property
  def per_word(self) -> tuple[int, int]:
    """The fewest codes that fill whole words, and the number of these words of 32 bits."""
    if self.order == "whole":
      return 32 // self.bits, 1
    return (32 // self.bits, 1) if 32 % self.bits == 0 else (32, self.bits)


E4M3 = Codes(8, "e4m3")
E2M1 = Codes(4, "e2m1")
INT8 = Codes(8, "signed")
AWQ4 = Codes(4, order="awq")
TABLE4 = Codes(4, "table", order="high")


def words_of(count: int, codes: Codes) -> int:
  """The number of words of 32 bits that hold `count` codes."""
  each, words = codes.per_word
  return -(-count // each) if words == 1 else -(-count * codes.bits // 32)


def unpack(words: np.ndarray, codes: Codes) -> np.ndarray:
  """The codes in words of 32 bits, along the packed axis: uint32 [..., W] -> uint8 [..., 32 * W // bits]."""
  words = np.moveaxis(words, codes.axis, -1)
  mask = np.uint32((1 << codes.bits) - 1)
  if codes.crosses and codes.order == "low":
    found = _crossing(words, codes.bits)
  else:
    each = 32 // codes.bits
    place = np.arange(each, dtype=np.uint32)
    if codes.order == "awq":
      place = place // 2 + place % 2 * 4
    shifts = place * np.uint32(codes.bits)
    found = (words[..., None] >> shifts & mask).astype(np.uint8).reshape(*words.shape[:-1], -1)
  return np.moveaxis(found, -1, codes.axis)


def _crossing(words: np.ndarray, bits: int) -> np.ndarray:
  """Codes that cross words: 32 of them fill `bits` words."""
  count = words.shape[-1] * 32 // bits
  full = np.zeros((*words.shape[:-1], -(-words.shape[-1] // bits) * bits), np.uint32)
  full[..., : words.shape[-1]] = words
  full = full.reshape(*words.shape[:-1], -1, bits)
  found = np.empty((*full.shape[:-1], 32), np.uint8)
  for number in range(32):
    word, shift = divmod(number * bits, 32)
    code = full[..., word] >> np.uint32(shift)
    if shift + bits > 32:
      code = code | full[..., word + 1] << np.uint32(32 - shift)
    found[..., number] = code & np.uint32((1 << bits) - 1)
  return found.reshape(*words.shape[:-1], -1)[..., :count]


def decode(
  codes: Codes,
  dtype: np.dtype,
  words: np.ndarray,
  scale: np.ndarray,
  zero: np.ndarray | None = None,
  bias: np.ndarray | None = None,
  table: np.ndarray | None = None,
) -> np.ndarray:
  """The numbers that codes stand for: (code - zero) * scale + bias.

  Args:
    codes: how the words hold them.
    dtype: bfloat16; every other type gives float32.
    words: uint8 [N, line] for codes of 8 bits, otherwise uint32; of two axes, or of three.
    scale: float32, of a shape that broadcasts to that of the codes, such as [N, 1].
    zero: likewise; None is 0.
    bias: likewise; None is 0.
    table: float32 [16], if the codes are places in a table.

  Returns:
    An array of the shape of the codes, in bfloat16 or float32.
  """
  if codes.crosses and words.dtype != np.uint8:
    codes, words = Codes(8, codes.stand_for), np.ascontiguousarray(unpack(words, codes))
  run = functools.partial(_run, codes, _BF16 if dtype == _BF16 else _F32)
  arrays: _Arrays = (words, scale, zero, bias, table)
  count = words.shape[0]
  if words.ndim != 2 or count == 0:
    return run(arrays)
  line = words.nbytes // count * 8 // codes.bits
  most = max(1, _LARGEST // max(1, line))
  found = []
  for start in range(0, count, most):
    part = _lines(arrays, start, min(start + most, count))
    lines = part[0].shape[0]
    found.append(run(_padded(part, min(most, 1 << (lines - 1).bit_length())))[:lines])
  return found[0] if len(found) == 1 else np.concatenate(found)


def _has_lines(array: Any, count: int) -> bool:
  """Whether an array has an entry for each line; otherwise it has one for all of them."""
  return array is not None and array.ndim == 2 and array.shape[0] == count


def _lines(arrays: _Arrays, start: int, stop: int) -> _Arrays:
  """Some lines of all arrays."""
  count = arrays[0].shape[0]
  return tuple(array[start:stop] if _has_lines(array, count) else array for array in arrays)


def _padded(arrays: _Arrays, size: int) -> _Arrays:
  """Arrays of more lines, zeros in those that are added."""
  count = arrays[0].shape[0]
  if count == size:
    return arrays
  missing = [(0, size - count), (0, 0)]
  return tuple(np.pad(array, missing) if _has_lines(array, count) else array for array in arrays)


def _run(codes: Codes, dtype: np.dtype, arrays: _Arrays) -> np.ndarray:
  """Runs the program for arrays of these shapes."""
  kinds = tuple(None if array is None else (array.shape, array.dtype) for array in arrays)
  with _COMPILING:
    program, device = _program(codes, dtype, kinds)
  return np.asarray(program(*jax.device_put(arrays, device)))


@functools.cache
def _device() -> jax.Device:
  """A CPU; where the user's platforms leave it out, the first device."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]


# Held while a program is looked up: two threads would compile the same one.
_COMPILING = threading.Lock()


@functools.lru_cache(256)
def _program(codes: Codes, dtype: np.dtype, kinds: tuple) -> tuple[jax.stages.Compiled, jax.Device]:
  device = _device()
  sharding = SingleDeviceSharding(device)
  shapes = [None if kind is None else jax.ShapeDtypeStruct(*kind, sharding=sharding) for kind in kinds]
  # A mesh of the user's own would make the program one for all of its devices.
  with jax.set_mesh(Mesh(np.array([device]), ("one",))):
    return jax.jit(functools.partial(_numbers, codes, dtype)).lower(*shapes).compile(), device


def _numbers(
  codes: Codes,
  dtype: np.dtype,
  words: jax.Array,
  scale: jax.Array,
  zero: jax.Array | None,
  bias: jax.Array | None,
  table: jax.Array | None,
) -> jax.Array:
  packed = words if words.dtype == jnp.uint8 else _codes(codes, words)
  numbers = _values(codes, packed, table)
  if zero is not None:
    numbers = numbers - zero
  numbers = numbers * scale
  if bias is not None:
    numbers = numbers + bias
  return numbers.astype(dtype)


def _codes(codes: Codes, words: jax.Array) -> jax.Array:
  """The codes of words that hold a whole number of them."""
  each = 32 // codes.bits
  axis = words.ndim + codes.axis + 1
  place = jax.lax.broadcasted_iota(jnp.uint32, [1] * axis + [each] + [1] * (words.ndim - axis), axis)
  if codes.order == "awq":
    place = place // jnp.uint32(2) + place % jnp.uint32(2) * jnp.uint32(4)
  elif codes.order == "high":
    place = place ^ jnp.uint32(8 // codes.bits - 1)
  shape = list(words.shape)
  shape[codes.axis] *= each
  found = jnp.expand_dims(words, axis) >> place * jnp.uint32(codes.bits)
  return (found & jnp.uint32((1 << codes.bits) - 1)).reshape(shape)


def _values(codes: Codes, packed: jax.Array, table: jax.Array | None) -> jax.Array:
  match codes.stand_for:
    case "table":
      assert table is not None
      return table[packed]
    case "e4m3":
      magnitude = packed.astype(jnp.uint32) & jnp.uint32(0x7F)
      numbers = jnp.where(magnitude == 0x7F, jnp.float32(jnp.nan), _float(magnitude, 3, 7))
      return jnp.where(packed > 0x7F, -numbers, numbers)
    case "e2m1":
      return jnp.where(packed > 7, -1, 1).astype(jnp.float32) * _float(packed & jnp.uint32(7), 1, 1)
    case "signed":
      return jax.lax.bitcast_convert_type(packed, jnp.int8).astype(jnp.float32)
    case "unsigned":
      return packed.astype(jnp.int32).astype(jnp.float32)


def _float(magnitude: jax.Array, mantissa: int, bias: int) -> jax.Array:
  """Small floats without their sign, uint32 -> float32. Subnormal ones make no subnormal float32, which XLA flushes."""
  subnormal = magnitude < 1 << mantissa
  # As if their exponent was 1, which adds a hidden bit that is then taken away.
  bits = jnp.where(subnormal, magnitude + jnp.uint32(1 << mantissa), magnitude) << jnp.uint32(23 - mantissa)
  numbers = jax.lax.bitcast_convert_type(bits + jnp.uint32(127 - bias << 23), jnp.float32)
  return numbers - jnp.where(subnormal, jnp.float32(2.0 ** (1 - bias)), jnp.float32(0))
