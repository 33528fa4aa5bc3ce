"""Tensors whose cells are compressed streams: each cell is decoded once, front to back, for all shards that take it.

A cell is decoded in runs. A run is a contiguous part of the cell that is small enough for a core's cache. If a shard
takes a run verbatim, it is decoded straight into the shard's buffer; otherwise it passes through scratch memory. Even a
cell as large as a tensor needs no memory of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models_core.formats import Index, TensorInfo, aligned_empty
from models_core.loading import boxes


@dataclasses.dataclass(frozen=True)
class Share:
  """What the shards of one parameter take of a tensor.

  Attributes:
    factoring: the factors that the tensor and the parameter have in common.
    faces: the part of the tensor that each shard takes.
  """

  factoring: boxes.Factoring
  faces: tuple[boxes.Face, ...]


@dataclasses.dataclass(frozen=True)
class Run:
  """A contiguous part of a cell.

  Attributes:
    box: the box of the tensor that the run holds.
    start: first byte of the run within the decoded cell.
    shape: shape of the run; it is larger than the box if the cell extends beyond the end of the tensor.
  """

  box: Index
  start: int
  shape: tuple[int, ...]


def is_aligned(share: Share, info: TensorInfo) -> bool:
  """Whether cells end only where boxes may be cut, such as between two heads."""
  return all(
    axis.base % axis.inner == 0 and cell % axis.inner == 0
    for axis, cell in zip(share.factoring.axes, info.cell or (), strict=True)
  )


def wanted(info: TensorInfo, shares: Sequence[Share]) -> list[tuple[int, ...]]:
  """Positions in the tensor's grid of cells of those cells that some shard takes elements of, sorted."""
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
  """Start and stop of the elements that a shard takes, along each axis of the tensor."""
  for axis, lead in zip(factoring.axes, boxes.leads(factoring), strict=True):
    low, high = (0, axis.lead) if lead is None else face.bounds[lead]
    yield axis.base + low * axis.inner, axis.base + high * axis.inner


def runs(info: TensorInfo, position: Sequence[int], shares: Sequence[Share], most: int) -> Iterator[Run]:
  """The runs of a cell, front to back.

  Example: with `most` of 1 MiB, a float32 cell [256, 4096] has four runs of 64 rows each.

  Args:
    info: the tensor.
    position: position of the cell in the tensor's grid of cells.
    shares: what is taken of the tensor.
    most: bytes that a run should not exceed; a run is longer only if boxes cannot be cut that small.
  """
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
  """The copies to make from a run: pairs of a view of a shard's buffer and a view of the run's elements.

  Args:
    run: a part of a cell.
    data: the elements of the run, or memory that will hold them.
    shares: what is taken of the tensor.
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
  """Memory for the elements of a run. The next call of the same thread reuses it."""
  nbytes = math.prod(run.shape) * dtype.itemsize
  buffer = getattr(_scratch, "buffer", None)
  if buffer is None or buffer.nbytes < nbytes:
    buffer = _scratch.buffer = aligned_empty((nbytes,), np.dtype(np.uint8))
  return buffer[:nbytes].view(dtype).reshape(run.shape)


def is_as_it_is(target: np.ndarray, source: np.ndarray, data: np.ndarray) -> bool:
  """Whether a copy takes a whole run verbatim: all of its elements, in the same order and dtype."""
  same = target.dtype == source.dtype and source.nbytes == data.nbytes
  return same and target.flags.c_contiguous and source.flags.c_contiguous
