"""Copies from boxes of a tensor to the shards of a parameter whose axes are arranged differently.

A box is one slice for each axis of a tensor, such as `(slice(0, 128), slice(64, 192))` of a [4096, 4096] tensor. Each
box is read once, and every shard copies its part of it.

A layout splits fused axes, selects parts of them and reorders the rest. A shard's buffer can therefore be reshaped and
transposed, without a copy, into a view whose axes are in the tensor's order. Boxes are copied to that view.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models_core.formats import Index, TensorInfo
from models_core.weights import Piece, group_axes


@dataclasses.dataclass(frozen=True)
class _Axis:
  """Where boxes may cut an axis of a tensor: after every `inner` elements from `base` on.

  Example: 4096 rows are 32 heads of 128 rows each. Boxes consist of whole heads: base=0, lead=32, inner=128. Of the
  28672 rows of a fused gate and up projection, up is the second half: base=14336, lead=14336, inner=1.

  Attributes:
    base: the first element that a box may hold.
    lead: the number of steps.
    inner: the number of elements in a step.
  """

  base: int
  lead: int
  inner: int


@dataclasses.dataclass(frozen=True)
class Factoring:
  """The axes of a tensor, split into factors such that each axis of the parameter consists of whole factors.

  Example: a query projection [32, 2048, 128] with the layout "n d h -> (n h) d" is the parameter [4096, 2048]. It has
  sizes=((32,), (2048,), (128,)), fixed=((None,), (None,), (None,)) and ours=((0, 2), (1,)). A fused gate and up projection
  [28672, 2048], of which up is the second half, "(1/2 f) d -> f d", has sizes=((2, 14336), (2048,)),
  fixed=((1, None), (None,)) and ours=((0,), (1,)).

  Attributes:
    axes: for each axis of the tensor, where boxes may cut it.
    sizes: for each axis of the tensor, the sizes of its factors.
    fixed: for each of these factors, the one position that the parameter takes, or None if it takes all of them.
    ours: for each axis of the parameter, its factors, as indices into the tensor's unfixed factors.
  """

  axes: tuple[_Axis, ...]
  sizes: tuple[tuple[int, ...], ...]
  fixed: tuple[tuple[int | None, ...], ...]
  ours: tuple[tuple[int, ...], ...]

  @property
  def free(self) -> tuple[int, ...]:
    """Sizes of the unfixed factors, in the tensor's order."""
    pairs = zip(itertools.chain(*self.sizes), itertools.chain(*self.fixed), strict=True)
    return tuple(size for size, at in pairs if at is None)


def factoring(piece: Piece, shape: Sequence[int]) -> Factoring | None:
  """Splits the axes of a tensor into factors; None if its axes and those of the parameter have no common factors.

  Args:
    piece: how the tensor fills a part of the parameter.
    shape: shape of that part.
  """
  groups = group_axes(piece.shape, piece.split)
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


def taken(piece: Piece) -> tuple[Index, Piece]:
  """The box of a tensor that holds all that a piece takes, and how that box fills the piece's part of the parameter.

  Example: of a tensor [2048, 32, 5504] that holds 32 layers along its second axis, layer 3 takes [2048, 3:4, 5504].
  """
  box, split, select = [slice(0, size) for size in piece.shape], list(piece.split), list(piece.select)
  for axis, group in enumerate(group_axes(piece.shape, piece.split) or ()):
    at = piece.select[group[0]]
    if isinstance(at, int):
      inner = piece.shape[axis] // piece.split[group[0]]
      box[axis] = slice(at * inner, (at + 1) * inner)
      split[group[0]], select[group[0]] = 1, 0
  return tuple(box), dataclasses.replace(piece, split=tuple(split), select=tuple(select))


def _common_factors(theirs: Sequence[int], ours: Sequence[int]) -> list[tuple[int, int, int]] | None:
  """The common factors of two shapes, as triples (axis of theirs, axis of ours, size); None if they have none.

  Axes of size 1 are skipped. Example: (6, 4) and (2, 3, 4) give [(0, 0, 2), (0, 1, 3), (1, 2, 4)].
  """
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
  """Where boxes may cut an axis with these factors: along its first unfixed factor."""
  base, total = 0, math.prod(sizes)
  for size, at in zip(sizes, fixed, strict=True):
    total //= size
    if at is None:
      return _Axis(base, size, total)
    base += at * total
  return _Axis(base, 1, 1)


@dataclasses.dataclass(frozen=True)
class Face:
  """The part of a tensor that a shard takes, and where it goes.

  Attributes:
    bounds: start and stop along each unfixed factor of the tensor, in the tensor's order.
    view: view of the shard's buffer, with the unfixed factors as its axes.
  """

  bounds: tuple[tuple[int, int], ...]
  view: np.ndarray


