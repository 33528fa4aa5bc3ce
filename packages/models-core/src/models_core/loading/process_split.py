"""Which process reads which part of a parameter.

A single process fills the shards of its devices directly. With several processes, a shard that is scattered over the
file, or that several processes hold, would make each of them read nearly the whole tensor. In that case each process
reads different rows, each row is read once, and the devices redistribute the rows over their interconnect.

Example: four processes with one device each shard the columns of a [4096, 4096] weight. Each row of the file has
elements of all shards. Instead of all rows, process 0 reads rows 0 to 1023, process 1 rows 1024 to 2047 and so on. Then
the devices exchange elements, so that each has its columns.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from models_core.formats import Checkpoint, Index, TensorInfo, bounds_of
from models_core.loading.planned import PlannedParameter
from models_core.sharding import axis_names
from models_core.weights import Piece, Tied


def part_to_read(planned: PlannedParameter, tensors: Mapping[str, TensorInfo]) -> PlannedParameter:
  """The sharding in which a parameter is read: the one that makes the processes read the fewest elements in total.

  Args:
    planned: the parameter.
    tensors: tensors of the checkpoint, by name.

  Returns:
    The parameter itself; or the parameter with its rows split evenly over all devices; or a flat parameter of the same
    elements, split evenly over all devices. `redistribute` turns the array into that of the parameter.
  """
  shape, target = planned.parameter.shape, planned.parameter.sharding
  # `redistribute` moves elements as unsigned integers, and without jax_enable_x64 JAX has none of 64 bits.
  if not isinstance(target, NamedSharding) or len(_processes(target)) == 1 or planned.dtype.itemsize > 4:
    return planned
  # Auto axes: along Explicit ones, reshape would require an output sharding.
  mesh = Mesh(target.mesh.devices.reshape(-1), ("devices",))
  split = NamedSharding(mesh, PartitionSpec("devices"))
  ways = [planned]
  if shape and shape[0] % mesh.size == 0:
    ways += [_as(planned, shape, sharding, planned.pieces) for sharding in (_rows_near(target), split)]
  piece, size = planned.pieces[0], math.prod(shape)
  codec = tensors[piece.tensor].codec
  is_run = len(planned.pieces) == 1 and piece.run is not None and bool(shape)
  is_run = is_run and tensors[piece.tensor].cell is None
  if is_run and size % (mesh.size * (codec.block_size if codec else 1)) == 0:
    ways.append(_as(planned, (size,), split, (piece.in_one_row(),)))
  return min(ways, key=lambda way: _elements_read(way.parameter.shape, way.parameter.sharding))


def _rows_near(target: NamedSharding) -> NamedSharding:
  """Rows split over all devices, such that each device reads rows of its own target, as far as the target splits rows.

  Only columns are left to exchange, which takes no copy of the whole parameter.
  """
  rows = axis_names(target.spec[0]) if target.spec else ()
  others = (name for name in target.mesh.axis_names if name not in rows)
  mesh = Mesh(target.mesh.devices, target.mesh.axis_names)
  return NamedSharding(mesh, PartitionSpec((*rows, *others)))


def files_of_process(
  checkpoint: Checkpoint, parameters: Iterable[PlannedParameter], ties: Iterable[Tied]
) -> tuple[str, ...]:
  """Names of the files that this process reads from, sorted.

  Args:
    checkpoint: the headers of the checkpoint.
    parameters: the parameters to load.
    ties: pairs of tensors that are compared.
  """
  tensors = checkpoint.tensors
  names = {name for tie in ties for name in (tie.tensor, tie.twin)}
  for planned in parameters:
    way = part_to_read(planned, tensors)
    shape, sharding = way.parameter.shape, way.parameter.sharding
    if sharding.is_fully_addressable:
      names.update(piece.tensor for piece in way.pieces)
      continue
    indices = sharding.addressable_devices_indices_map(shape).values()
    names |= {
      piece.tensor for piece in way.pieces if any(_touches(piece, index or (), shape) for index in indices)
    }
  held = {part.file for name in names for part in tensors[name].stored}
  return tuple(sorted(held.union(checkpoint.shared_files)))


def _touches(piece: Piece, index: Index, shape: tuple[int, ...]) -> bool:
  """Whether a shard takes elements of a tensor that fills one position along each stacked axis, such as one expert."""
  return all(
    not isinstance(at, int) or start <= at < stop
    for at, (start, stop) in zip(piece.target, bounds_of(index, shape), strict=True)
  )


def _as(
  planned: PlannedParameter, shape: tuple[int, ...], sharding: NamedSharding, pieces: tuple[Piece, ...]
) -> PlannedParameter:
  parameter = dataclasses.replace(planned.parameter, shape=shape, sharding=sharding)
  return dataclasses.replace(planned, parameter=parameter, pieces=pieces)


def redistribute(array: jax.Array, shape: Sequence[int], target: Sharding) -> jax.Array:
  """Moves the elements of a parameter from the sharding in which they were read to the parameter's own sharding.

  They move over the devices' interconnect, in two steps. After the first, the rows are also split over those mesh axes
  that the target does not use: from rows to columns this is an all-to-all. The second is an all-gather along them.
  Example: the target P(None, "tp") on a mesh with fsdp and tp axes is reached by way of P("fsdp", "tp").

  Args:
    array: the elements of the parameter in order, in any shape.
    shape: shape of the parameter.
    target: sharding of the parameter, on the same devices.
  """
  if array.sharding == target:
    return array
  # Move integers: some backends convert small floats to wider ones while they copy, which changes NaNs.
  bits = _viewed(array, np.dtype(f"u{array.dtype.itemsize}"))
  for step in dict.fromkeys((_between(shape, target), target)):
    bits = _mover(tuple(shape), step)(bits)
  # Wait: this frees what was read, and no two parameters' collectives can block each other.
  return _viewed(bits, array.dtype).block_until_ready()


def _viewed(array: jax.Array, dtype: np.dtype) -> jax.Array:
  """The bits of an array as another dtype of the same size. On CPUs the result aliases the array."""
  shape, sharding = array.shape, array.sharding
  devices: Any = sharding.device_set
  if any(device.platform != "cpu" for device in devices):
    return _bitcast(sharding, dtype)(array)
  shards = {bounds_of(s.index, shape): np.asarray(s.data).view(dtype) for s in array.addressable_shards}
  return jax.make_array_from_callback(
    shape, sharding, lambda index: shards[bounds_of(index or (), shape)], dtype=dtype
  )


@functools.lru_cache(256)
def _mover(shape: tuple[int, ...], sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x.reshape(shape), out_shardings=sharding)


@functools.lru_cache(256)
def _bitcast(sharding: Sharding, dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
  def convert(x: jax.Array) -> jax.Array:
    # Truth values are 0 or 1, which no bitcast takes.
    plain = jax.numpy.bool_ in (x.dtype, dtype)
    return x.astype(dtype) if plain else jax.lax.bitcast_convert_type(x, dtype)

  return jax.jit(convert, out_shardings=sharding)


def _processes(sharding: Sharding) -> set[int]:
  return {device.process_index for device in sharding.device_set}  # type: ignore[attr-defined]


@functools.lru_cache(1024)
def _elements_read(shape: tuple[int, ...], sharding: Sharding) -> int:
  """Elements that all processes read in total: each reads, at full width, the rows that its devices' shards span."""
  if not shape:
    return 0
  rows: dict[int, set[int]] = collections.defaultdict(set)
  for device, index in sharding.devices_indices_map(shape).items():
    rows[device.process_index].update(bounds_of(index, shape)[0])  # type: ignore[attr-defined]
  width = math.prod(shape[1:])
  return sum((max(bounds) - min(bounds)) * width for bounds in rows.values())


def _between(shape: Sequence[int], target: Sharding) -> Sharding:
  """The target's sharding, with the rows split further over those mesh axes that the target does not use."""
  if not isinstance(target, NamedSharding):
    return target
  spec = [axis_names(entry) for entry in target.spec] + [()] * (len(shape) - len(target.spec))
  used = {name for names in spec for name in names}
  for name, ways in target.mesh.shape.items():
    split = math.prod(target.mesh.shape[n] for n in spec[0])
    if name not in used and shape[0] % (split * ways) == 0:
      spec[0] = (*spec[0], name)
  return NamedSharding(target.mesh, PartitionSpec(*(names or None for names in spec)))
