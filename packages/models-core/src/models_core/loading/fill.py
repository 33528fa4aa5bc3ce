"""Fills the shards of parameters: which reads of which tensors give the elements of each shard.

Contiguous bytes that a shard takes verbatim go from the file, or from its decoder, straight into the shard's buffer.
Whatever must be cast, decoded in blocks, split by columns or reordered passes through a scratch buffer of a few MB,
which stays in the processor's cache. On CPUs the arrays alias the buffers, or the mapped file itself if its tensors are
aligned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from models_core.casting import cast_into
from models_core.errors import CheckpointError
from models_core.formats import (
  ALIGNMENT,
  CellReader,
  Extent,
  Index,
  RunReader,
  TensorInfo,
  TensorReader,
  aligned_empty,
  bounds_of,
)
from models_core.loading import boxes, streams
from models_core.loading.planned import PlannedParameter
from models_core.weights import Piece, arrange, part_shape

# Most bytes that one task of a thread fills. Small tensors that are cast share a task of a quarter of it.
_TASK = 32 << 20

# The elements that a shard takes of what a piece fills, and the view of the shard's buffer that they go to.
_Target = tuple[Index, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shard:
  """A shard of a parameter, once for all devices of this process that hold it.

  Attributes:
    index: bounds of the shard within the parameter, one slice for each axis.
    buffer: host memory for the elements of the shard.
    filled: whether the buffer is the mapped file itself, so that nothing has to be read.
    all: [N, ...], the buffers of all shards of the parameter, in order; None if they do not lie side by side.
  """

  index: Index
  buffer: np.ndarray
  filled: bool
  all: np.ndarray | None = None


def shards_of(planned: PlannedParameter, reader: TensorReader, *, alias: bool) -> list[Shard]:
  """The distinct shards that this process's devices hold. Their buffers lie in one piece of memory.

  Args:
    planned: the parameter.
    reader: reader of the checkpoint.
    alias: whether a shard's buffer may be the mapped file itself.
  """
  shape, sharding = planned.parameter.shape, planned.parameter.sharding
  indices = _indices(sharding, shape)
  shard_shape = sharding.shard_shape(shape)
  mapped = _mapped(planned, indices, reader) if alias else []
  mapped += [None] * (len(indices) - len(mapped))
  free = _buffers(sum(part is None for part in mapped), shard_shape, planned.dtype)
  if len(free) == len(indices):
    joined = free if isinstance(free, np.ndarray) else None
    return [Shard(index, buffer, False, joined) for index, buffer in zip(indices, free, strict=True)]
  unused = iter(free)
  return [
    Shard(index, next(unused) if part is None else part.reshape(shard_shape), part is not None)
    for index, part in zip(indices, mapped, strict=True)
  ]


# A model has many parameters of few shapes and shardings.
@functools.lru_cache(maxsize=256)
def _indices(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[Index, ...]:
  """The index of each distinct shard that this process's devices hold, sorted."""
  held = sharding.addressable_devices_indices_map(shape).values()
  distinct = sorted({bounds_of(index or (), shape) for index in held})
  return tuple(tuple(slice(*bound) for bound in bounds) for bounds in distinct)


