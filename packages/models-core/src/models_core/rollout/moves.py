"""Parts of parameters become tensors of a checkpoint, and back, on the devices that hold them.

Each program is compiled once for all layers and experts: which expert is an argument. Numbers are moved as unsigned
integers of the same width, because where an axis is cut at a sharded place, devices add what each of them has to zeros,
and that would turn a floating-point -0 into 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from models_core.dtypes import common_dtype
from models_core.layers import on_auto_axes
from models_core.sharding import AxisNames, axis_names, fit
from models_core.weights import Conversion, Piece, group_axes, part_shape


@dataclasses.dataclass(frozen=True)
class Move:
  """What a piece says about a parameter's axes, the same for all layers and experts, as the key of a program.

  Attributes:
    shape: of the tensor.
    split: the tensor's shape, with every axis that the layout splits as several axes.
    select: for each axis of the split tensor, the part of a fused axis, or None if the axis is kept.
    order: the kept axes in the parameter's order.
    part: shape of the part of the parameter.
    stacked: axes of the parameter along which tensors are stacked.
    conversion: of the tensor's numbers; None if checkpoint and model store the same numbers.
  """

  shape: tuple[int, ...]
  split: tuple[int, ...]
  select: tuple[int | None, ...]
  order: tuple[int, ...]
  part: tuple[int, ...]
  stacked: tuple[int, ...]
  conversion: Conversion | None

  @classmethod
  def of(cls, piece: Piece, shape: Sequence[int]) -> Move:
    """The move of a piece of a parameter with this shape."""
    return cls(
      piece.shape,
      piece.split,
      tuple(at if isinstance(at, int) else None for at in piece.select),
      piece.order,
      part_shape(piece, shape),
      tuple(axis for axis, at in enumerate(piece.target) if isinstance(at, int)),
      piece.conversion,
    )

  @property
  def is_fused(self) -> bool:
    """Whether the tensor has other parts, too."""
    return any(at is not None for at in self.select)

  @property
  def is_identity(self) -> bool:
    """Whether the tensor is the whole parameter, element by element."""
    in_order = self.order == tuple(sorted(self.order))
    return in_order and self.shape == self.part and not (self.stacked or self.is_fused or self.conversion)

  @property
  def index(self) -> tuple[int | slice, ...]:
    """The index of the part in the split tensor."""
    return tuple(slice(None) if at is None else at for at in self.select)

  @property
  def kept(self) -> tuple[int, ...]:
    """Sizes of the kept axes, in the tensor's order."""
    return tuple(size for size, at in zip(self.split, self.select, strict=True) if at is None)

  def spec(self, spec: PartitionSpec) -> PartitionSpec:
    """The spec of the tensor in which an axis is sharded as the parameter's axis that it comes from.

    Example: with the layout "d f -> f d", a parameter with ("tp", "fsdp") gives ("fsdp", "tp").
    """
    entries = [*spec, *(None,) * (len(self.part) + len(self.stacked) - len(spec))]
    of_part = [entry for axis, entry in enumerate(entries) if axis not in self.stacked]
    ours = [self.kept[axis] for axis in self.order]
    of_kept: dict[int, AxisNames] = {}
    for entry, axes in zip(of_part, group_axes(self.part, ours) or (), strict=True):
      largest = [axis for axis in axes if ours[axis] > 1] or axes
      of_kept |= {self.order[axis]: entry for axis in largest[:1]}
    kept = iter(range(len(self.kept)))
    of_split = [None if at is not None else of_kept.get(next(kept)) for at in self.select]
    found = ([of_split[axis] for axis in axes] for axes in group_axes(self.shape, self.split) or ())
    return PartitionSpec(*(next((entry for entry in group if entry is not None), None) for group in found))


