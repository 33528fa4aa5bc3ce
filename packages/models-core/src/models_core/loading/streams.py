"""Tensors whose cells are streams: each cell is decoded once, in order, a run at a time, for all shards that want it.

A run is a part of a cell without gaps, small enough for a core's cache. What a shard takes as it is is decoded into its
buffer; all else passes through scratch memory. So a cell as large as a tensor costs no memory of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models_core.formats import Index, TensorInfo
from models_core.loading import boxes


@dataclasses.dataclass(frozen=True)
class Share:
  """What one parameter's shards take of a tensor.

  Attributes:
    factoring: the factors that the tensor and the parameter have in common.
    faces: the shards seen from the tensor.
  """

  factoring: boxes.Factoring
  faces: tuple[boxes.Face, ...]


@dataclasses.dataclass(frozen=True)
class Run:
  """A part of a cell that is a run of its bytes.

  Attributes:
    box: the elements within the tensor.
    start: bytes of the cell in front of it.
    shape: of the run; longer than the box where a cell hangs over the tensor's end.
  """

  box: Index
  start: int
  shape: tuple[int, ...]


def is_aligned(share: Share, info: TensorInfo) -> bool:
  """Whether no cell ends within a factor that is copied as a whole."""
  return all(
    axis.base % axis.inner == 0 and cell % axis.inner == 0
    for axis, cell in zip(share.factoring.axes, info.cell or (), strict=True)
  )


def wanted(info: TensorInfo, shares: Sequence[Share]) -> list[tuple[int, ...]]:
  """Positions, within the grid of cells, of those of which a shard takes something, in order."""
  found: set[tuple[int, ...]] = set()
  for share in shares:
    for face in share.faces:
      spans = [
        range(low // cell, -(-high // cell))
        for (low, high), cell in zip(_bounds(share.factoring, face), info.cell or (), strict=True)
      ]
      found.update(itertools.product(*spans))
  return sorted(found)


def _bounds(factoring: boxes.Factoring, face: boxes.Face) -> Iterator[tuple[int, int]]:
  """The elements that a shard takes along each axis of the tensor."""
  for axis, lead in zip(factoring.axes, boxes.leads(factoring), strict=True):
    low, high = (0, axis.lead) if lead is None else face.bounds[lead]
    yield axis.base + low * axis.inner, axis.base + high * axis.inner


def runs(info: TensorInfo, position: Sequence[int], shares: Sequence[Share], most: int) -> Iterator[Run]:
  """The runs of a cell in order: of no more bytes than `most`, unless a copy needs more at a time."""
  cell = info.cell or ()
  if not cell:
    yield Run((), 0, ())
    return
  units = [math.lcm(*(share.factoring.axes[at].inner for share in shares)) for at in range(len(cell))]
  sizes = [math.prod(cell[at + 1 :]) * info.dtype.itemsize for at in range(len(cell))]
  fits = (at for at in range(len(cell)) if units[at] > 1 or sizes[at] <= most)
  outer = next(fits, len(cell) - 1)
  step = max(units[outer], most // sizes[outer] // units[outer] * units[outer])
  corner = [at * length for at, length in zip(position, cell, strict=True)]
  ends = [min(at + length, size) for at, length, size in zip(corner, cell, info.shape, strict=True)]
  rest = tuple(slice(*bounds) for bounds in zip(corner[outer + 1 :], ends[outer + 1 :], strict=True))
  for lead in itertools.product(*(range(*b) for b in zip(corner[:outer], ends[:outer], strict=True))):
    for low in range(corner[outer], ends[outer], step):
      high = min(low + step, ends[outer])
      at = zip((*lead, low), corner, sizes, strict=False)
      yield Run(
        box=(*(slice(a, a + 1) for a in lead), slice(low, high), *rest),
        start=sum((a - first) * size for a, first, size in at),
        shape=(*(1 for _ in lead), high - low, *cell[outer + 1 :]),
      )


def copies(run: Run, data: np.ndarray, shares: Sequence[Share]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """What of a run goes where: pairs of a view of a shard's buffer and one of the run's elements.

  Args:
    run: of a cell.
    data: its elements, or memory that will hold them.
    shares: of the tensor.
  """
  for share in shares:
    factoring = share.factoring
    block = []
    for axis, bounds in zip(factoring.axes, run.box, strict=True):
      low = max(0, (bounds.start - axis.base) // axis.inner)
      block.append((low, min(axis.lead, (bounds.stop - axis.base) // axis.inner)))
    if any(low >= high for low, high in block):
      continue
    box = tuple(
      slice(axis.base + low * axis.inner, axis.base + high * axis.inner)
      for axis, (low, high) in zip(factoring.axes, block, strict=True)
    )
    within: tuple[Any, ...] = tuple(
      slice(part.start - whole.start, part.stop - whole.start)
      for part, whole in zip(box, run.box, strict=True)
    )
    part = boxes.factored(factoring, box, data[(*within, ...)])
    for view, index in boxes.overlaps(factoring, share.faces, block):
      own: tuple[Any, ...] = index
      yield view, part[(*own, ...)]


_scratch = threading.local()


def scratch(run: Run, dtype: np.dtype) -> np.ndarray:
  """Memory for a run's elements; of no other use after this thread's next call."""
  nbytes = math.prod(run.shape) * dtype.itemsize
  buffer = getattr(_scratch, "buffer", None)
  if buffer is None or buffer.nbytes < nbytes:
    buffer = _scratch.buffer = np.empty(nbytes, np.uint8)
  return buffer[:nbytes].view(dtype).reshape(run.shape)


def is_as_it_is(target: np.ndarray, source: np.ndarray, data: np.ndarray) -> bool:
  """Whether a copy is all that is wanted of a run, and its bytes are the run's."""
  same = target.dtype == source.dtype and source.nbytes == data.nbytes
  return same and target.flags.c_contiguous and source.flags.c_contiguous
