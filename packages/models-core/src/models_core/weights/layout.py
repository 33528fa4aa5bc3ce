"""Layouts: how the axes of a checkpoint's tensor become the axes of a parameter, and back.

A `Piece` is a layout that is resolved for one tensor and the parameter's shape. `arrange` applies it to the tensor,
`put_back` applies its inverse to the parameter. For example, with the layout "e d (1/2 f) -> e f d" a parameter
[3, 4, 5] is the second half of a fused tensor [3, 5, 8]:

  Piece(shape=(3, 5, 8), split=(3, 5, 2, 4), select=(:, :, 1, :), order=(0, 2, 1), target=(:, :, :), ...)
  parameter = tensor.reshape(split)[select].transpose(order)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from models_core.weights.table import PLACEHOLDER, Conversion, Form, Row

_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")


@dataclasses.dataclass(frozen=True)
class Piece:
  """How one tensor fills a part of a parameter.

  Attributes:
    tensor: the tensor's name.
    shape: the shape that the tensor must have.
    split: the tensor's shape, with every axis that the layout splits as several axes.
    select: index into the split tensor. A number takes one part of a fused axis, `slice(None)` keeps an axis.
    order: the remaining axes in the parameter's order.
    target: index into the parameter. A number is a position along a stacked axis, `slice(None)` an axis that the tensor
      fills.
    conversion: of the tensor's numbers; None if checkpoint and model store the same numbers.
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
    """The row-major index of the first element of the tensor that the piece takes, if its elements are a run.

    None if the elements are not contiguous in the tensor, are in another order than in the parameter, or are converted.
    For example, with the layout "(2/3 n) d -> n d" a parameter [6, 5] is the last third of a tensor [18, 5], and
    its run begins at element 60.
    """
    fused = [s for s in self.select if isinstance(s, int)]
    leading = all(isinstance(s, int) for s in self.select[: len(fused)])
    if self.conversion is not None or not leading or self.order != tuple(sorted(self.order)):
      return None
    start = 0
    for index, size in zip(fused, self.split, strict=False):
      start = start * size + index
    return start * math.prod(self.split[len(fused) :])

  def in_one_row(self) -> Piece:
    """The piece that takes the same elements, but has a single axis. The piece must be a run."""
    fused = sum(isinstance(s, int) for s in self.select)
    split = (*self.split[:fused], math.prod(self.split[fused:]))
    return dataclasses.replace(
      self, split=split, select=(*self.select[:fused], slice(None)), order=(0,), target=(slice(None),)
    )


def letter_sizes(config: Any) -> dict[str, int]:
  """The sizes of the letters n (query heads), k (KV heads), h (dimension of a head) and l (layers) in layouts.

  Args:
    config: configuration of a model; letters whose fields it does not have are left out.
  """
  fields = {"n": "num_heads", "k": "num_kv_heads", "h": "head_dim", "l": "num_layers"}
  return {
    letter: size for letter, field in fields.items() if isinstance(size := getattr(config, field, None), int)
  }