@functools.lru_cache(maxsize=256)
def _side_by_side(
  sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
  """Shards that follow one another along a single axis: of each group the first one, how many, and the axis."""
  indices = _indices(sharding, shape)
  groups: list[tuple[int, int, int]] = []
  for i, (index, last) in enumerate(zip(indices[1:], indices, strict=False), 1):
    differing = [axis for axis, (a, b) in enumerate(zip(index, last, strict=True)) if a != b]
    first, count, axis = groups[-1] if groups else (0, 1, differing[-1])
    if differing == [axis] and index[axis].start == last[axis].stop:
      groups[-1:] = [(first, count + 1, axis)]
    else:
      groups = [*(groups or [(0, 1, axis)]), (i, 1, axis)]
  return tuple(groups)


def _buffers(count: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | list[np.ndarray]:
  """Some arrays in one piece of memory, each of which a CPU device can alias; one array of all if they leave no gaps."""
  nbytes = math.prod(shape) * dtype.itemsize
  step = -(-nbytes // ALIGNMENT) * ALIGNMENT
  memory = aligned_empty((count * step,), np.dtype(np.uint8))
  if step == nbytes:
    return memory.view(dtype).reshape(count, *shape)
  starts = (number * step for number in range(count))
  return [memory[start : start + nbytes].view(dtype).reshape(shape) for start in starts]


def _run_of(planned: PlannedParameter, reader: TensorReader) -> int | None:
  """The element of a tensor from which on a file holds a parameter contiguously, in the loaded dtype; None if none does."""
  piece = planned.pieces[0]
  info = reader.tensors[piece.tensor]
  if reader.runs is None or info.cell is not None or len(planned.pieces) > 1 or info.dtype != planned.dtype:
    return None
  return piece.run


def _mapped(
  planned: PlannedParameter, indices: Sequence[Index], reader: TensorReader
) -> list[np.ndarray | None]:
  """The mapped memory of shards' elements, None for one that cannot be mapped; shorter if no more can be."""
  shape = planned.parameter.shape
  if (run := _run_of(planned, reader)) is None or not _is_whole(indices[0], shape):
    return []
  assert reader.runs is not None
  row = math.prod(shape[1:])
  info = reader.tensors[planned.pieces[0].tensor]
  mapped: list[np.ndarray | None] = []
  for index in indices:
    rows = index[0] if index else slice(0, 1)
    mapped.append(reader.runs.map_elements(info, run + rows.start * row, (rows.stop - rows.start) * row))
    if mapped[0] is None:
      break
  return mapped


def _is_whole(index: Index, shape: tuple[int, ...]) -> bool:
  """Whether an index takes whole rows, so that its elements are contiguous."""
  return all(s.stop - s.start == size for s, size in zip(index[1:], shape[1:], strict=True))


def tasks(
  filled: Sequence[tuple[PlannedParameter, list[Shard]]], reader: TensorReader
) -> Iterator[Callable[[], None]]:
  """The tasks that fill the shards of some parameters, for several threads to run in any order."""
  streamed: dict[str, list[streams.Share]] = {}
  boxed: dict[str, list[Iterator[Callable[[], None]]]] = {}
  extents: list[Extent] = []
  small: list[Callable[[], None]] = []
  small_nbytes = 0
  for planned, shards in filled:
    for piece in planned.pieces:
      info = reader.tensors[piece.tensor]
      shape = part_shape(piece, planned.parameter.shape)
      targets = [t for shard in shards if not shard.filled and (t := _target(piece, shard)) is not None]
      if not targets:
        continue
      if (share := _streamed(piece, info, shape, targets, reader)) is not None:
        streamed.setdefault(piece.tensor, []).append(share)
        continue
      if (run := piece.run) is None or reader.runs is None or info.cell is not None:
        boxed.setdefault(piece.tensor, []).append(_box_tasks(piece, info, shape, targets, reader))
        continue
      if not shape:  # a scalar is one row of one element
        shape, targets = (1,), [((slice(0, 1),), target[None]) for _, target in targets]
      straight, targets = _straight(run, info, shape, targets)
      extents += straight
      if not targets:
        continue
      if not straight and (joined := _joined(piece, planned, info, shards)):
        targets = joined
      step = max(1, _TASK // max(1, math.prod(shape[1:]) * info.dtype.itemsize))
      last = max(index[0].stop for index, _ in targets)
      for start in range(min(index[0].start for index, _ in targets), last, step):
        rows = (start, min(start + step, last))
        small.append(
          _task(reader, info, _fill_rows, run, info, shape, targets, *rows, reader.chunk, reader.runs)
        )
        small_nbytes += (rows[1] - rows[0]) * math.prod(shape[1:]) * info.dtype.itemsize
        if small_nbytes >= _TASK // 4:
          yield functools.partial(_run_all, small)
          small, small_nbytes = [], 0
  if extents:
    assert reader.runs is not None
    yield from _extent_tasks(extents, reader.runs)
  if small:
    yield functools.partial(_run_all, small)
  for several in boxed.values():
    # Parameters that share a tensor take turns: a cell that they share is decoded once and freed soon.
    for turn in itertools.zip_longest(*several):
      yield from filter(None, turn)
  if (cells := reader.cells) is not None:
    for name, wanted in streamed.items():
      info = reader.tensors[name]
      for position in streams.wanted(info, wanted):
        yield _task(reader, info, _fill_from_cell, info, position, wanted, cells)


def _target(piece: Piece, shard: Shard) -> _Target | None:
  """The elements that a shard takes of what a piece fills, and where they go; None if it takes none."""
  index: list[slice] = []
  at: list[int | slice] = []
  for bounds, position in zip(shard.index, piece.target, strict=True):
    if isinstance(position, int):
      if not bounds.start <= position < bounds.stop:
        return None
      at.append(position - bounds.start)
    else:
      index.append(bounds)
      at.append(slice(None))
  # The ellipsis makes this a view even if it is a single element.
  return tuple(index), shard.buffer[(*at, ...)]


def _straight(
  base: int, info: TensorInfo, shape: tuple[int, ...], targets: list[_Target]
) -> tuple[list[Extent], list[_Target]]:
  """The extents of a file that go verbatim into buffers, and the targets whose elements must be cast or split."""
  if info.codec is not None:
    return [], targets
  row = math.prod(shape[1:]) * info.dtype.itemsize
  extents: list[Extent] = []
  rest: list[_Target] = []
  for index, target in targets:
    if target.dtype == info.dtype and target.flags.c_contiguous and _is_whole(index, shape):
      start = base * info.dtype.itemsize + index[0].start * row
      extents.append(Extent(info, start, target.reshape(-1).view(np.uint8)))
    else:
      rest.append((index, target))
  return extents, rest


def _joined(
  piece: Piece, planned: PlannedParameter, info: TensorInfo, shards: Sequence[Shard]
) -> list[_Target]:
  """Targets of several shards that follow one another along an axis, so that one copy fills the rows of all.

  Of a weight that is split by columns, for example, [R, C] in four shards, the target is a view [R, 4, C / 4]. There
  are none where numbers are cast, or the buffers do not lie side by side.
  """
  buffers = shards[0].all
  if buffers is None or planned.dtype != info.dtype:
    return []
  kept = [axis for axis, position in enumerate(piece.target) if not isinstance(position, int)]
  targets: list[_Target] = []
  for first, count, axis in _side_by_side(planned.parameter.sharding, planned.parameter.shape):
    index = shards[first].index
    if axis not in kept[1:]:
      return []
    at = []
    for bounds, position in zip(index, piece.target, strict=True):
      if isinstance(position, int) and not bounds.start <= position < bounds.stop:
        break
      at.append(position - bounds.start if isinstance(position, int) else slice(None))
    else:
      several = slice(index[axis].start, shards[first + count - 1].index[axis].stop)
      part = tuple(several if a == axis else index[a] for a in kept)
      view = buffers[(slice(first, first + count), *at)]
      targets.append((part, np.moveaxis(view, 0, kept.index(axis))))
  return targets


def _extent_tasks(extents: Sequence[Extent], reader: RunReader) -> Iterator[Callable[[], None]]:
  """The tasks that read extents. Each task reads neighbours in a file, which takes a single call of the system."""
  several: list[Extent] = []
  nbytes = 0
  for extent in sorted(extents, key=lambda extent: (extent.info.file, extent.offset)):
    for at in range(0, extent.buffer.nbytes, _TASK):
      part = Extent(extent.info, extent.start + at, extent.buffer[at : at + _TASK])
      if nbytes + part.buffer.nbytes > _TASK:
        yield functools.partial(reader.read_extents, several)
        several, nbytes = [], 0
      several.append(part)
      nbytes += part.buffer.nbytes
  if several:
    yield functools.partial(reader.read_extents, several)


def _fill_rows(
  base: int,
  info: TensorInfo,
  shape: tuple[int, ...],
  targets: list[_Target],
  start: int,
  stop: int,
  chunk: int,
  reader: RunReader,
) -> None:
  """Fills rows [start, stop) of what a piece fills, through scratch memory.

  The tensor holds all of it contiguously, from element `base` on.
  """
  row = math.prod(shape[1:])
  step = max(1, chunk // max(1, row * info.dtype.itemsize))
  for low in range(start, stop, step):
    high = min(low + step, stop)
    wanted = [(i, t) for i, t in targets if i[0].start < high and low < i[0].stop]
    if not wanted:
      continue
    data = reader.read_elements(info, base + low * row, (high - low) * row).reshape(high - low, *shape[1:])
    for index, target in wanted:
      first, last = max(low, index[0].start), min(high, index[0].stop)
      part = target[first - index[0].start : last - index[0].start]
      source = data[first - low : last - low][(slice(None), *index[1:])]
      cast_into(part, source.reshape(part.shape))


def _box_tasks(
  piece: Piece, info: TensorInfo, shape: tuple[int, ...], targets: list[_Target], reader: TensorReader
) -> Iterator[Callable[[], None]]:
  """The tasks that fill shards from a tensor whose axes are in another order, or that is stored in cells."""
  if 0 in shape:
    return
  factoring = boxes.factoring(piece, shape) if piece.conversion is None else None
  faces = [boxes.face(factoring, index, target) for index, target in targets] if factoring else []
  seen = [face for face in faces if face is not None]
  if factoring is None or len(seen) < len(targets):
    yield _task(reader, info, _fill_whole, piece, info, shape, targets, reader)
    return
  for box, copies in boxes.cut(factoring, info, seen, reader.chunk):
    yield _task(reader, info, _fill_box, factoring, info, box, copies, reader)


def _streamed(
  piece: Piece, info: TensorInfo, shape: tuple[int, ...], targets: list[_Target], reader: TensorReader
) -> streams.Share | None:
  """What some shards take of a tensor; None if its cells cannot be decoded front to back into these shards."""
  if reader.cells is None or not reader.cells.has_streams(info):
    return None
  if 0 in shape or piece.conversion is not None:
    return None
  if (factoring := boxes.factoring(piece, shape)) is None:
    return None
  faces = [face for index, target in targets if (face := boxes.face(factoring, index, target)) is not None]
  share = streams.Share(factoring, tuple(faces))
  return share if len(faces) == len(targets) and streams.is_aligned(share, info) else None


def _fill_from_cell(
  info: TensorInfo, position: tuple[int, ...], shares: list[streams.Share], reader: CellReader
) -> None:
  """Fills all shards from one cell, which is decoded once, up to the last element that a shard takes."""
  cell = reader.open_cell(info, position)
  for run in streams.runs(info, position, shares, reader.run):
    data = streams.scratch(run, info.dtype)
    copies = list(streams.copies(run, data, shares))
    if len(copies) == 1 and streams.is_as_it_is(*copies[0], data):
      cell.read_into(run.start, copies[0][0])
    elif copies:
      cell.read_into(run.start, data)
      for target, source in copies:
        cast_into(target, source)


def _fill_box(
  factoring: boxes.Factoring,
  info: TensorInfo,
  box: Index,
  copies: list[tuple[np.ndarray, Index]],
  reader: TensorReader,
) -> None:
  """Fills all shards from one box of a tensor, which is read once."""
  data = boxes.factored(factoring, box, reader.read_box(info, box))
  for target, index in copies:
    within: tuple[Any, ...] = index
    cast_into(target, data[(*within, ...)])


def _fill_whole(
  piece: Piece, info: TensorInfo, shape: tuple[int, ...], targets: list[_Target], reader: TensorReader
) -> None:
  """Fills shards from all that a piece takes of a tensor, which is converted or rearranged in memory."""
  box, within = boxes.taken(piece)
  part = arrange(reader.read_box(info, box), within, shape)
  for index, target in targets:
    cast_into(target, part[index])


def _run_all(several: Sequence[Callable[[], None]]) -> None:
  for one in several:
    one()


def _task(
  reader: TensorReader, info: TensorInfo, fill: Callable[..., None], *args: Any
) -> Callable[[], None]:
  """A task that fills shards from a tensor."""
  return functools.partial(_run, reader.where, info.name, fill, *args)


def _run(where: str, tensor: str, fill: Callable[..., None], *args: Any) -> None:
  """Runs a task.

  Raises:
    CheckpointError: if a finite number does not fit into the dtype that it is loaded in.
  """
  try:
    fill(*args)
  except OverflowError as error:
    raise CheckpointError(where, [f"{tensor}: {error}: load it in another dtype"]) from None
