"""Weight tables: how the tensors of a checkpoint become the parameters of a model, as data.

A row is `(ours, checkpoint, layout)`: the name of a parameter, the name of its tensor, and the layout. Names may have
placeholders, which stand for numbers. One that both names have, such as `{i}`, is the same number in both. One that
only the tensor's name has, such as `{e}`, counts the tensors that are stacked along the axis `e` of the parameter.

A layout names axes by a letter each: "v d" if tensor and parameter have the same axes, otherwise "checkpoint -> ours":

  "n d h -> (n h) d"         two axes of the tensor are one axis of the parameter
  "(n p 2) d -> (n 2 p) d"   a number is an axis of that size
  "e (0/2 f) d -> e f d"     the parameter is the first half of a fused axis
  "f d -> e f d"             with `{e}` in the tensor's name: tensors [f, d] are stacked to a parameter [e, f, d]
  "d i/l f -> f d"           the tensor holds all l layers, and the parameter of layer `{i}` is one position of that axis

A parameter that stacks layers, such as `layers.0:24:6.attn.q_proj.w`, has the row of its layers: the tensors that `{i}`
counts, of layers 0, 6, 12 and 18, are stacked along an axis in front (`models_core.stacks`).

The sizes of letters follow from the parameter's shape. If an axis of the parameter has several letters, the sizes of n
(query heads), k (KV heads) and h (dimension of a head) come from the configuration, as l (layers) always does.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from models_core.stacks import layer_names, layers_of, name_in

# The prefix of all tensors but the head, in most naming schemes of Hugging Face: transformers' base_model_prefix.
BASE = "model."

# A number in a name, such as `{i}`.
PLACEHOLDER = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"[0-9]+")


@dataclasses.dataclass(frozen=True)
class Conversion:
  """A pair of inverse functions, for a naming scheme that stores other numbers than the model has.

  For example, GGUF files of Gemma store 1 + w for the weight w of a norm.

  Attributes:
    load: numbers of the checkpoint -> numbers of the model.
    save: numbers of the model -> numbers of the checkpoint.
  """

  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
  """One way in which a checkpoint may hold a parameter.

  Attributes:
    name: of the tensors, with placeholders.
    layout: of each tensor.
    when: whether the published checkpoint of a configuration has this form. If that is true of no form, it has the
      row's first one. It also decides between layouts of one tensor that have the same shape.
  """

  name: str
  layout: str
  when: Callable[[Any], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """A parameter, or the same parameter of all layers, and the tensors of a checkpoint that hold it.

  Attributes:
    ours: the parameter's name, with placeholders.
    forms: in which a checkpoint may hold the parameter. All tensors of one form must be there.
    conversion: of the tensors' numbers, or a function that makes it from the sizes of the letters in layouts; None if
      checkpoint and model store the same numbers.
    stack: if the parameter stacks layers, the placeholder that counts them, and their numbers.
  """

  ours: str
  forms: tuple[Form, ...]
  conversion: Conversion | Callable[[Mapping[str, int]], Conversion] | None = None
  stack: tuple[str, range] | None = None

  def match(self, name: str) -> dict[str, str] | None:
    """The values of the placeholders in a parameter's name; None if the row does not describe the parameter."""
    found = _name_pattern(self.ours).fullmatch(name)
    return found.groupdict() if found else None

  def stacked(self, name: str, layers: range) -> Row:
    """The row of a parameter that stacks some of the layers which this row describes.

    Args:
      name: of the parameter.
      layers: numbers of its layers.
    """
    part = next(at for at, one in enumerate(name.split(".")) if layers_of(one))
    letter = PLACEHOLDER.fullmatch(self.ours.split(".")[part])
    assert letter is not None, f"{self.ours} does not count the layers of {name}"
    forms = tuple(dataclasses.replace(form, layout=_in_front(letter[1], form.layout)) for form in self.forms)
    return dataclasses.replace(self, ours=name, forms=forms, stack=(letter[1], layers))

  def published(self, among: Iterable[int], config: Any) -> list[int]:
    """Those of some forms, by their indices, that the published checkpoint of a configuration has."""
    return [i for i in among if (when := self.forms[i].when) is not None and when(config)]


@dataclasses.dataclass(frozen=True)
class Ignored:
  """Tensors that a model does not need.

  Attributes:
    pattern: the tensors' name, with placeholders. A last part `**` stands for any rest, as in `opt_state.**`.
    reason: why a model does not need them.
    repeated: whether saving a model copies them from the base to the new checkpoint.
  """

  pattern: str
  reason: str
  repeated: bool = True


# What tools for quantised inference store beside plain weights, too.
CACHE_SCALE = Ignored("**", "the scale of a quantised KV cache, which is not quantised here", repeated=False)
_CACHE_SCALES = tuple(
  f".self_attn.{place}{name}_{kind}"
  for name in "qkv"
  for place in ("", f"{name}_proj.")
  for kind in ("scale", "zero_point")
)


