"""Arrays that a library quantised, such as qwix: numbers (qvalue - zero_point) * scale.

They are known by their attributes, so that no such library is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# The 16 numbers of 4-bit NormalFloat (arXiv:2305.14314), in the order of their codes.
# fmt: off
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Quantised:
  """A quantised array.

  Attributes:
    qvalue: quantised numbers, in the shape of the array.
    scale: with as many axes; each of its numbers belongs to a tile of the quantised ones.
    zero_point: likewise; None is 0.
    is_nf4: whether the quantised numbers are codes of 4-bit NormalFloats.
  """

  qvalue: jax.Array
  scale: jax.Array
  zero_point: jax.Array | None = None
  is_nf4: bool = False

  @classmethod
  def of(cls, value: Any) -> Quantised | None:
    """The parts of a quantised array; None if the value is none. qwix keeps the array as `value.array`."""
    value = getattr(value, "array", value)
    if not hasattr(value, "qvalue") or not hasattr(value, "scale"):
      return None
    return cls(value.qvalue, value.scale, value.zero_point, value.qtype == "nf4")

  def numbers(self, dtype: DTypeLike) -> jax.Array:
    """All numbers, computed in float32 and rounded once."""
    qvalue = self.qvalue
    wide = (
      jnp.array(NF4, jnp.float32)[qvalue.astype(jnp.int32)] if self.is_nf4 else qvalue.astype(jnp.float32)
    )
    if self.zero_point is not None:
      wide = _by_tiles(jnp.subtract, wide, self.zero_point.astype(jnp.float32))
    return _by_tiles(jnp.multiply, wide, self.scale.astype(jnp.float32)).astype(dtype)

  def rows(self, index: jax.Array) -> Quantised:
    """The rows at an index int [M]; NaN for an index outside of the array."""
    size = self.qvalue.shape[0]
    take = lambda x: x.at[index // (size // x.shape[0])].get(mode="clip")
    outside = ((index < 0) | (index >= size)).reshape(-1, *(1,) * (self.scale.ndim - 1))
    scale = jnp.where(outside, jnp.nan, take(self.scale))
    zero_point = None if self.zero_point is None else take(self.zero_point)
    return Quantised(take(self.qvalue), scale, zero_point, self.is_nf4)


def _by_tiles(operation: Callable[..., jax.Array], numbers: jax.Array, tiled: jax.Array) -> jax.Array:
  """Combines an array with one that has a number for each of its tiles."""
  tiles = [(count, size // count) for size, count in zip(numbers.shape, tiled.shape, strict=True)]
  in_tiles = numbers.reshape([size for tile in tiles for size in tile])
  spread = tiled.reshape([size for count, _ in tiles for size in (count, 1)])
  return operation(in_tiles, spread).reshape(numbers.shape)
