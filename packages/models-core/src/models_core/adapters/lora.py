"""LoRA (arXiv:2106.09685): the low-rank factors of a model, and what else an adapter changes.

The factors of a parameter `w` are stored next to it, under the names that qwix and Flax use: `w_lora_a` [in, r] and
`w_lora_b` [r, out]. Which axis of `w` is in and which is out follows from its row of the weight table, since a matrix
in Hugging Face's files is [out, in].

Example: the query projection has the layout "(n h) d", so d is in, and the heads are out. For the parameter
[4096, 2048] and rank 8, `w_lora_a` is [2048, 8] and `w_lora_b` is [8, 4096]. A leading axis of experts is also in
`w_lora_a`, and in `w_lora_b` unless all experts share it.

Adapters know layers by their numbers. In a model that stacks layers, factors are stacked, too: `w_lora_a` is [L, in, r].
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models_core.errors import AdapterError
from models_core.layers import dotted, places, take_layer
from models_core.stacks import layer_names, layers_of
from models_core.weights import Form, Row, WeightTable, parse_layout

A, B = "_lora_a", "_lora_b"


@dataclasses.dataclass(frozen=True)
class Factors:
  """The two factors of one parameter's change, without the scale.

  Attributes:
    a: [experts, in, r].
    b: [experts, r, out]; without the experts if all of them share it.
    alpha: LoRA's scale alpha of these factors; None is that of the adapter.
    magnitude: DoRA's magnitudes (arXiv:2402.09353), which replace the norms of the merged parameter over those axes that
      have size 1 here, such as [out, 1]; None without DoRA.
    initial: the initialisation that took a part out of the weight that the factors belong to, a key of `INITIAL`; None
      if it left the weight as it was.
  """

  a: Any
  b: Any
  alpha: float | None = None
  magnitude: Any = None
  initial: str | None = None

  @property
  def rank(self) -> int:
    """The rank r: the size of the axis that both factors have."""
    return self.a.shape[-1]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Some rows of a parameter.

  Attributes:
    indices: of the rows.
    values: [rows, ...].
  """

  indices: Sequence[int]
  values: Any


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Changes of a model's parameters: low-rank ones, each of them `a @ b * alpha / rank`, and parameters that are replaced.

  Attributes:
    factors: the factors, by the name of the parameter that they change.
    alpha: LoRA's scale alpha, of all factors that have none of their own.
    rank: the rank of most factors.
    whole: parameters that the adapter replaces, by name.
    rows: rows that it replaces, by the name of the parameter.
    shifts: what it adds to biases, with the scale, by the name of the parameter.
    vocab_size: the number of rows of the embedding that `whole` holds, if the model has another one; otherwise None.
    unties: whether only one of embedding and head changes, which the model holds as one parameter.
  """

  factors: Mapping[str, Factors]
  alpha: float
  rank: int
  whole: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rows: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
  shifts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  vocab_size: int | None = None
  unties: bool = False

  @property
  def names(self) -> tuple[str, ...]:
    """Names of all parameters that change."""
    return tuple(dict.fromkeys([*self.factors, *self.whole, *self.rows, *self.shifts]))

  @property
  def keeps_shapes(self) -> bool:
    """Whether a model has the same configuration after the adapter was merged into it."""
    return self.vocab_size is None and not self.unties

  @property
  def alphas(self) -> dict[str, float]:
    """LoRA's scale alpha of each parameter that has factors, by name."""
    return {
      name: self.alpha if factors.alpha is None else factors.alpha for name, factors in self.factors.items()
    }

  def scale_of(self, name: str) -> float:
    """What a parameter's product of factors is multiplied by."""
    factors = self.factors[name]
    return (self.alpha if factors.alpha is None else factors.alpha) / factors.rank

  def factors_alone(self) -> Adapter:
    """The factors without what else the adapter changes: what a trainer of LoRA goes on with."""
    return Adapter(self.factors, self.alpha, self.rank)

  def without_factors(self) -> Adapter:
    """What the adapter changes besides its factors: what is merged into the base of a model that is trained on."""
    return dataclasses.replace(self, factors={})