def pieces(
  row: Row,
  form: Form,
  placeholders: Mapping[str, str],
  shape: Sequence[int],
  letters: Mapping[str, int] = MappingProxyType({}),
) -> list[Piece]:
  """The pieces that make up a parameter: one, or one for each tensor that is stacked.

  Args:
    row: that describes the parameter.
    form: the one of the row's forms to resolve.
    placeholders: their values in the parameter's name, such as `{"i": "3"}`.
    shape: of the parameter.
    letters: sizes of those that share an axis of the parameter or are no axis of it, as `letter_sizes` returns them.

  Raises:
    ValueError: if the layout does not fit the parameter's shape, which is an error in the table.
  """
  counted, numbers = row.stack or ("", range(0))
  stacked = [name for name in PLACEHOLDER.findall(form.name) if name not in placeholders]
  if counted and counted not in stacked:
    stacked.insert(0, counted)
  axes = _axes(form.layout, form.name, tuple(shape), tuple(stacked), tuple(letters.items()))
  if counted and shape[0] != len(numbers):
    raise ValueError(
      f"{row.ours} has shape {tuple(shape)}, of {shape[0]} layers, but by its name it holds {len(numbers)}"
    )
  conversion = row.conversion(letters) if callable(row.conversion) else row.conversion
  result = []
  for index in itertools.product(*map(range, axes.stacked)):
    at = dict(zip(stacked, index, strict=True))
    target = tuple(at.get(group[0], slice(None)) for group in axes.ours)
    values = {**placeholders, **at} | ({counted: numbers[at[counted]]} if counted else {})
    name = form.name.format(**values)
    select = tuple(_part(axis, values) if "/" in axis else slice(None) for axis in axes.theirs)
    if any(isinstance(part, int) and part >= size for part, size in zip(select, axes.split, strict=True)):
      raise ValueError(
        f"the layout {form.layout!r} selects a part that a fused axis does not have: parts are counted from 0"
      )
    result.append(Piece(name, axes.shape, axes.split, select, axes.order, target, conversion))
  return result


class _Axes(NamedTuple):
  """A layout, resolved for parameters of one shape.

  Attributes:
    theirs: the axes of the split tensor.
    ours: the axes that make up each axis of the parameter.
    stacked: the numbers of tensors along each stacked axis.
    shape: of the tensor.
    split: as in `Piece`.
    order: as in `Piece`.
  """

  theirs: list[str]
  ours: list[list[str]]
  stacked: tuple[int, ...]
  shape: tuple[int, ...]
  split: tuple[int, ...]
  order: tuple[int, ...]


# Layers are alike: a model has a hundred times as many parameters as layouts and shapes.
@functools.lru_cache(maxsize=1024)
def _axes(
  layout: str, name: str, shape: tuple[int, ...], stacked: tuple[str, ...], given: tuple[tuple[str, int], ...]
) -> _Axes:
  """Resolves a layout.

  Args:
    layout: of the tensors.
    name: of the tensors, with placeholders, for messages.
    shape: of the parameter.
    stacked: placeholders along which tensors are stacked.
    given: sizes of letters.

  Raises:
    ValueError: if the layout does not fit the shape.
  """
  theirs, ours = _joined(*parse_layout(layout))
  if len(ours) != len(shape):
    raise ValueError(f"the layout {layout!r} has {len(ours)} axes, but the parameter has shape {shape}")
  letters = dict(given)
  sizes = {**letters, **_sizes(ours, shape, layout, letters)}
  flat_ours = [axis for group in ours for axis in group]
  flat_theirs = [axis for group in theirs for axis in group]
  kept = [axis for axis in flat_theirs if "/" not in axis]
  if sorted([*kept, *stacked]) != sorted(flat_ours):
    raise ValueError(f"the layout {layout!r} of {name} names different axes on its two sides")
  return _Axes(
    flat_theirs,
    ours,
    tuple(sizes[axis] for axis in stacked),
    tuple(math.prod(_size(axis, sizes) for axis in group) for group in theirs),
    tuple(_size(axis, sizes) for axis in flat_theirs),
    tuple(kept.index(axis) for axis in flat_ours if axis not in stacked),
  )


def _part(axis: str, values: Mapping[str, Any]) -> int:
  """The part of an axis that is taken: 1 of "1/2", and the number of the layer of "i/l"."""
  part = axis.partition("/")[0]
  return int(values.get(part, part))


def parse_layout(layout: str) -> tuple[list[list[str]], list[list[str]]]:
  """Splits a layout into groups of axes, on the checkpoint's side and on ours.

  For example, "n d h -> (n h) d" gives `[["n"], ["d"], ["h"]]` and `[["n", "h"], ["d"]]`.
  """
  left, arrow, right = layout.partition("->")
  theirs, ours = _groups(left), _groups(right if arrow else left)
  return theirs, ours