def tensor_sharding(move: Move, sharding: Sharding) -> Sharding:
  """Sharding of a tensor whose parameter has the given one: that of the axes it comes from, where the sizes fit."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  spec, _ = fit(move.shape, move.spec(sharding.spec), sharding.mesh)
  return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def take(sources: Sequence[tuple[jax.Array, Piece]]) -> jax.Array:
  """The tensor that parts of parameters fill.

  Args:
    sources: each parameter that fills the tensor, with the piece that describes how.

  Returns:
    The parameter itself if the tensor is the same array; otherwise a new array, sharded as the axes of the parameter.
  """
  moves = tuple(Move.of(piece, array.shape) for array, piece in sources)
  arrays = tuple(array for array, _ in sources)
  if len(moves) == 1 and moves[0].is_identity:
    return arrays[0]
  dtype = functools.reduce(common_dtype, (array.dtype for array in arrays))
  at = tuple(_positions(piece) for _, piece in sources)
  program = _taker(moves, tuple(array.sharding for array in arrays), np.dtype(dtype))
  return program(arrays, at)


def _positions(piece: Piece) -> np.ndarray:
  """The position of the part along each stacked axis of the parameter."""
  return np.array([at for at in piece.target if isinstance(at, int)], np.int32)


@functools.lru_cache(1024)
def _taker(
  moves: tuple[Move, ...], shardings: tuple[Sharding, ...], dtype: np.dtype
) -> Callable[..., jax.Array]:
  out = tensor_sharding(moves[0], shardings[0])

  def join(*parts: jax.Array) -> jax.Array:
    kept = [
      part.reshape([move.kept[axis] for axis in move.order]).transpose(np.argsort(move.order))
      for part, move in zip(parts, moves, strict=True)
    ]
    if not moves[0].is_fused:
      return kept[0].reshape(moves[0].shape)
    tensor = jnp.zeros(moves[0].shape, parts[0].dtype)
    for part, move in zip(kept, moves, strict=True):
      tensor = tensor.reshape(move.split).at[move.index].set(part).reshape(move.shape)
    return tensor

  def run(arrays: Sequence[jax.Array], positions: Sequence[jax.Array]) -> jax.Array:
    parts = []
    for array, at, move, sharding in zip(arrays, positions, moves, shardings, strict=True):
      part = _numbers(_part(_bits(array), at, move.stacked, sharding), array.dtype)
      parts.append(_bits(_converted(part, move.conversion and move.conversion.save).astype(dtype)))
    return _numbers(on_auto_axes(join, out)(*parts), dtype)

  return jax.jit(run, out_shardings=out)


def _part(array: jax.Array, at: jax.Array, stacked: tuple[int, ...], sharding: Sharding) -> jax.Array:
  """The part of a parameter at a position along its stacked axes.

  If these axes are sharded, the devices that hold the part send it to the others. The compiler would gather the whole
  parameter on each of them.
  """
  if not stacked:
    return array
  if not isinstance(sharding, NamedSharding):
    return _slice(array, at, stacked)
  entries = _entries(sharding, array.ndim)
  names = [axis_names(entries[axis]) for axis in stacked]
  senders = tuple(name for group in names for name in group)

  def local(shard: jax.Array, at: jax.Array) -> jax.Array:
    within, here = _within(shard, at, stacked, names)
    part = _slice(shard, within, stacked)
    return lax.psum(jnp.where(here, part, jnp.zeros_like(part)), senders) if senders else part

  out = _part_sharding(sharding, array.ndim, stacked).spec
  specs = (PartitionSpec(*entries), PartitionSpec())
  return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=out)(array, at)


def _entries(sharding: NamedSharding, ndim: int) -> list[AxisNames]:
  """An entry of the sharding's spec for each axis."""
  return [*sharding.spec, *(None,) * (ndim - len(sharding.spec))]