def face(factoring: Factoring, index: Index, target: np.ndarray) -> Face | None:
  """The part of a tensor that a shard takes; None if the shard's bounds cut through a factor.

  Args:
    factoring: the factors of the tensor.
    index: the elements that the shard takes of the part of the parameter that the tensor fills.
    target: the view of the shard's buffer that these elements fill.
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
  """Cuts a tensor into boxes that together hold everything that some shards take.

  Args:
    factoring: the factors of the tensor.
    info: the tensor. If it is stored in cells, boxes consist of whole cells where that is possible.
    faces: the parts that the shards take.
    most: bytes that a box should not exceed.

  Yields:
    A box, one slice for each axis, and the copies to make from it: pairs of a view of a shard's buffer and the index of
    `factored(factoring, box, data)` whose elements go there.
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
    # Elements that no shard of this process takes are not read.
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
  """The copies to make from a block: pairs of a view of a shard's buffer and an index of the `factored` block.

  Args:
    factoring: the factors of the tensor.
    faces: the parts that the shards take.
    block: start and stop along each axis of the tensor, in steps of `inner` elements from `base` on.
  """
  lead_of = leads(factoring)
  origin = {lead: low for lead, (low, _) in zip(lead_of, block, strict=True) if lead is not None}
  for face in faces:
    if (common := _meet(face, lead_of, block)) is not None:
      yield _copy(face, common, origin)


def leads(factoring: Factoring) -> list[int | None]:
  """For each axis of the tensor, the index of its first unfixed factor among all unfixed ones, or None if it has none.

  Boxes are cut along these factors.
  """
  found: list[int | None] = []
  place = 0
  for fixed in factoring.fixed:
    free = sum(at is None for at in fixed)
    found.append(place if free else None)
    place += free
  return found


def _steps(factoring: Factoring, info: TensorInfo, spans: Sequence[range], most: int) -> list[int]:
  """The number of steps of a box along each axis: whole cells if these have at most `most` bytes, otherwise fewer."""
  steps = [len(span) for span in spans]
  units = [1] * len(factoring.axes)
  if info.cell is not None:
    units = [_unit(cell, axis) for cell, axis in zip(info.cell, factoring.axes, strict=True)]
  nbytes = math.prod(axis.inner for axis in factoring.axes) * info.dtype.itemsize
  for smallest in (units, [1] * len(units)):
    for position, unit in enumerate(smallest):
      rest = nbytes * math.prod(steps[:position] + steps[position + 1 :])
      if rest * steps[position] <= most:
        return steps
      steps[position] = min(steps[position], max(unit, most // max(1, rest) // unit * unit))
  return steps


def _unit(cell: int, axis: _Axis) -> int:
  """The fewest steps along an axis that are whole cells; all of them if no fewer are."""
  if axis.base % cell or (cell % axis.inner and axis.inner % cell):
    return axis.lead
  return max(1, cell // axis.inner)


def _meet(
  face: Face, lead_of: Sequence[int | None], block: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...] | None:
  """The bounds that a face and a block have in common, along each unfixed factor; None if they are disjoint."""
  common = list(face.bounds)
  for lead, (low, high) in zip(lead_of, block, strict=True):
    if lead is not None:
      common[lead] = max(low, common[lead][0]), min(high, common[lead][1])
  return tuple(common) if all(low < high for low, high in common) else None


def _copy(face: Face, common: Sequence[tuple[int, int]], origin: dict[int, int]) -> tuple[np.ndarray, Index]:
  """The view of a shard's buffer and the index of a block's elements, for their common bounds."""
  ours: tuple[Any, ...] = tuple(
    slice(a - f, b - f) for (a, b), (f, _) in zip(common, face.bounds, strict=True)
  )
  theirs = tuple(slice(a - origin.get(n, 0), b - origin.get(n, 0)) for n, (a, b) in enumerate(common))
  # The ellipsis makes this a view even if it is a single element.
  return face.view[(*ours, ...)], theirs


def factored(factoring: Factoring, box: Index, data: np.ndarray) -> np.ndarray:
  """The elements of a box, with the unfixed factors as axes, in the tensor's order."""
  lengths: list[int] = []
  select: list[int | slice] = []
  for axis, bounds, sizes, fixed in zip(factoring.axes, box, factoring.sizes, factoring.fixed, strict=True):
    own = list(sizes)
    taken: list[int | slice] = [slice(None) if at is None else at for at in fixed]
    first = next((n for n, at in enumerate(fixed) if at is None), None)
    # The box does not extend along fixed factors that precede the first unfixed one.
    own, taken = (own[first:], taken[first:]) if first is not None else ([], [])
    if own:
      own[0] = (bounds.stop - bounds.start) // axis.inner
    lengths += own
    select += taken
  return data.reshape(lengths)[tuple(select)]
