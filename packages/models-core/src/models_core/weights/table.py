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
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# A number in a name, such as `{i}`.
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Conversion:
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
    conversion: where the naming scheme stores other numbers.
  """

  ours: str
  forms: tuple[Form, ...]
  conversion: Conversion | None = None

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
    *rows: `(ours, checkpoint, layout)` or `(ours, checkpoint, layout, Conversion)`; with alternatives,
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

  def row_of(self, parameter: str) -> tuple[Row, dict[str, str]]:
    """The one row of a parameter and the placeholders that its name gives.

    Raises:
      TypeError: if the table has no row for it, or several.
    """
    found = [(row, at) for row in self.rows if (at := row.match(parameter)) is not None]
    if len(found) != 1:
      what = "no row" if not found else f"{len(found)} rows"
      raise TypeError(f"the weight table has {what} for the parameter {parameter}; each needs exactly one")
    return found[0]

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
    case (str(ours), str(name), str(layout), Conversion() as values):
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
  parts = PLACEHOLDER.split(name)
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
