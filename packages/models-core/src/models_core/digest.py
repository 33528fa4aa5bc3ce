"""Digests of weights: whether two models, or a model and a checkpoint, hold the same bits.

A parameter's number is a function of its name, dtype, shape, and of the bits and the logical index of every element, so
it is the same on every mesh and in every sharding. Each device sums over the shards that it holds, in integers that
wrap; no array is gathered, and 64 bits a shard come back to the host.

These numbers find accidents, but for about one in 2^64. They are no defence against somebody who wants two models to
look alike.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from models_core.abstract import dotted
from models_core.errors import ModelsError
from models_core.loader import load_arrays
from models_core.plan import LoadPlan, PlannedParameter

# Parameters that are in memory at a time while a checkpoint is read, in bytes.
_GROUP = 1 << 30

# Elements that one call sums over. What it mixes stays in the cache: ten times as many take ten times as long for each.
_BLOCK = 1 << 21

# A shard lies on one device, whatever mesh is in context.
_NO_MESH = Mesh(np.empty((), object), ())


@dataclasses.dataclass(frozen=True)
class Digest:
  """Numbers that stand for the weights of a model.

  Attributes:
    parameters: 64 bits for each parameter, by name.
  """

  parameters: Mapping[str, int]

  @property
  def total(self) -> int:
    """64 bits for all parameters, whatever their order."""
    lines = sorted(f"{name}\0{number:016x}" for name, number in self.parameters.items())
    return _hash("\n".join(lines))

  def differences(self, other: Digest) -> list[str]:
    """Names of the parameters that differ, or that only one of the two has."""
    names = self.parameters.keys() | other.parameters.keys()
    return sorted(name for name in names if self.parameters.get(name) != other.parameters.get(name))

  def __str__(self) -> str:
    return f"{self.total:016x}"


def digest(model: nnx.Module) -> Digest:
  """The digest of a model's parameters, computed where they lie.

  Args:
    model: on any mesh. Where it lies on several processes, all of them call this and get the same.

  Raises:
    ModelsError: if a parameter holds no array.
  """
  arrays = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    name, value = dotted(path), variable.get_value()
    if not isinstance(value, jax.Array):
      raise ModelsError(f"{name} holds no array but {type(value).__name__}: fill the model first")
    arrays[name] = value
  return digest_arrays(arrays)


def digest_plan(plan: LoadPlan) -> Digest:
  """The digest of the model that a plan would load, of which at most about a gigabyte is in memory at a time.

  Args:
    plan: made by `plan_load`. Its dtype counts: a digest is one of bits.

  Raises:
    CheckpointError: as `load`.
  """
  numbers: dict[str, int] = {}
  ties = plan.ties
  for group in _groups(plan.parameters):
    part = dataclasses.replace(plan, parameters=group, ties=ties)
    numbers |= digest_arrays(load_arrays(part)).parameters
    ties = ()
  return Digest(numbers)


def digest_arrays(arrays: Mapping[str, jax.Array]) -> Digest:
  """The digest of arrays by name."""
  # All devices are given their work before the first result is awaited.
  with jax.set_mesh(_NO_MESH):
    started = {name: _start(array) for name, array in arrays.items()}
  lanes = np.array([_sum(parts) for parts in started.values()], np.uint32).reshape(-1, 2)
  if any(not array.is_fully_addressable for array in arrays.values()):
    everybody = multihost_utils.process_allgather(lanes).reshape(-1, *lanes.shape)
    local = [array.is_fully_addressable for array in arrays.values()]
    lanes = np.where(np.array(local)[:, None], lanes, everybody.sum(0, dtype=np.uint32))
  return Digest(
    {
      name: _hash(f"{name}\0{array.dtype.name}\0{array.shape}\0{low:08x}{high:08x}")
      for (name, array), (low, high) in zip(arrays.items(), lanes, strict=True)
    }
  )


def _groups(planned: Sequence[PlannedParameter]) -> Iterator[tuple[PlannedParameter, ...]]:
  group: list[PlannedParameter] = []
  for one in planned:
    if group and sum(other.nbytes for other in group) + one.nbytes > _GROUP:
      yield tuple(group)
      group = []
    group.append(one)
  if group:
    yield tuple(group)


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _start(array: jax.Array) -> list[jax.Array]:
  """The sums of the shards of which this process holds the first copy, under way."""
  parts = []
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      first = [bounds.indices(size)[0] for bounds, size in zip(shard.index, array.shape, strict=True)]
      for starts, sizes in _blocks(shard.data.shape):
        parts.append(_sum_elements(shard.data, np.array([starts, first], np.uint32), sizes, array.shape))
  return parts


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Starts and sizes of the blocks that make up an array."""
  steps: list[int] = []
  left = _BLOCK
  for size in reversed(shape):
    steps.insert(0, max(1, min(size, left)))
    left //= steps[0]
  for starts in itertools.product(*(range(0, size, step) for size, step in zip(shape, steps, strict=True))):
    yield (
      starts,
      tuple(min(step, size - at) for at, step, size in zip(starts, steps, shape, strict=True)),
    )


def _sum(parts: Sequence[jax.Array]) -> np.ndarray:
  return np.array([np.zeros(2, np.uint32), *parts]).sum(0, dtype=np.uint32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sum_elements(
  shard: jax.Array, starts: jax.Array, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
  """Two sums over the elements of a block.

  Args:
    shard: of an array.
    starts: uint32 [2, axes], the block's first index in the shard and the shard's in the array.
    sizes: of the block.
    shape: of the array.

  Returns:
    uint32 [2].
  """
  data = jax.lax.dynamic_slice(shard, tuple(starts[0]), sizes)
  index = jnp.uint32(0)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :])
    along = jax.lax.broadcasted_iota(jnp.uint32, sizes, axis) + starts[0, axis] + starts[1, axis]
    # Where 32 bits don't number all elements, those that are 2^32 apart are told apart by their rows.
    index = index + (_mix(along) if shape[axis] * stride > 2**32 else along * np.uint32(stride))
  x = jnp.uint32(0)
  for word in _words(data):
    x = _mix(x + word * np.uint32(0x9E3779B1) + index * np.uint32(0x85EBCA77))
  y = (x ^ (x >> 7)) * np.uint32(0xC2B2AE3D)
  return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in (x, y ^ (y >> 13))])


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit integers whose output bits depend on all input bits."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _words(data: jax.Array) -> list[jax.Array]:
  """The bits of each element as uint32 arrays of the same shape, one for each 32 bits."""
  if jnp.issubdtype(data.dtype, jnp.complexfloating):
    return [*_words(data.real), *_words(data.imag)]
  bits = data.dtype.itemsize * 8
  if data.dtype == jnp.bool_:
    return [data.astype(jnp.uint32)]
  if bits == 64:
    pairs = jax.lax.bitcast_convert_type(data, jnp.uint32)
    return [pairs[..., 0], pairs[..., 1]]
  return [jax.lax.bitcast_convert_type(data, f"uint{bits}").astype(jnp.uint32)]
