"""Digests of weights: whether two models, or a model and a checkpoint, hold the same bits.

The digest of a parameter is a hash of its name, dtype and shape, and of the bits and the logical index of each element.
It is the same on every mesh and in every sharding. Each device sums over the shards that it holds, in 32-bit integers
that wrap around. No array is gathered: 64 bits for each shard come back to the host.

Digests detect accidental differences; two different models have the same digest with a probability of about 2^-64. They
are not cryptographic hashes: they do not detect a difference that somebody hides on purpose.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models_core.errors import ModelsError
from models_core.layers import dotted, take_layer
from models_core.loading import LoadPlan, PlannedParameter
from models_core.stacks import layers_of, name_in

# Bytes of parameters that are in memory at a time while a checkpoint is read.
_GROUP = 1 << 30

# The prefix of a layer: "layers.3." of "layers.3.attn.q_proj.w".
_LAYER = re.compile(r".*?\.\d+\.")

# Shards are stacked and summed on the devices that hold them, whatever mesh the caller has set.
_NO_MESH = Mesh(np.empty((), object), ())

# Most arrays in one compiled program: compilation time grows with their number.
_MOST = 32


@dataclasses.dataclass(frozen=True)
class Digest:
  """The digest of a model's weights.

  Attributes:
    parameters: the 64-bit digest of each parameter, by name.
  """

  parameters: Mapping[str, int]

  @property
  def total(self) -> int:
    """The 64-bit digest of all parameters together, in whatever order."""
    lines = sorted(f"{name}\0{number:016x}" for name, number in self.parameters.items())
    return _hash("\n".join(lines))

  def differences(self, other: Digest) -> list[str]:
    """Names of the parameters that differ, or that only one of the two digests has."""
    names = self.parameters.keys() | other.parameters.keys()
    return sorted(name for name in names if self.parameters.get(name) != other.parameters.get(name))

  def __str__(self) -> str:
    return f"{self.total:016x}"


def digest(model: nnx.Module) -> Digest:
  """The digest of a model's parameters, computed on the devices that hold them.

  Stacked layers have the names and digests of a model that does not stack them.

  Args:
    model: on any mesh. If several processes hold it, all of them must call this; they get the same digest.

  Raises:
    ModelsError: if a parameter does not hold an array.
  """
  arrays = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    name, value = dotted(path), variable.get_value()
    if not isinstance(value, jax.Array):
      raise ModelsError(
        f"{name} is a {type(value).__name__}, expected a jax.Array: load or initialise the weights first"
      )
    arrays[name] = value
  return digest_arrays(arrays)


def digest_plan(plan: LoadPlan) -> Digest:
  """The digest of the model that a plan would load. About a gigabyte of it is in memory at a time.

  Args:
    plan: made by `plan_load`. Its dtype matters, since a digest is one of bits: the same weights in another dtype have
      another digest.

  Raises:
    CheckpointError: if a file changed since its header was read, or a stored tied head differs from the embedding.
  """
  numbers: dict[str, int] = {}
  with plan.open() as opened:
    for group in _groups(plan.parameters):
      names = [planned.parameter.name for planned in group]
      numbers |= digest_arrays(opened.read_all(names)).parameters
  return Digest(numbers)


def digest_arrays(arrays: Mapping[str, jax.Array]) -> Digest:
  """The digest of arrays, by name. If several processes hold them, all of these must call this.

  Stacked layers have the digests of each layer, which is taken out of its stack for it; one layer is in memory at a time.
  """
  stacks: dict[tuple[range, int], list[str]] = collections.defaultdict(list)
  for name in arrays:
    if (layers := layers_of(name)) is not None:
      for at in range(len(layers)):
        stacks[layers, at].append(name)
  if stacks:
    plain = {name: array for name, array in arrays.items() if layers_of(name) is None}
    numbers = dict(digest_arrays(plain).parameters)
    for (layers, at), names in stacks.items():
      own = {name_in(name, layers[at]): take_layer(arrays[name], at) for name in names}
      numbers |= digest_arrays(own).parameters
    return Digest(numbers)
  # Start the work on all devices before waiting for the first result.
  with jax.set_mesh(_NO_MESH):
    started = [(names, _start([arrays[name] for name in names])) for names in _programs(arrays)]
  sums = {name: np.zeros(2, np.uint32) for name in arrays}
  for names, by_device in started:
    for which, name in enumerate(names):
      first = [shard.replica_id == 0 for shard in arrays[name].addressable_shards]
      sums[name] = np.asarray(by_device)[first, which].sum(0, dtype=np.uint32)
  lanes = np.array(list(sums.values()), np.uint32).reshape(-1, 2)
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


def _programs(arrays: Mapping[str, jax.Array]) -> Iterator[list[str]]:
  """Names of the arrays that one compiled program sums: those of one layer, so that all layers share a program."""
  found = collections.defaultdict(list)
  for name, array in arrays.items():
    if devices := tuple(shard.device for shard in array.addressable_shards):
      layer = _LAYER.match(name)
      found[layer and layer[0], devices].append(name)
  # Layers come first: devices sum over them while the other programs are compiled.
  for names in sorted(found.values(), key=len, reverse=True):
    for at in range(0, len(names), _MOST):
      yield names[at : at + _MOST]


def _start(arrays: Sequence[jax.Array]) -> jax.Array:
  """Starts the sums over the shards that this process holds: uint32 [devices, arrays, 2], computed asynchronously."""
  shards = [array.addressable_shards for array in arrays]
  mesh = Mesh(np.array([shard.device for shard in shards[0]]), ("device",))
  by_device = NamedSharding(mesh, PartitionSpec("device"))
  stacks, starts = [], []
  for array, parts in zip(arrays, shards, strict=True):
    data = [part.data if array.ndim else part.data.reshape(1) for part in parts]
    size, *rest = data[0].shape
    held = NamedSharding(mesh, by_device.spec, memory_kind=array.sharding.memory_kind)
    stack = jax.make_array_from_single_device_arrays((len(data) * size, *rest), held, data)
    # Arrays that are offloaded to host memory are summed on the device.
    stacks.append(jax.device_put(stack, by_device))
    first = [[bounds.start or 0 for bounds in part.index] or [0] for part in parts]
    starts.append(np.array(first, np.uint32))
  return _sum_shards(mesh, tuple(array.shape or (1,) for array in arrays), stacks, starts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sum_shards(
  mesh: Mesh, shapes: tuple[tuple[int, ...], ...], stacks: list[jax.Array], starts: list[jax.Array]
) -> jax.Array:
  """The sums of many arrays' shards.

  Args:
    mesh: one axis, of the devices that hold the shards.
    shapes: shapes of the arrays.
    stacks: for each array, its shards, one for each device, concatenated along the first axis.
    starts: for each array, the index of each shard's first element, uint32 [devices, axes].

  Returns:
    uint32 [devices, arrays, 2].
  """

  def local(stacks: list[jax.Array], starts: list[jax.Array]) -> jax.Array:
    parts = zip(stacks, starts, shapes, strict=True)
    sums = [_sum_elements(shard, start[0], shape) for shard, start, shape in parts]
    return jnp.stack([jnp.stack(lanes) for lanes in sums])[None]

  by_device = PartitionSpec(*mesh.axis_names)
  return jax.shard_map(local, mesh=mesh, in_specs=by_device, out_specs=by_device)(stacks, starts)


@functools.partial(jax.jit, static_argnums=2)
def _sum_elements(shard: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> Sequence[jax.Array]:
  """Two independent sums over the hashed elements of a shard.

  Args:
    shard: a part of an array, with at least one axis.
    start: the index of the shard's first element in the array, uint32 [axes].
    shape: shape of the array.

  Returns:
    Two scalars, uint32.
  """
  index = jnp.uint32(0)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :])
    along = jax.lax.broadcasted_iota(jnp.uint32, shard.shape, axis) + start[axis]
    # 32 bits cannot number all elements of a huge array: hashing leading axes separates those 2^32 apart.
    index = index + (_mix(along) if shape[axis] * stride >= 2**32 else along * np.uint32(stride))
  x = jnp.uint32(0)
  for word in _words(shard):
    x = _mix(x + word * np.uint32(0x9E3779B1) + index * np.uint32(0x85EBCA77))
  y = (x ^ (x >> 7)) * np.uint32(0xC2B2AE3D)
  # In two steps: a CPU runs the first one on all of its cores.
  rows = _sum_lanes((x, y ^ (y >> 13)), tuple(range(1, shard.ndim)))
  return _sum_lanes(rows, (0,))


def _sum_lanes(lanes: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
  """Sums that wrap around, of both lanes in one pass: for two separate sums XLA would keep all of x in memory."""
  zeros = (np.uint32(0), np.uint32(0))
  return jax.lax.reduce(tuple(lanes), zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit integers in which each output bit depends on all input bits."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _words(data: jax.Array) -> list[jax.Array]:
  """The bits of each element, as one uint32 array of the same shape for each 32 bits."""
  if jnp.issubdtype(data.dtype, jnp.complexfloating):
    return [*_words(data.real), *_words(data.imag)]
  if data.dtype == jnp.bool_:
    return [data.astype(jnp.uint32)]
  bits = (jnp.iinfo if jnp.issubdtype(data.dtype, jnp.integer) else jnp.finfo)(data.dtype).bits
  if bits == 64:
    pairs = jax.lax.bitcast_convert_type(data, jnp.uint32)
    return [pairs[..., 0], pairs[..., 1]]
  return [jax.lax.bitcast_convert_type(data, f"uint{bits}").astype(jnp.uint32)]