def adapter_of(model: nnx.Module, *, alpha: float | Mapping[str, float], rank: int | None = None) -> Adapter:
  """The adapter that a model carries in its `nnx.LoRAParam`s, by the names of a model that stacks no layers.

  Args:
    model: a model to which qwix, or code of yours, added factors.
    alpha: the alpha of the training; the model does not store it. If it is not the same everywhere, that of each
      parameter by name, such as `Adapter.alphas`.
    rank: the rank that the factors must have; None accepts any.

  Raises:
    AdapterError: if there are no factors, only one of a pair exists, the ranks are not the given one, or `alpha` lacks a
      parameter.
  """
  found: dict[str, dict[str, Any]] = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
    name = dotted(path)
    side = next((side for side in (A, B) if name.endswith(side)), None)
    if side is None:
      raise AdapterError(
        f"{name} is an nnx.LoRAParam: name it after the parameter that it changes, with {A} or {B}"
      )
    for layer, (_, at) in places({name: None}).items():
      value = variable.get_value() if at is None else take_layer(variable.get_value(), at)
      found.setdefault(layer.removesuffix(side), {})[side] = value
  if not found:
    raise AdapterError("the model has no nnx.LoRAParam: apply LoRA to it first, for example with qwix")
  if alone := [f"{name}{side}" for name, sides in found.items() for side in (A, B) if side not in sides]:
    raise AdapterError(f"each LoRA parameter needs both factors, but these are missing: {', '.join(alone)}")
  own = alpha if isinstance(alpha, Mapping) else dict.fromkeys(found, alpha)
  if unknown := sorted(found.keys() - own.keys()):
    raise AdapterError(f"alpha= lacks the alpha of {_few(unknown)}: give that of each parameter with factors")
  factors = {name: Factors(sides[A], sides[B], own[name]) for name, sides in found.items()}
  ranks = {one.rank for one in factors.values()}
  if rank is not None and ranks != {rank}:
    raise AdapterError(
      f"all LoRA factors must have one rank, but they have the ranks {sorted(ranks)}, and rank={rank} is given"
    )
  return with_defaults(Adapter(factors, 0.0, 0))


def with_defaults(adapter: Adapter) -> Adapter:
  """The same adapter, whose alpha and rank are those that most factors have. Each of its factors must have an alpha."""
  if not adapter.factors:
    return adapter
  alphas = collections.Counter(adapter.alphas.values())
  ranks = collections.Counter(factors.rank for factors in adapter.factors.values())
  alpha = alphas.most_common(1)[0][0]
  factors = {
    name: dataclasses.replace(one, alpha=None) if one.alpha == alpha else one
    for name, one in adapter.factors.items()
  }
  return dataclasses.replace(adapter, factors=factors, alpha=alpha, rank=ranks.most_common(1)[0][0])


def _few(names: Sequence[str]) -> str:
  """The first names of a list, and dots for the others."""
  return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


@dataclasses.dataclass(frozen=True)
class Roles:
  """The roles of a parameter's axes in its matrix product, as strings of one letter for each axis.

  Example: the gate projections of some experts with the layout "f d -> e f d" have axes="efd", input="d", output="f"
  and experts="e"; their factors are a="edr" and b="erf". An axis of several letters has the first of them.

  Attributes:
    axes: all axes, in the parameter's order.
    input: the axis that the product contracts.
    output: the axis of the product's result.
    experts: the stacked axes, each index of which has a matrix of its own.
  """

  axes: str
  input: str
  output: str
  experts: str

  @property
  def a(self) -> str:
    """The axes of the first factor; r is the rank."""
    return self.experts + self.input + "r"

  @property
  def b(self) -> str:
    """The axes of the second factor; r is the rank."""
    return self.experts + "r" + self.output

  def b_of(self, factor: Any) -> str:
    """The axes of a given second factor, which has no axis of experts if all of them share it."""
    return self.b if factor.ndim == len(self.b) else self.b.removeprefix(self.experts)


def roles(row: Row, form: Form) -> Roles:
  """The roles of a parameter's axes.

  Args:
    row: the parameter's row of the weight table of Hugging Face's naming scheme.
    form: one of the forms of the row.

  Raises:
    AdapterError: if the parameter is not a matrix in the checkpoint; norm weights, for example, are vectors.
  """
  theirs, ours = parse_layout(form.layout)
  matrix = [[axis for axis in group if "/" not in axis] for group in theirs][-2:]
  if len(matrix) < 2 or any(group not in ours or not group[0].isalpha() for group in matrix):
    raise AdapterError(
      f"{row.ours} is not a matrix (its layout is {form.layout!r}), so LoRA cannot change it: remove it from the "
      "adapter"
    )
  (output, *_), (into, *_) = matrix
  axes = "".join(group[0] for group in ours)
  return Roles(axes, into, output, "".join(axis for axis in axes if axis not in (into, output)))


