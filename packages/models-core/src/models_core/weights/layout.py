"""Layouts: how the axes of a checkpoint's tensor become those of a parameter, and back.

A `Piece` says it of one tensor. `arrange` follows it from the tensor to the parameter, `put_back` the other way.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from models_core.weights.table import PLACEHOLDER, Conversion, Form, Row

_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")


@dataclasses.dataclass(frozen=True)
class Piece:
  """How one tensor fills a part of a parameter.

  Attributes:
    tensor: the tensor's name.
    shape: that it must have.
    split: its axes, fused ones apart.
    select: an index into `split` that drops the axes of fused tensors, a number or a full slice each.
    order: the remaining axes in the parameter's order.
    target: position along the parameter's stacked axes, a number or a full slice each.
    conversion: where the naming scheme stores other numbers.
  """

  tensor: str
  shape: tuple[int, ...]
  split: tuple[int, ...]
  select: tuple[int | slice, ...]
  order: tuple[int, ...]
  target: tuple[int | slice, ...]
  conversion: Conversion | None = None

  @property
  def run(self) -> int | None:
    """First element of the run of the tensor's elements that lies as the parameter's do; None where it is no run."""
    fused = [s for s in self.select if isinstance(s, int)]
    leading = all(isinstance(s, int) for s in self.select[: len(fused)])
    if self.conversion is not None or not leading or self.order != tuple(sorted(self.order)):
      return None
    start = 0
    for index, size in zip(fused, self.split, strict=False):
      start = start * size + index
    return start * math.prod(self.split[len(fused) :])

  def in_one_row(self) -> Piece:
    """The same run of elements as a part of one axis."""
    fused = sum(isinstance(s, int) for s in self.select)
    split = (*self.split[:fused], math.prod(self.split[fused:]))
    return dataclasses.replace(
      self, split=split, select=(*self.select[:fused], slice(None)), order=(0,), target=(slice(None),)
    )


def pieces(row: Row, form: Form, placeholders: Mapping[str, str], shape: Sequence[int]) -> list[Piece]:
  """The tensors that make up a parameter.

  Args:
    row: that matched the parameter.
    form: one of its alternatives.
    placeholders: values that the parameter's name gave.
    shape: of the parameter.

  Raises:
    ValueError: if the layout doesn't fit the parameter's shape: a fault of the table.
  """
  theirs, ours = parse_layout(form.layout)
  if len(ours) != len(shape):
    raise ValueError(
      f"the layout {form.layout!r} has {len(ours)} axes for a parameter of shape {tuple(shape)}"
    )
  sizes = _sizes(ours, shape, form.layout)
  stacked = [name for name in PLACEHOLDER.findall(form.name) if name not in placeholders]
  flat_ours = [axis for group in ours for axis in group]
  flat_theirs = [axis for group in theirs for axis in group]
  kept = [axis for axis in flat_theirs if "/" not in axis]
  if sorted(kept + stacked) != sorted(flat_ours):
    raise ValueError(f"the layout {form.layout!r} of {form.name} names different axes on its two sides")
  if any(int(axis.split("/")[0]) >= _size(axis, sizes) for axis in flat_theirs if "/" in axis):
    raise ValueError(
      f"the layout {form.layout!r} takes a part that a fused axis does not have: parts count from 0"
    )
  split = tuple(_size(axis, sizes) for axis in flat_theirs)
  select = tuple(int(axis.split("/")[0]) if "/" in axis else slice(None) for axis in flat_theirs)
  order = tuple(kept.index(axis) for axis in flat_ours if axis not in stacked)
  tensor_shape = tuple(math.prod(_size(axis, sizes) for axis in group) for group in theirs)
  result = []
  for index in np.ndindex(*(sizes[axis] for axis in stacked)):
    at = dict(zip(stacked, index, strict=True))
    target = tuple(at.get(group[0], slice(None)) for group in ours)
    name = form.name.format(**placeholders, **at)
    result.append(Piece(name, tensor_shape, split, select, order, target, row.conversion))
  return result


def parse_layout(layout: str) -> tuple[list[list[str]], list[list[str]]]:
  """The groups of axes on the checkpoint's side and on ours."""
  left, arrow, right = layout.partition("->")
  theirs, ours = _groups(left), _groups(right if arrow else left)
  return theirs, ours


def _groups(side: str) -> list[list[str]]:
  return [group.split() if group else [single] for group, single in _TOKEN.findall(side)]


def _size(axis: str, sizes: Mapping[str, int]) -> int:
  if axis.isdigit():
    return int(axis)
  if "/" in axis:
    return int(axis.split("/")[1])
  return sizes[axis]


def _sizes(ours: list[list[str]], shape: Sequence[int], layout: str) -> dict[str, int]:
  """Sizes of all letters, from the parameter's shape."""
  sizes: dict[str, int] = {}
  for group, size in zip(ours, shape, strict=True):
    letters = [axis for axis in group if not axis.isdigit()]
    known = math.prod(int(axis) for axis in group if axis.isdigit())
    if len(letters) != 1 or size % known:
      if not letters and size == known:
        continue
      raise ValueError(f"the layout {layout!r} does not split an axis of {size}")
    if sizes.setdefault(letters[0], size // known) != size // known:
      raise ValueError(f"the layout {layout!r} gives {letters[0]!r} two sizes for shape {tuple(shape)}")
  return sizes


def arrange(data: np.ndarray, piece: Piece, shape: Sequence[int]) -> np.ndarray:
  """A tensor's elements in the parameter's axis order.

  Args:
    data: of any shape, the tensor's elements in order.
    piece: that describes the tensor.
    shape: of the part of the parameter that it fills.
  """
  part = data.reshape(piece.split)[piece.select].transpose(piece.order).reshape(shape)
  return part if piece.conversion is None else piece.conversion.load(part)


def put_back(part: np.ndarray, piece: Piece, tensor: np.ndarray) -> None:
  """The inverse of `arrange`: writes a part of a parameter into its place in a tensor.

  Args:
    part: of the parameter.
    piece: that describes the tensor.
    tensor: contiguous, of `piece.shape`.
  """
  part = part if piece.conversion is None else piece.conversion.save(part)
  place = tensor.reshape(piece.split)[piece.select]
  place[...] = part.reshape([place.shape[axis] for axis in piece.order]).transpose(np.argsort(piece.order))


def part_shape(piece: Piece, shape: Sequence[int]) -> tuple[int, ...]:
  """Shape of the part of a parameter that a piece fills."""
  return tuple(size for size, at in zip(shape, piece.target, strict=True) if isinstance(at, slice))