@dataclasses.dataclass(frozen=True)
class Tied:
  """A tensor that must equal another one if the model has no parameter for it, such as a head tied to the embedding.

  Attributes:
    tensor: its name, such as `lm_head.weight`.
    twin: name of the tensor that it must equal, such as `model.embed_tokens.weight`.
  """

  tensor: str
  twin: str


class WeightTable:
  """All rows of one naming scheme.

  Args:
    *rows: `(ours, checkpoint, layout)`, `(ours, checkpoint, layout, Conversion)`, or, if there are several forms,
      `(ours, (Form, ...))`; or a Row of another table.
    ignored: tensors to leave out.
    tied: tensors that must equal another one if the model has no parameter for them.
    absence: why tensors may be missing in a checkpoint that is spelled like this, for messages; "" if nothing tells.

  Raises:
    TypeError: if a row has another structure.
  """

  def __init__(
    self, *rows: tuple | Row, ignored: Sequence[Ignored] = (), tied: Sequence[Tied] = (), absence: str = ""
  ):
    self.rows = tuple(map(_row, rows))
    self.ignored = tuple(ignored)
    self.tied = tuple(tied)
    self.absence = absence
    # By the name of what they may describe: a model has many parameters, and each has few rows.
    self._rows: dict[str, list[Row]] = {}
    for row in self.rows:
      self._rows.setdefault(_without_numbers(PLACEHOLDER.sub("0", row.ours)), []).append(row)

  def __repr__(self) -> str:
    return f"WeightTable({len(self.rows)} rows)"

  def row_of(self, parameter: str) -> tuple[Row, dict[str, str]]:
    """The row of a parameter, and the values of the placeholders in the parameter's name.

    Raises:
      TypeError: if the table has no row, or several rows, for the parameter.
    """
    found = self.rows_of(parameter)
    if len(found) != 1:
      what = "no row" if not found else f"{len(found)} rows"
      raise TypeError(
        f"the weight table has {what} for the parameter {parameter}; each parameter needs exactly one"
      )
    return found[0]

  def rows_of(self, parameter: str) -> list[tuple[Row, dict[str, str]]]:
    """All rows of a parameter, each with the values of the placeholders in the parameter's name."""
    rows = self._rows.get(_without_numbers(parameter), ())
    # A row of one parameter alone counts before one with placeholders.
    found: list[tuple[Row, dict[str, str]]] = [(row, {}) for row in rows if row.ours == parameter]
    found = found or [(row, at) for row in rows if (at := row.match(parameter)) is not None]
    if found or (layers := layers_of(parameter)) is None:
      return found
    stacks = []
    for row, at in self.rows_of(name_in(parameter, layers.start)):
      stack = row.stacked(parameter, layers)
      assert stack.stack is not None
      stacks.append((stack, {letter: value for letter, value in at.items() if letter != stack.stack[0]}))
    return stacks

  def known(self, names: Iterable[str]) -> int:
    """How many names are those of the table's tensors, to tell the naming scheme of a checkpoint."""
    patterns = {_name_pattern(form.name) for row in self.rows for form in row.forms}
    return sum(any(pattern.fullmatch(name) for pattern in patterns) for name in names)

  def respelled(self, spell: Callable[[str], str], absence: str = "") -> WeightTable:
    """The same table for a checkpoint that spells the names of its tensors otherwise.

    Args:
      spell: a name of this table, with placeholders -> the name in the checkpoint.
      absence: why tensors may be missing in such a checkpoint.
    """
    return WeightTable(
      *(
        dataclasses.replace(row, forms=tuple(dataclasses.replace(f, name=spell(f.name)) for f in row.forms))
        for row in self.rows
      ),
      ignored=[dataclasses.replace(row, pattern=spell(row.pattern)) for row in self.ignored],
      tied=[Tied(spell(tie.tensor), spell(tie.twin)) for tie in self.tied],
      absence=absence,
    )

  def spelled_as(self, names: Collection[str]) -> WeightTable:
    """This table in the spelling of a checkpoint's names: with the prefix `model.` as it is, without it, or twice.

    Transformers loads all three: a base model is saved without the prefix and without a head, and a wrapper whose
    attribute is `model` adds one.

    Args:
      names: of all tensors.
    """
    fixed = {form.name for row in self.rows for form in row.forms if "{" not in form.name}
    prefixed = [name for name in fixed if name.startswith(BASE)]
    if not prefixed or any(name in names for name in prefixed):
      return self
    bare = self.respelled(
      lambda name: name.removeprefix(BASE),
      f"the names lack the prefix {BASE!r}, as those of a base model, which is saved without its head",
    )
    twice = self.respelled(lambda name: f"{BASE}{name}")
    known = [table.known(names) for table in (self, bare, twice)]
    return (self, bare, twice)[known.index(max(known))]

  def ignores(self, tensor: str) -> Ignored | None:
    """The row of the tensors to leave out that describes a tensor; None if it is not one of them."""
    for row in self.ignored:
      if matches(row.pattern, tensor):
        return row
    return CACHE_SCALE if tensor.endswith(_CACHE_SCALES) else None

  def layer_of(self, tensor: str) -> int | None:
    """The number of the layer that a tensor belongs to, which is `{i}` in its name; None if it has no layer."""
    for form in (form for row in self.rows for form in row.forms if "{i}" in form.name):
      if found := _name_pattern(form.name).fullmatch(tensor):
        return int(found["i"])
    return None