def find_row(table: WeightTable, name: str) -> tuple[Row, dict[str, str]]:
  """The row of a parameter in a weight table, and the values of the placeholders in its name.

  Raises:
    AdapterError: if the table has no row for the parameter.
  """
  for found in table.rows_of(name):
    return found
  raise AdapterError(f"the adapter changes {name}, which the model does not have")


def check_factors(
  adapter: Adapter, table: WeightTable, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, Roles]:
  """Checks that an adapter fits a model.

  Args:
    adapter: the adapter to check.
    table: weight table of Hugging Face's naming scheme.
    parameters: shapes of the model's parameters, by name.

  Returns:
    The roles of the axes of each parameter that the adapter changes, by name.

  Raises:
    AdapterError: with all parameters that the model does not have, and all factors whose shapes do not fit.
  """
  found, problems = {}, []
  for name in adapter.names:
    try:
      row, _ = find_row(table, name)
      own = roles(row, row.forms[0]) if name in adapter.factors else None
      if name not in parameters:
        raise AdapterError(f"the adapter changes {name}, which the model does not have")
      _check_shapes(adapter, name, own, tuple(parameters[name]))
      if own is not None:
        found[name] = own
    except AdapterError as error:
      problems.append(str(error))
  if problems:
    raise AdapterError("\n  - ".join(["the adapter does not fit the model:", *problems]))
  return found


def _check_shapes(adapter: Adapter, name: str, own: Roles | None, shape: tuple[int, ...]) -> None:
  """Checks that what an adapter does to one parameter has the right shapes.

  Args:
    adapter: the adapter.
    name: of the parameter.
    own: roles of the parameter's axes; None if the adapter has no factors for it.
    shape: of the parameter.

  Raises:
    AdapterError: naming the first shape that does not fit.
  """
  old = shape
  if name in adapter.whole:
    shape = tuple(adapter.whole[name].shape)
    if shape != old and shape != (adapter.vocab_size, *old[1:]):
      raise AdapterError(
        f"the adapter replaces {name} by an array of shape {shape}, but the model needs {old}"
      )
  needed: dict[str, tuple[Any, tuple[int, ...]]] = {}
  if own is not None:
    factors = adapter.factors[name]
    sizes = dict(zip(own.axes, shape, strict=True)) | {"r": _rank(factors, own, adapter.rank)}
    for side, axes, factor in ((A, own.a, factors.a), (B, own.b_of(factors.b), factors.b)):
      needed[name + side] = factor, tuple(sizes[axis] for axis in axes)
    if (magnitude := factors.magnitude) is not None and not _is_magnitude(magnitude.shape, shape):
      raise AdapterError(
        f"the magnitudes of {name} have shape {tuple(magnitude.shape)}, but {name} has shape {shape}"
      )
  if (rows := adapter.rows.get(name)) is not None:
    needed[f"rows of {name}"] = rows.values, (len(rows.indices), *shape[1:])
    if beyond := [index for index in rows.indices if not 0 <= index < shape[0]]:
      raise AdapterError(f"the adapter replaces row {beyond[0]} of {name}, which has {shape[0]} rows")
  if name in adapter.shifts:
    needed[f"the shift of {name}"] = adapter.shifts[name], shape
  for what, (array, expected) in needed.items():
    if tuple(array.shape) != expected:
      raise AdapterError(f"{what} has shape {tuple(array.shape)}, but {name} {shape} needs {expected}")


def _rank(factors: Factors, own: Roles, default: int) -> int:
  """The rank that both factors have, or the default if they do not agree."""
  a, b, axes = factors.a.shape, factors.b.shape, own.b_of(factors.b)
  return a[-1] if len(b) == len(axes) and b[axes.index("r")] == a[-1] else default


def _is_magnitude(shape: Sequence[int], of: Sequence[int]) -> bool:
  return len(shape) == len(of) and all(size in (1, full) for size, full in zip(shape, of, strict=True))