def _part_sharding(sharding: Sharding, ndim: int, stacked: tuple[int, ...]) -> Any:
  """The sharding of a part of a parameter: that of the axes which are not stacked."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  kept = (entry for axis, entry in enumerate(_entries(sharding, ndim)) if axis not in stacked)
  return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _within(
  shard: jax.Array, at: jax.Array, stacked: tuple[int, ...], names: Sequence[tuple[str, ...]]
) -> tuple[jax.Array, jax.Array]:
  """A position along the stacked axes as one in a shard, and whether the shard has it; the nearest one if it has not.

  Args:
    shard: of a parameter, inside shard_map.
    at: the position in the parameter.
    stacked: axes of the parameter along which tensors are stacked.
    names: the mesh axes that shard each of them.
  """
  sizes = np.array([shard.shape[axis] for axis in stacked], np.int32)
  within = at - jnp.stack([lax.axis_index(group) if group else jnp.int32(0) for group in names]) * sizes
  return jnp.clip(within, 0, sizes - 1), jnp.all((within >= 0) & (within < sizes))


def _slice(array: jax.Array, at: jax.Array, stacked: tuple[int, ...]) -> jax.Array:
  starts, sizes = _box(array.shape, at, stacked)
  kept = [size for axis, size in enumerate(array.shape) if axis not in stacked]
  return lax.dynamic_slice(array, starts, sizes).reshape(kept)


def _box(shape: Sequence[int], at: jax.Array, stacked: tuple[int, ...]) -> tuple[list[Any], list[int]]:
  """Start and size along each axis of the part at a position along the stacked axes."""
  starts = [at[stacked.index(axis)] if axis in stacked else jnp.int32(0) for axis in range(len(shape))]
  return starts, [1 if axis in stacked else size for axis, size in enumerate(shape)]


def put(array: jax.Array | None, tensor: jax.Array, piece: Piece, like: jax.ShapeDtypeStruct) -> jax.Array:
  """A parameter into which a part is written; `finished` makes it one of numbers.

  Args:
    array: what this returned for the parameter's last part, whose memory is reused; None for the first one.
    tensor: in `tensor_sharding`.
    piece: that describes the tensor.
    like: shape, dtype and sharding of the parameter.

  Returns:
    An array that shares no memory with the tensor.
  """
  move = Move.of(piece, like.shape)
  if move.stacked and array is None:
    array = jnp.zeros(like.shape, _held(like), device=like.sharding)
  program = _putter(move, like.shape, np.dtype(like.dtype), like.sharding)
  return program(array, tensor, _positions(piece))


def _held(like: jax.ShapeDtypeStruct) -> np.dtype:
  """The dtype of a parameter while it is being filled.

  On CPUs these are unsigned integers: there the compiler would widen all of a bfloat16 array to write a part of it.
  """
  platform = next(iter(like.sharding.device_set)).platform
  return np.dtype(f"uint{_width(like.dtype)}" if platform == "cpu" else like.dtype)


def finished(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """A parameter into which all parts are written."""
  return array if array.dtype == like.dtype else _viewer(np.dtype(like.dtype), like.sharding)(array)


@functools.lru_cache(256)
def _viewer(dtype: np.dtype, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda bits: _numbers(bits, dtype), out_shardings=sharding)


@functools.lru_cache(1024)
def _putter(
  move: Move, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> Callable[..., jax.Array]:
  def arrange(tensor: jax.Array) -> jax.Array:
    kept = _bits(tensor).reshape(move.split)[move.index].transpose(move.order).reshape(move.part)
    part = _numbers(kept, tensor.dtype)
    return _converted(part, move.conversion and move.conversion.load).astype(dtype)

  def run(array: jax.Array | None, tensor: jax.Array, at: jax.Array) -> jax.Array:
    part = on_auto_axes(arrange, _part_sharding(sharding, len(shape), move.stacked))(tensor)
    return part if array is None else _with_part(array, part, at, move.stacked, sharding)

  return jax.jit(run, out_shardings=sharding, donate_argnums=0)


def _with_part(
  array: jax.Array, part: jax.Array, at: jax.Array, stacked: tuple[int, ...], sharding: Sharding
) -> jax.Array:
  """A parameter with a part written at a position along its stacked axes.

  If these axes are sharded, only the devices that hold the position write. The compiler would write all of each shard.
  """

  def local(shard: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    within, here = _within(shard, at, stacked, names)
    starts, sizes = _box(shard.shape, within, stacked)
    old = lax.dynamic_slice(shard, starts, sizes)
    new = lax.bitcast_convert_type(part, shard.dtype).reshape(sizes)
    return lax.dynamic_update_slice(shard, jnp.where(here, new, old), starts)

  if not isinstance(sharding, NamedSharding):
    names: list[tuple[str, ...]] = [() for _ in stacked]
    return local(array, part, at)
  entries = _entries(sharding, array.ndim)
  names = [axis_names(entries[axis]) for axis in stacked]
  own, rest = PartitionSpec(*entries), _part_sharding(sharding, array.ndim, stacked).spec
  write = jax.shard_map(local, mesh=sharding.mesh, in_specs=(own, rest, PartitionSpec()), out_specs=own)
  return write(array, part, at)


def _converted(part: jax.Array, conversion: Any) -> jax.Array:
  # Conversions are arithmetic, which arrays of NumPy and of JAX share.
  return part if conversion is None else conversion(part)


@jax.jit
def same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
  """Whether two arrays of the same shape, dtype and sharding have the same bits."""
  return jnp.all(_bits(a) == _bits(b))


def _bits(array: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(array, f"uint{_width(array.dtype)}")


def _numbers(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  return lax.bitcast_convert_type(bits, dtype)


def _width(dtype: np.dtype) -> int:
  return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits
