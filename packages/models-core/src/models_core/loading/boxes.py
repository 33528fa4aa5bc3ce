"""Tensors read as boxes: each is read once, and every shard takes its share, whatever the order of its axes.

A layout reorders axes, splits fused ones and drops parts of them. Seen from the tensor, all of that is only a view of
a shard's buffer, which a box is copied through.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models_core.formats import Index, TensorInfo
from models_core.weights import Piece


@dataclasses.dataclass(frozen=True)
class _Axis:
  """A tensor's axis, as far as boxes go: they take `inner` elements at a time, from `base` on.

  Attributes:
    base: the first element, where the axis begins with a part that is fixed.
    lead: steps from there.
    inner: elements of a step.
  """

  base: int
  lead: int
  inner: int


@dataclasses.dataclass(frozen=True)
class Factoring:
  """A tensor seen as the factors that its axes and the parameter's have in common.

  Attributes:
    axes: of the tensor.
    sizes: of the factors, fixed ones among them, in the tensor's order, of each axis.
    fixed: for each factor, the position that is taken of it, or None for all.
    ours: the parameter's factors: for each axis, their places among the tensor's unfixed factors.
  """

  axes: tuple[_Axis, ...]
  sizes: tuple[tuple[int, ...], ...]
  fixed: tuple[tuple[int | None, ...], ...]
  ours: tuple[tuple[int, ...], ...]

  @property
  def free(self) -> tuple[int, ...]:
    """Sizes of the unfixed factors in the tensor's order."""
    pairs = zip(itertools.chain(*self.sizes), itertools.chain(*self.fixed), strict=True)
    return tuple(size for size, at in pairs if at is None)


def factoring(piece: Piece, shape: Sequence[int]) -> Factoring | None:
  """The common factors of a tensor and the part of a parameter, None where they have none.

  Args:
    piece: that describes the tensor.
    shape: of the part of the parameter that it fills.
  """
  groups = _groups(piece.shape, piece.split)
  kept = [axis for axis, at in enumerate(piece.select) if isinstance(at, slice)]
  ordered = [kept[axis] for axis in piece.order]
  common = _common_factors([piece.split[axis] for axis in ordered], shape)
  if groups is None or common is None:
    return None
  of_split: dict[int, list[int]] = {axis: [] for axis in ordered}
  for factor, (theirs, _, _) in enumerate(common):
    of_split[ordered[theirs]].append(factor)
  place: dict[int, int] = {}
  sizes: list[tuple[int, ...]] = []
  fixed: list[tuple[int | None, ...]] = []
  for group in groups:
    own_sizes: list[int] = []
    own_fixed: list[int | None] = []
    for axis in group:
      at = piece.select[axis]
      if isinstance(at, int):
        own_sizes.append(piece.split[axis])
        own_fixed.append(at)
        continue
      for factor in of_split[axis]:
        place[factor] = len(place)
        own_sizes.append(common[factor][2])
        own_fixed.append(None)
    sizes.append(tuple(own_sizes))
    fixed.append(tuple(own_fixed))
  ours = tuple(
    tuple(place[factor] for factor, (_, axis, _) in enumerate(common) if axis == part)
    for part in range(len(shape))
  )
  axes = tuple(_axis(s, f) for s, f in zip(sizes, fixed, strict=True))
  return Factoring(axes, tuple(sizes), tuple(fixed), ours)


def _groups(shape: Sequence[int], split: Sequence[int]) -> list[list[int]] | None:
  """Which axes of `split` make up each axis of `shape`."""
  groups: list[list[int]] = []
  axis = 0
  for size in shape:
    group: list[int] = []
    product = 1
    while axis < len(split) and (not group or product < size):
      product *= split[axis]
      group.append(axis)
      axis += 1
    if product != size:
      return None
    groups.append(group)
  if groups:
    groups[-1] += range(axis, len(split))
  return groups if math.prod(split[axis:]) == 1 else None


def _common_factors(theirs: Sequence[int], ours: Sequence[int]) -> list[tuple[int, int, int]] | None:
  """The factors that two shapes of the same elements share: (axis of theirs, axis of ours, size), axes of 1 left out."""
  factors: list[tuple[int, int, int]] = []
  left = [(axis, size) for axis, size in enumerate(theirs) if size != 1][::-1]
  right = [(axis, size) for axis, size in enumerate(ours) if size != 1][::-1]
  while left and right:
    (a, m), (b, n) = left.pop(), right.pop()
    size = min(m, n)
    if size == 0 or m % size or n % size:
      return None
    factors.append((a, b, size))
    if m > size:
      left.append((a, m // size))
    if n > size:
      right.append((b, n // size))
  return None if left or right else factors


def _axis(sizes: Sequence[int], fixed: Sequence[int | None]) -> _Axis:
  base, total = 0, math.prod(sizes)
  for size, at in zip(sizes, fixed, strict=True):
    total //= size
    if at is None:
      return _Axis(base, size, total)
    base += at * total
  return _Axis(base, 1, 1)


@dataclasses.dataclass(frozen=True)
class Face:
  """A shard's share of a tensor.

  Attributes:
    bounds: of each unfixed factor, in the tensor's order.
    view: of the shard's buffer, with these axes.
  """

  bounds: tuple[tuple[int, int], ...]
  view: np.ndarray


def face(factoring: Factoring, index: Index, target: np.ndarray) -> Face | None:
  """A shard seen from the tensor, None where its bounds cut through factors.

  Args:
    factoring: of the tensor.
    index: the part of the parameter's part that the shard takes.
    target: the view of its buffer that gets it.
  """
  sizes = factoring.free
  bounds = [(0, size) for size in sizes]
  lengths: list[int] = []
  for part, places in zip(index, factoring.ours, strict=True):
    inner = math.prod(sizes[place] for place in places[1:])
    if not places:
      continue
    if part.start % inner or part.stop % inner:
      return None
    bounds[places[0]] = (part.start // inner, part.stop // inner)
    lengths += [(part.stop - part.start) // inner, *(sizes[place] for place in places[1:])]
  order = [place for places in factoring.ours for place in places]
  return Face(tuple(bounds), target.reshape(lengths).transpose(np.argsort(order)))


def cut(
  factoring: Factoring, info: TensorInfo, faces: Sequence[Face], most: int
) -> Iterator[tuple[Index, list[tuple[np.ndarray, Index]]]]:
  """Boxes that together hold all that some shards want, and what of each box goes where.

  Args:
    factoring: of the tensor.
    info: the tensor; boxes follow its cells.
    faces: the shards' shares.
    most: bytes that a box should not exceed.

  Yields:
    The box, one slice an axis, and pairs of a view and an index of `factored(factoring, box, data)` that goes there.
  """
  spans = [range(axis.lead) for axis in factoring.axes]
  lead_of = leads(factoring)
  for position, lead in enumerate(lead_of):
    if lead is not None:
      spans[position] = range(
        min(face.bounds[lead][0] for face in faces), max(face.bounds[lead][1] for face in faces)
      )
  steps = _steps(factoring, info, spans, most)
  starts = [
    range(span.start // step * step, span.stop, step) for span, step in zip(spans, steps, strict=True)
  ]
  for corner in itertools.product(*starts):
    block = [
      (max(low, span.start), min(low + step, span.stop))
      for low, span, step in zip(corner, spans, steps, strict=True)
    ]
    wanted = [common for face in faces if (common := _meet(face, lead_of, block)) is not None]
    if not wanted:
      continue
    # What no shard of this process wants stays unread.
    for position, lead in enumerate(lead_of):
      if lead is not None:
        block[position] = (min(c[lead][0] for c in wanted), max(c[lead][1] for c in wanted))
    box = tuple(
      slice(axis.base + low * axis.inner, axis.base + high * axis.inner)
      for axis, (low, high) in zip(factoring.axes, block, strict=True)
    )
    yield box, list(overlaps(factoring, faces, block))


def overlaps(
  factoring: Factoring, faces: Sequence[Face], block: Sequence[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, Index]]:
  """What of a block goes where: pairs of a view of a shard's buffer and an index of the block's `factored` elements.

  Args:
    factoring: of the tensor.
    faces: the shards' shares.
    block: bounds along each axis, in steps of it.
  """
  lead_of = leads(factoring)
  origin = {lead: low for lead, (low, _) in zip(lead_of, block, strict=True) if lead is not None}
  for face in faces:
    if (common := _meet(face, lead_of, block)) is not None:
      yield _copy(face, common, origin)


def leads(factoring: Factoring) -> list[int | None]:
  """For each axis of the tensor, the place of its first unfixed factor, along which its boxes are cut."""
  found: list[int | None] = []
  place = 0
  for fixed in factoring.fixed:
    free = sum(at is None for at in fixed)
    found.append(place if free else None)
    place += free
  return found


def _steps(factoring: Factoring, info: TensorInfo, spans: Sequence[range], most: int) -> list[int]:
  """Steps of a box along each axis: multiples of the tensor's cells while that is small enough, else what is."""
  steps = [len(span) for span in spans]
  units = [1] * len(factoring.axes)
  if info.cell is not None:
    units = [
      cell // axis.inner if cell % axis.inner == 0 and axis.base % cell == 0 else axis.lead
      for cell, axis in zip(info.cell, factoring.axes, strict=True)
    ]
  nbytes = math.prod(axis.inner for axis in factoring.axes) * info.dtype.itemsize
  for smallest in (units, [1] * len(units)):
    for position, unit in enumerate(smallest):
      rest = nbytes * math.prod(steps[:position] + steps[position + 1 :])
      if rest * steps[position] <= most:
        return steps
      steps[position] = min(steps[position], max(unit, most // max(1, rest) // unit * unit))
  return steps


def _meet(
  face: Face, lead_of: Sequence[int | None], block: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...] | None:
  """What a face and a block have in common."""
  common = list(face.bounds)
  for lead, (low, high) in zip(lead_of, block, strict=True):
    if lead is not None:
      common[lead] = max(low, common[lead][0]), min(high, common[lead][1])
  return tuple(common) if all(low < high for low, high in common) else None


def _copy(face: Face, common: Sequence[tuple[int, int]], origin: dict[int, int]) -> tuple[np.ndarray, Index]:
  ours: tuple[Any, ...] = tuple(
    slice(a - f, b - f) for (a, b), (f, _) in zip(common, face.bounds, strict=True)
  )
  theirs = tuple(slice(a - origin.get(n, 0), b - origin.get(n, 0)) for n, (a, b) in enumerate(common))
  # The ellipsis makes a view also of a single element.
  return face.view[(*ours, ...)], theirs


def factored(factoring: Factoring, box: Index, data: np.ndarray) -> np.ndarray:
  """A box's elements with the unfixed factors as axes, in the tensor's order."""
  lengths: list[int] = []
  select: list[int | slice] = []
  for axis, bounds, sizes, fixed in zip(factoring.axes, box, factoring.sizes, factoring.fixed, strict=True):
    own = list(sizes)
    taken: list[int | slice] = [slice(None) if at is None else at for at in fixed]
    first = next((n for n, at in enumerate(fixed) if at is None), None)
    # Fixed factors in front of the first free one lie outside the box.
    own, taken = (own[first:], taken[first:]) if first is not None else ([], [])
    if own:
      own[0] = (bounds.stop - bounds.start) // axis.inner
    lengths += own
    select += taken
  return data.reshape(lengths)[tuple(select)]