def _row(row: tuple | Row) -> Row:
  match row:
    case Row():
      return row
    case (str(ours), str(name), str(layout)):
      return Row(ours, (Form(name, layout),))
    case (str(ours), str(name), str(layout), Conversion() as values):
      return Row(ours, (Form(name, layout),), values)
    case (str(ours), [*forms]):
      return Row(ours, tuple(forms))
  raise TypeError(
    f"a row is (ours, checkpoint, layout), (ours, checkpoint, layout, Conversion) or (ours, (Form, ...)), not {row!r}"
  )


# Tensors that a training run saves beside the model's.
TRAINING = tuple(
  Ignored(pattern, "the state of a training run", repeated=False) for pattern in ("step", "opt_state.**")
)


def own_names(shapes: Mapping[str, Sequence[int]], names: Collection[str] = ()) -> WeightTable:
  """The weight table of a checkpoint whose tensors have the names and shapes of the model's parameters.

  Layers that the model stacks are tensors of their own. A checkpoint that stacks them fills a model with the same
  stacks, or with none.

  Args:
    shapes: of the model's parameters, by name.
    names: of the checkpoint's tensors, which tell the stacks in it.
  """
  axes = {name: len(shape) - (layers_of(name) is not None) for name, shape in shapes.items()}
  layouts = {_numbers_open(layer_names(name)[0]): _letters(count) for name, count in axes.items()}
  rows = {name: Row(name, tuple(variable_forms(name, layout))) for name, layout in layouts.items()}
  stacks = {plain: name for name in names if layers_of(plain := name.removesuffix(".value")) is not None}
  for stack, tensor in stacks.items():
    layers, own = layers_of(stack), layer_names(stack)
    assert layers is not None
    if stack in axes:
      rows[stack] = Row(stack, (Form(tensor, _letters(axes[stack] + 1)),))
    for at, name in enumerate(own):
      if name in axes:
        layout = _letters(axes[name])
        rows[name] = Row(name, (Form(tensor, f"{at}/{len(layers)} {layout} -> {layout}"),))
  return WeightTable(*rows.values(), ignored=TRAINING)


def _letters(count: int) -> str:
  return " ".join(string.ascii_letters[:count])


def _in_front(letter: str, layout: str) -> str:
  """The layout of stacked tensors: "d f -> f d" becomes "d f -> i f d"."""
  theirs, arrow, ours = layout.partition("->")
  return f"{theirs.strip()} -> {letter} {(ours if arrow else theirs).strip()}"


def variable_forms(name: str, *layouts: str) -> list[Form]:
  """The forms of a tensor in the tree of a Flax state: if it is saved with its variables, names end in `.value`."""
  return [Form(one, layout) for one in (name, f"{name}.value") for layout in layouts]


def _without_numbers(name: str) -> str:
  return _NUMBER.sub("#", name)


def _numbers_open(name: str) -> str:
  """Replaces the numbers in a name by `{i}`, `{j}` and so on: `layers.3.w` -> `layers.{i}.w`."""
  letters = iter(string.ascii_lowercase[string.ascii_lowercase.index("i") :])
  return ".".join(f"{{{next(letters)}}}" if part.isdigit() else part for part in name.split("."))


@functools.cache
def _name_pattern(name: str) -> re.Pattern[str]:
  """The regular expression of a name with placeholders, for whole names."""
  parts = PLACEHOLDER.split(name)
  texts, placeholders = parts[::2], parts[1::2]
  pattern = re.escape(texts[0])
  for placeholder, text in zip(placeholders, texts[1:], strict=True):
    pattern += rf"(?P<{placeholder}>0|[1-9][0-9]*)" + re.escape(text)
  return re.compile(pattern)


def matches(pattern: str, name: str) -> bool:
  """Whether a pattern matches a whole name.

  Args:
    pattern: a name with placeholders. A last part `**` stands for any rest, as in `opt_state.**`.
    name: of a tensor.
  """
  if pattern.endswith((".**", "/**")):
    found = _name_pattern(pattern.removesuffix("**")).match(name)
    return found is not None and found.end() < len(name)
  return _name_pattern(pattern).fullmatch(name) is not None