def _joined(theirs: list[list[str]], ours: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
  """Makes one axis of each group that both sides have: the parameter takes it as it is.

  For example, "(n h) d -> d (n h)" becomes "n*h d -> d n*h".
  """
  join = lambda group: ["*".join(group)] if group in theirs and group in ours else group
  return [join(group) for group in theirs], [join(group) for group in ours]


def _groups(side: str) -> list[list[str]]:
  return [group.split() if group else [single] for group, single in _TOKEN.findall(side)]


def _size(axis: str, sizes: Mapping[str, int]) -> int:
  """The size of an axis: of a letter `n`, a number `2`, or a part such as `1/2`, whose axis has size 2, or `i/l`."""
  whole = axis.rpartition("/")[2]
  return int(whole) if whole.isdigit() else sizes[whole]


def _sizes(
  ours: list[list[str]], shape: Sequence[int], layout: str, given: Mapping[str, int]
) -> dict[str, int]:
  """The sizes of all letters: from the parameter's shape and, for letters that share an axis, from `given`."""
  sizes: dict[str, int] = {}
  # Axes of one letter come first, since they decide that letter for all other axes.
  for group, size in sorted(zip(ours, shape, strict=True), key=lambda pair: len(pair[0])):
    letters = [axis for axis in group if not axis.isdigit()]
    found = sizes if len(letters) == 1 else {**given, **sizes}
    unknown = [axis for axis in letters if axis not in found]
    known = math.prod(int(axis) if axis.isdigit() else found.get(axis, 1) for axis in group)
    if len(unknown) > 1:
      raise ValueError(
        f"the layout {layout!r} does not tell the sizes of {' and '.join(unknown)}, which share an axis of size {size}: "
        "the configuration must have num_heads, num_kv_heads or head_dim, which are n, k and h"
      )
    if size % known or (not unknown and size != known):
      raise ValueError(f"the layout {layout!r} cannot split an axis of size {size} of shape {tuple(shape)}")
    sizes |= {axis: found.get(axis, size // known) for axis in letters}
  return sizes


def arrange(data: np.ndarray, piece: Piece, shape: Sequence[int]) -> np.ndarray:
  """Arranges a tensor's elements as the parameter has them.

  Args:
    data: the tensor's elements in row-major order, in any shape.
    piece: that describes the tensor.
    shape: of the part of the parameter that the tensor fills, as `part_shape` gives it.

  Returns:
    An array of this shape. It may be a view of `data`.
  """
  part = data.reshape(piece.split)[piece.select].transpose(piece.order).reshape(shape)
  return part if piece.conversion is None else piece.conversion.load(part)


def put_back(part: np.ndarray, piece: Piece, tensor: np.ndarray) -> None:
  """Writes a part of a parameter to its place in a tensor, as the inverse of `arrange`.

  Args:
    part: the part of the parameter that the tensor fills.
    piece: that describes the tensor.
    tensor: contiguous array of shape `piece.shape`, which is written to.
  """
  part = part if piece.conversion is None else piece.conversion.save(part)
  place = tensor.reshape(piece.split)[piece.select]
  place[...] = part.reshape([place.shape[axis] for axis in piece.order]).transpose(np.argsort(piece.order))


def part_shape(piece: Piece, shape: Sequence[int]) -> tuple[int, ...]:
  """The shape of the part of a parameter that a piece fills.

  For example, the tensor of one expert fills a part [F, D] of a parameter [E, F, D].

  Args:
    piece: that describes the tensor.
    shape: of the parameter.
  """
  return tuple(size for size, at in zip(shape, piece.target, strict=True) if isinstance(at, slice))


def group_axes(shape: Sequence[int], split: Sequence[int]) -> list[list[int]] | None:
  """The axes of `split` that make up each axis of `shape`; None if they do not.

  Example: (6, 5) and (2, 3, 5) give [[0, 1], [2]].
  """
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
