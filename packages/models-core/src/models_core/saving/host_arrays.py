"""Parameters in host memory: the shards that devices hold, assembled to tensors of a checkpoint."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from models_core.casting import cast_into
from models_core.dtypes import common_dtype
from models_core.errors import SaveError
from models_core.formats import Index, aligned_empty, bounds_of
from models_core.saving.plan import SavedTensor
from models_core.weights import Piece, put_back


def with_arrays(
  tensors: Sequence[SavedTensor], get: Callable[[str], Any]
) -> Iterator[tuple[SavedTensor, Mapping[str, HostArray]]]:
  """Yields each tensor with the parameters that fill it, which are released after their last use.

  Under several processes all must iterate over all tensors.

  Args:
    tensors: the tensors to write, in order.
    get: a parameter's name -> its array.
  """
  last = {name: tensor.name for tensor in tensors for name, _ in tensor.parts}
  held: dict[str, HostArray] = {}
  for tensor in tensors:
    for name, _ in tensor.parts:
      if name not in held:
        held[name] = HostArray(_gathered(get(name)))
    yield tensor, held
    for name in [name for name in held if last[name] == tensor.name]:
      del held[name]


def assemble(
  tensor: SavedTensor, sources: Sequence[tuple[HostArray, Piece]], rows: slice | None
) -> np.ndarray:
  """Assembles some rows of a tensor, or all of it, as contiguous memory in the dtype of the file.

  Args:
    tensor: the tensor to write.
    sources: the parameters that fill it, each with the piece that describes how.
    rows: rows along the first axis that tensor and parameters share; None is the whole tensor.

  Raises:
    SaveError: if a finite value is infinite in the dtype of the file.
  """
  host, piece = sources[0]
  if len(sources) == 1 and piece.run is not None:
    return cast(np.ascontiguousarray(host.part(piece, rows)), tensor)
  shape = tensor.shape
  if rows is not None:
    count = rows.stop - rows.start
    shape = (tensor.shape[0] // piece.split[0] * count, *tensor.shape[1:])
  block = aligned_empty(shape, functools.reduce(common_dtype, (host.dtype for host, _ in sources)))
  for host, piece in sources:
    cut = piece if rows is None else dataclasses.replace(piece, split=(count, *piece.split[1:]))
    put_back(host.part(piece, rows), cut, block)
  return cast(block, tensor)


def cast(data: np.ndarray, tensor: SavedTensor) -> np.ndarray:
  """Rounds to nearest even.

  Raises:
    SaveError: if a finite number becomes an infinite one.
  """
  if data.dtype == tensor.dtype:
    return data
  written = aligned_empty(data.shape, tensor.dtype)
  try:
    cast_into(written, data)
  except OverflowError as error:
    raise SaveError(f"{tensor.name}: {error}: write it in another dtype") from None
  return written


def whole(array: Any) -> np.ndarray:
  """All elements of an array, in host memory. All processes that hold a part of it must call this."""
  host = HostArray(_gathered(array))
  host.fetch()
  return host.region(tuple(slice(0, size) for size in host.shape))


class HostArray:
  """The shards of an array that this process's devices hold, in host memory."""

  def __init__(self, array: Any):
    self.shape, self.dtype, self._array = tuple(array.shape), np.dtype(array.dtype), array
    self.parts: list[tuple[Index, np.ndarray]] = []

  def fetch(self) -> None:
    """Copies the distinct shards to host memory; on CPUs they are not copied."""
    if self.parts:
      return
    if not isinstance(self._array, jax.Array):
      self.parts = [(tuple(slice(0, size) for size in self.shape), np.asarray(self._array))]
      return
    parts = {}
    for shard in self._array.addressable_shards:
      bounds = bounds_of(shard.index, self.shape)
      if bounds not in parts:
        # A new array of the same buffer: the original would keep its host copy for as long as it lives.
        handle = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
        parts[bounds] = np.asarray(handle)
    self.parts = [(tuple(slice(*bound) for bound in bounds), data) for bounds, data in parts.items()]

  def part(self, piece: Piece, rows: slice | None) -> np.ndarray:
    """The elements of the array that a piece describes.

    Args:
      piece: how a tensor corresponds to a part of the array.
      rows: rows of that part to take; None takes all.

    Returns:
      A view if one shard holds all of these elements, otherwise a copy.
    """
    index, dropped, cut = [], [], rows
    for at, size in zip(piece.target, self.shape, strict=True):
      if isinstance(at, int):
        index.append(slice(at, at + 1))
      else:
        index.append(cut or slice(0, size))
        cut = None
      dropped.append(0 if isinstance(at, int) else slice(None))
    return self.region(tuple(index))[(*dropped, ...)]

  def region(self, index: Index) -> np.ndarray:
    """The elements within a box of the array: a view if one shard holds all of them, otherwise a copy."""
    whole = None
    for bounds, data in self.parts:
      common = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index, bounds, strict=True)
      )
      if any(c.start >= c.stop for c in common):
        continue
      part = data[_within(bounds, common)]
      if common == index:
        return part
      if whole is None:
        whole = aligned_empty(_shape(index), self.dtype)
      whole[_within(index, common)] = part
    return aligned_empty(_shape(index), self.dtype) if whole is None else whole


def _shape(index: Index) -> tuple[int, ...]:
  return tuple(bounds.stop - bounds.start for bounds in index)


def _within(outer: Index, inner: Index) -> Any:
  """`inner` as an index of an array that covers `outer`. The ellipsis makes the result a view even of one element."""
  return *(slice(i.start - o.start, i.stop - o.start) for o, i in zip(outer, inner, strict=True)), ...


def _gathered(array: Any) -> Any:
  """The array itself if this process can read all of it, otherwise a replicated copy. All processes must call this."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable or _is_everywhere(array):
    return array
  if not isinstance(array.sharding, NamedSharding):
    return multihost_utils.process_allgather(array, tiled=True)
  return _gather(NamedSharding(array.sharding.mesh, PartitionSpec()))(array)


@functools.cache
def _gather(replicated: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=replicated)


def _is_everywhere(array: jax.Array) -> bool:
  """Whether each process holds all elements. All processes get the same answer."""
  held: dict[int, set] = collections.defaultdict(set)
  device: Any
  for device, index in array.sharding.devices_indices_map(array.shape).items():
    held[device.process_index].add(bounds_of(index, array.shape))
  return len(held) == jax.process_count() and all(
    len(parts) == len(set.union(*held.values())) for parts in held.values()
  )
