"""Weight tables: how the tensors of a checkpoint become the parameters of a model, as data.

A row is `(ours, checkpoint, layout)`. Names may hold placeholders: `{i}` on both sides is a number that they
share; one that only the checkpoint has, such as `{e}`, is an axis of the parameter along which tensors are
stacked. A layout names the axes, one letter each: "v d" where both sides agree, else checkpoint -> ours:

  "(n h) d -> n h d"       an axis of the checkpoint that is two of ours
  "(n p 2) d -> n (2 p) d" numerals are axes of that size
  "e (0/2 f) d -> e f d"   the first half of a fused axis
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Values:
  """A pair of inverse functions for a dialect that stores other numbers.

  Attributes:
    load: the checkpoint's numbers -> ours.
    save: ours -> the checkpoint's.
  """

  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
  """One way in which a checkpoint may hold a parameter.

  Attributes:
    name: of its tensors.
    layout: of each.
    when: whether a configuration's published checkpoint has this form, where it is not the row's first.
  """

  name: str
  layout: str
  when: Callable[[Any], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """A parameter and where a checkpoint holds it.

  Attributes:
    ours: the parameter's name.
    forms: alternatives on the checkpoint's side, of which one must be complete.
    values: where the dialect stores other numbers.
  """

  ours: str
  forms: tuple[Form, ...]
  values: Values | None = None

  def match(self, name: str) -> dict[str, str] | None:
    """The placeholders' values if the row is about this parameter."""
    found = _name_pattern(self.ours).fullmatch(name)
    return found.groupdict() if found else None


@dataclasses.dataclass(frozen=True)
class Ignored:
  """Tensors that a model does not need.

  Attributes:
    pattern: a name with placeholders; matches as a whole. A last part `**`, behind a `.` or `/`, stands for any rest.
    reason: why they can be left out.
    repeated: whether a checkpoint that is saved anew holds them, too.
  """

  pattern: str
  reason: str
  repeated: bool = True


@dataclasses.dataclass(frozen=True)
class Tied:
  """A tensor that must equal another one where the model has no parameter for it, such as a tied head."""

  tensor: str
  twin: str


class WeightTable:
  """All rows of a dialect.

  Args:
    *rows: `(ours, checkpoint, layout)` or `(ours, checkpoint, layout, Values)`; with alternatives,
      `(ours, (Form, ...))`.
    ignored: tensors to leave out.
    tied: tensors that must repeat another one where they are not parameters.
  """

  def __init__(self, *rows: tuple, ignored: Sequence[Ignored] = (), tied: Sequence[Tied] = ()):
    self.rows = tuple(map(_row, rows))
    self.ignored = tuple(ignored)
    self.tied = tuple(tied)

  def __repr__(self) -> str:
    return f"WeightTable({len(self.rows)} rows)"

  def layer_of(self, tensor: str) -> int | None:
    """The number of the layer that a tensor belongs to by some row; None where it is of no layer."""
    for form in (form for row in self.rows for form in row.forms if "{i}" in form.name):
      if found := _name_pattern(form.name).fullmatch(tensor):
        return int(found["i"])
    return None


def _row(row: tuple) -> Row:
  match row:
    case (str(ours), str(name), str(layout)):
      return Row(ours, (Form(name, layout),))
    case (str(ours), str(name), str(layout), Values() as values):
      return Row(ours, (Form(name, layout),), values)
    case (str(ours), [*forms]):
      return Row(ours, tuple(forms))
  raise TypeError(f"a row is (ours, checkpoint, layout) or (ours, (Form, ...)), not {row!r}")


# What a training run saves beside a model.
TRAINING = tuple(
  Ignored(pattern, "the state of a training run", repeated=False) for pattern in ("step", "opt_state.**")
)


def own_names(shapes: Mapping[str, Sequence[int]]) -> WeightTable:
  """The table of a checkpoint that holds parameters as the model does: by their names, in their shapes.

  Args:
    shapes: of the model's parameters, by name.
  """
  layouts = {_numbers_open(name): " ".join(string.ascii_letters[: len(s)]) for name, s in shapes.items()}
  # Flax adds a key where a state is saved with its variables.
  rows = [(name, [Form(name, layout), Form(f"{name}.value", layout)]) for name, layout in layouts.items()]
  return WeightTable(*rows, ignored=TRAINING)


def _numbers_open(name: str) -> str:
  """`layers.3.mlp.up_proj.w` -> `layers.{i}.mlp.up_proj.w`, `{j}` for a second number and so on."""
  letters = iter(string.ascii_lowercase[string.ascii_lowercase.index("i") :])
  return ".".join(f"{{{next(letters)}}}" if part.isdigit() else part for part in name.split("."))


@functools.cache
def _name_pattern(name: str) -> re.Pattern[str]:
  """A name with placeholders as a pattern of whole names."""
  parts = _PLACEHOLDER.split(name)
  texts, placeholders = parts[::2], parts[1::2]
  pattern = re.escape(texts[0])
  for placeholder, text in zip(placeholders, texts[1:], strict=True):
    pattern += rf"(?P<{placeholder}>0|[1-9][0-9]*)" + re.escape(text)
  return re.compile(pattern)


def matches(pattern: str, name: str) -> bool:
  """Whether a name with placeholders stands for this name, as a whole; with a last part `**`, for all below it."""
  if pattern.endswith((".**", "/**")):
    found = _name_pattern(pattern.removesuffix("**")).match(name)
    return found is not None and found.end() < len(name)
  return _name_pattern(pattern).fullmatch(name) is not None


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
    values: where the dialect stores other numbers.
  """

  tensor: str
  shape: tuple[int, ...]
  split: tuple[int, ...]
  select: tuple[int | slice, ...]
  order: tuple[int, ...]
  target: tuple[int | slice, ...]
  values: Values | None = None

  @property
  def run(self) -> int | None:
    """First element of the run of the tensor's elements that lies as the parameter's do; None where it is no run."""
    fused = [s for s in self.select if isinstance(s, int)]
    leading = all(isinstance(s, int) for s in self.select[: len(fused)])
    if self.values is not None or not leading or self.order != tuple(sorted(self.order)):
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
  stacked = [name for name in _PLACEHOLDER.findall(form.name) if name not in placeholders]
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
    result.append(Piece(name, tensor_shape, split, select, order, target, row.values))
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
  return part if piece.values is None else piece.values.load(part)


def put_back(part: np.ndarray, piece: Piece, tensor: np.ndarray) -> None:
  """The inverse of `arrange`: writes a part of a parameter into its place in a tensor.

  Args:
    part: of the parameter.
    piece: that describes the tensor.
    tensor: contiguous, of `piece.shape`.
  """
  part = part if piece.values is None else piece.values.save(part)
  place = tensor.reshape(piece.split)[piece.select]
  place[...] = part.reshape([place.shape[axis] for axis in piece.order]).transpose(np.argsort(piece.order))


def part_shape(piece: Piece, shape: Sequence[int]) -> tuple[int, ...]:
  """Shape of the part of a parameter that a piece fills."""
  return tuple(size for size, at in zip(shape, piece.target, strict=True) if isinstance(at, slice))