def set_adapter(lora_model: nnx.Module, adapter: Adapter) -> None:
  """Sets the LoRA factors of a model to those of an adapter, in the dtypes and shardings that the model's factors have.

  `lora_rules` says how qwix makes the factors of a model.

  Args:
    lora_model: a model whose `nnx.LoRAParam`s belong to the same parameters as the adapter's factors.
    adapter: the adapter.

  Raises:
    AdapterError: if the model and the adapter do not have the same factors, of the same shapes, or the adapter is more
      than factors; the model is unchanged.
  """
  if adapter.whole or adapter.rows or adapter.shifts:
    raise AdapterError(
      f"the adapter replaces {_few(sorted(adapter.without_factors().names))} beside its factors: merge "
      "adapter.without_factors() into the model first, then set adapter.factors_alone()"
    )
  for name, factors in adapter.factors.items():
    if (kind := "DoRA" if factors.magnitude is not None else factors.initial) is not None:
      raise AdapterError(
        f"{name}: a model with LoRA factors computes no {kind}, whose result is not the sum of a base and a product: "
        "merge the adapter into the weights"
      )
  state = nnx.to_flat_state(nnx.state(lora_model, nnx.LoRAParam))
  variables, paths = {dotted(path): v for path, v in state}, {dotted(path): path for path, _ in state}
  values = {name + A: factors.a for name, factors in adapter.factors.items()}
  values |= {name + B: factors.b for name, factors in adapter.factors.items()}
  if odd := sorted(places(variables).keys() ^ values.keys()):
    raise AdapterError(
      f"the model and the adapter must have the same factors, but only one of them has {_few(odd)}"
    )
  values = {name: _of_all_layers(name, values) for name in variables}
  for name, variable in variables.items():
    if (shape := variable.get_value().shape) != values[name].shape:
      raise AdapterError(
        f"{name} has shape {shape} in the model, but shape {tuple(values[name].shape)} in the adapter"
      )
  for name, variable in variables.items():
    old = variable.get_value()
    variable.set_value(jax.device_put(jnp.asarray(values[name], old.dtype), old.sharding))
  nnx.update(lora_model, nnx.from_flat_state([(paths[name], v) for name, v in variables.items()]))


def _of_all_layers(name: str, values: Mapping[str, Any]) -> Any:
  """The value of a factor from those of its layers, stacked if the factor is."""
  own = [values[layer] for layer in places({name: None})]
  return own[0] if layers_of(name) is None else np.stack([np.asarray(one) for one in own])


def lora_rules(adapter: Adapter, model: nnx.Module | None = None) -> list[dict[str, Any]]:
  """The rules by which qwix gives a model the factors of an adapter, for `set_adapter`.

  Example: `qwix.LoraProvider([qwix.LoraRule(**rule) for rule in lora_rules(adapter)])`.

  Args:
    adapter: the adapter.
    model: the model that is to get the factors; required if it stacks layers.

  Returns:
    A dictionary for each pair of rank and alpha: `module_path`, a regular expression of module paths such as
    "layers/(0|1)/attn/q_proj", `rank` and `alpha`.

  Raises:
    AdapterError: if layers of a stack would get different factors.
  """
  names = (
    [] if model is None else [dotted(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  )
  stacks = {layer: name for name in names for layer in layer_names(name) if layer != name}
  alphas = adapter.alphas
  kinds = {name: (factors.rank, alphas[name]) for name, factors in adapter.factors.items()}
  for stack in {stacks[name] for name in kinds if name in stacks}:
    if len({kinds.get(layer) for layer in layer_names(stack)}) > 1:
      raise AdapterError(
        f"{stack}: all layers of a stack have factors of one rank and alpha, or none, but the adapter's differ: load the "
        "model with scan_layers=False"
      )
  groups: dict[tuple[int, float], dict[str, None]] = {}
  for name, kind in kinds.items():
    path = "/".join(stacks.get(name, name).split(".")[:-1])
    groups.setdefault(kind, {})[path] = None
  return [
    {"module_path": _joined_paths(list(paths)), "rank": rank, "alpha": alpha}
    for (rank, alpha), paths in groups.items()
  ]


def _joined_paths(paths: Sequence[str]) -> str:
  """One regular expression for some paths of modules, in which layers are joined."""
  layers: dict[tuple[str, ...], list[str]] = {}
  for path in paths:
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    layers.setdefault((*parts[:at], "", *parts[at + 1 :]), []).extend(parts[at : at + 1])
  one = lambda numbers: f"({'|'.join(numbers)})" if len(numbers) > 1 else "".join(numbers)
  return "|".join(
    "/".join(part or one(numbers) for part in parts).rstrip("/") for parts, numbers in layers.items()
  )
