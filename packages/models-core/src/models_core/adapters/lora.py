"""LoRA (arXiv:2106.09685): from a model's low-rank factors to merged weights.

An adapted parameter `w` lies beside its factors, as qwix and flax name them: `w_lora_a` over the axes that the product
contracts and the rank, `w_lora_b` over the rank and the output axes. Which axes are which follows from the
parameter's row of the weight table: in Hugging Face's files a matrix is [out, in], so that "(n h) d -> n h d" puts d in
and n h out. A leading axis of experts is in both factors, or in `w_lora_a` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models_core.errors import AdapterError
from models_core.family import Family
from models_core.formats import as_files, read_safetensors
from models_core.layers import dotted
from models_core.loading import abstract_model, plan_load
from models_core.saving import Base, save_parameters_to_safetensors, whole
from models_core.weights import Form, Row, WeightTable, parse_layout

A, B = "_lora_a", "_lora_b"

# What is beside the weights of a checkpoint and belongs to them in no other form.
_WEIGHTS = (
  ".safetensors",
  ".bin",
  ".pt",
  ".pth",
  ".ckpt",
  ".gguf",
  ".h5",
  ".msgpack",
  ".onnx",
  ".index.json",
)


@dataclasses.dataclass(frozen=True)
class Factors:
  """The change of one parameter, but for its scale.

  Attributes:
    a: [experts, in axes, r], in the parameter's axis order.
    b: [experts, r, out axes], with or without the experts.
  """

  a: Any
  b: Any

  @property
  def rank(self) -> int:
    """The axis r that the two share."""
    return self.a.shape[-1]


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Low-rank changes of a model's parameters: each is a @ b * alpha / rank.

  Attributes:
    factors: by the name of the parameter that they change.
    alpha: as LoRA names the scale.
    rank: of all factors.
  """

  factors: Mapping[str, Factors]
  alpha: float
  rank: int


def adapter_of(model: nnx.Module, *, alpha: float, rank: int | None = None) -> Adapter:
  """The adapter that a model carries in its `nnx.LoRAParam`s.

  Args:
    model: to which qwix, or code of yours, added factors.
    alpha: that it was trained with; no parameter holds it.
    rank: that it must have, if given.

  Raises:
    AdapterError: if there are no factors, one lacks its twin, or the ranks differ.
  """
  found: dict[str, dict[str, Any]] = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
    name = dotted(path)
    side = next((side for side in (A, B) if name.endswith(side)), None)
    if side is None:
      raise AdapterError(f"{name} is a LoRAParam, but its name ends neither with {A} nor with {B}")
    found.setdefault(name.removesuffix(side), {})[side] = variable.get_value()
  if not found:
    raise AdapterError("the model has no LoRAParam: nothing was adapted")
  if alone := [f"{name}{side}" for name, sides in found.items() for side in (A, B) if side not in sides]:
    raise AdapterError(f"factors without their twin: {', '.join(alone)} is missing")
  factors = {name: Factors(sides[A], sides[B]) for name, sides in found.items()}
  ranks = {one.rank for one in factors.values()}
  if len(ranks | ({rank} if rank is not None else set())) > 1:
    stated = "" if rank is None else f", and rank={rank} is given"
    raise AdapterError(f"one rank is expected, but the factors have {sorted(ranks)}{stated}")
  return Adapter(factors, alpha, ranks.pop())


@dataclasses.dataclass(frozen=True)
class Roles:
  """What the axes of a parameter are to its factors, one letter each.

  Attributes:
    axes: of the parameter, in its order.
    inputs: those that the product contracts, as Hugging Face flattens them.
    outputs: those of the result, as Hugging Face flattens them.
    experts: those of which each index has a matrix of its own.
  """

  axes: str
  inputs: str
  outputs: str
  experts: str

  @property
  def a(self) -> str:
    """Axes of the first factor, r being the rank."""
    return "".join(axis for axis in self.axes if axis not in self.outputs) + "r"

  @property
  def b(self) -> str:
    """Axes of the second factor."""
    return self.experts + "r" + "".join(axis for axis in self.axes if axis in self.outputs)

  def b_of(self, factor: Any) -> str:
    """Axes of a second factor that may be one for all experts."""
    return self.b if factor.ndim == len(self.b) else self.b.removeprefix(self.experts)


def roles(row: Row, form: Form) -> Roles:
  """The roles of a parameter's axes.

  Raises:
    AdapterError: if the row is no matrix in the checkpoint, such as a norm's.
  """
  theirs, ours = parse_layout(form.layout)
  groups = ["".join(axis for axis in group if "/" not in axis) for group in theirs]
  axes = "".join(axis for group in ours for axis in group)
  if len(groups) < 2 or not axes.isalpha() or any(len(group) > 1 for group in ours):
    raise AdapterError(
      f"{row.ours} is no matrix that low-rank factors could change: its layout is {form.layout!r}"
    )
  outputs, inputs = groups[-2:]
  return Roles(axes, inputs, outputs, "".join(axis for axis in axes if axis not in inputs + outputs))


def find_row(table: WeightTable, name: str) -> tuple[Row, dict[str, str]]:
  """The row of a parameter, and its placeholders.

  Raises:
    AdapterError: if there is none.
  """
  for row in table.rows:
    if (placeholders := row.match(name)) is not None:
      return row, placeholders
  raise AdapterError(f"the adapter changes {name}, which the model has not")


def check_factors(
  adapter: Adapter, table: WeightTable, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, Roles]:
  """The roles of the axes of all parameters that an adapter changes.

  Args:
    adapter: to check.
    table: of the family's Hugging Face names.
    parameters: shapes by name.

  Raises:
    AdapterError: naming every parameter that is not there, and all factors whose shapes do not fit.
  """
  found, problems = {}, []
  for name, factors in adapter.factors.items():
    try:
      row, _ = find_row(table, name)
      found[name] = own = roles(row, row.forms[0])
      if name not in parameters:
        raise AdapterError(f"the adapter changes {name}, which the model has not")
      sizes = dict(zip(own.axes, parameters[name], strict=True)) | {"r": adapter.rank}
      for side, axes, factor in ((A, own.a, factors.a), (B, own.b_of(factors.b), factors.b)):
        if tuple(factor.shape) != (shape := tuple(sizes[axis] for axis in axes)):
          raise AdapterError(
            f"{name}{side} has shape {tuple(factor.shape)}, but {name} {parameters[name]} needs {shape}"
          )
    except AdapterError as error:
      problems.append(str(error))
  if problems:
    raise AdapterError("\n  - ".join(["the adapter does not fit the model:", *problems]))
  return found


@functools.lru_cache(256)
def _merger(equation: str, sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
  """w + scale * (a @ b), in float32 and rounded once: one compilation for all parameters of a kind."""

  def merge(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    wide, a, b = (x.astype(jnp.float32) for x in (w, a, b))
    return (wide + scale * jnp.einsum(equation, a, b, precision="highest")).astype(w.dtype)

  return jax.jit(merge, out_shardings=sharding)


def merge_parameter(w: jax.Array, adapter: Adapter, name: str, own: Roles) -> jax.Array:
  """One parameter with its change, in its dtype and sharding: the sum is float32 and is rounded once."""
  factors, sharding = adapter.factors[name], w.sharding
  equation = f"{own.a},{own.b_of(factors.b)}->{own.axes}"
  # On one mesh and in one place, whatever meshes the factors come from.
  replicated = (
    NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
  )
  a, b = (_spread(factor, replicated) for factor in (factors.a, factors.b))
  scale = np.float32(adapter.alpha / adapter.rank)
  return _merger(equation, sharding)(w, a, b, scale)


def _spread(factor: Any, replicated: jax.sharding.Sharding) -> jax.Array:
  """A factor on all devices of a sharding. All processes that hold a part of it must call this."""
  here = not isinstance(factor, jax.Array) or factor.is_fully_addressable
  if here and replicated.is_fully_addressable:
    return jax.device_put(factor, replicated)
  values = whole(factor)
  return jax.make_array_from_callback(values.shape, replicated, values.__getitem__)


def merge_adapter(
  arrays: Mapping[str, jax.Array], adapter: Adapter, table: WeightTable
) -> dict[str, jax.Array]:
  """A model's arrays with an adapter merged into them.

  Args:
    arrays: by parameter name, of any dtype and sharding; the merged ones have the same.
    adapter: of the model, or read from a file.
    table: of the family's Hugging Face names.

  Raises:
    AdapterError: if it does not fit.
  """
  own = check_factors(adapter, table, {name: tuple(array.shape) for name, array in arrays.items()})
  return {
    name: merge_parameter(array, adapter, name, own[name]) if name in own else array
    for name, array in arrays.items()
  }


def merge_lora(
  lora_model: nnx.Module, family: Family, *, alpha: float, rank: int | None = None
) -> nnx.Module:
  """A plain model of the family whose weights hold what the factors of a LoRA model add.

  Args:
    lora_model: with `nnx.LoRAParam`s beside its parameters. It stays as it is.
    family: of the model.
    alpha: that it was trained with.
    rank: that it must have, if given.

  Raises:
    AdapterError: if there are no factors, or they do not fit.
  """
  return merge_into(lora_model, adapter_of(lora_model, alpha=alpha, rank=rank), family)


def merge_into(model: nnx.Module, adapter: Adapter, family: Family) -> nnx.Module:
  """A plain model of the family whose weights hold what an adapter adds, on the mesh of the given one.

  Args:
    model: stays as it is. Factors that it carries itself are left out.
    adapter: of its architecture, such as `peft_adapter.load_peft_adapter` reads.
    family: of the model.

  Raises:
    AdapterError: if the adapter does not fit.
  """
  arrays: dict[str, jax.Array] = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if not isinstance(variable, nnx.LoRAParam):
      arrays[dotted(path)] = variable.get_value()
  merged = merge_adapter(arrays, adapter, family.huggingface)
  meshes = (array.sharding.mesh for array in arrays.values() if isinstance(array.sharding, NamedSharding))
  mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)
  return abstract_model(family.model_class, model.config, mesh).fill(merged)  # type: ignore[attr-defined]


def set_adapter(lora_model: nnx.Module, adapter: Adapter) -> None:
  """Puts the numbers of an adapter into the factors that a model has already, where and as they lie.

  Raises:
    AdapterError: if the model's factors are not exactly those of the adapter. They are as they were.
  """
  variables = {dotted(path): v for path, v in nnx.to_flat_state(nnx.state(lora_model, nnx.LoRAParam))}
  values = {name + A: factors.a for name, factors in adapter.factors.items()}
  values |= {name + B: factors.b for name, factors in adapter.factors.items()}
  if odd := sorted(variables.keys() ^ values.keys()):
    raise AdapterError(
      f"only one of the model and the adapter has {', '.join(odd[:8])}{', ...' if len(odd) > 8 else ''}"
    )
  for name, variable in variables.items():
    if (shape := variable.get_value().shape) != values[name].shape:
      raise AdapterError(f"{name} has shape {shape}, in the adapter {values[name].shape}")
  for name, variable in variables.items():
    old = variable.get_value()
    variable.set_value(jax.device_put(jnp.asarray(values[name], old.dtype), old.sharding))
  nnx.update(lora_model, nnx.from_flat_state([(_path(name), v) for name, v in variables.items()]))


def _path(name: str) -> tuple[Any, ...]:
  return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def save_lora_merged(
  lora_model: nnx.Module,
  family: Family,
  base: str | os.PathLike,
  save_dir: str | os.PathLike,
  *,
  rank: int,
  alpha: float,
) -> None:
  """Writes a checkpoint with a model's LoRA factors merged into the weights of the one that it came from.

  Under several processes all must call it. The sum is float32 and is rounded once, to the checkpoint's dtype. All
  else is as the checkpoint has it.

  Args:
    lora_model: with `nnx.LoRAParam`s beside its parameters.
    family: of the model.
    base: directory of the checkpoint.
    save_dir: is missing or empty; holds the whole checkpoint afterwards, or is as it was.
    rank: that it was trained with.
    alpha: that it was trained with.

  Raises:
    AdapterError: if there are no factors, or they do not fit.
    CheckpointError: if the base is broken or of another architecture.
    SaveError: if `save_dir` holds something, or the file system refuses.
  """
  adapter = adapter_of(lora_model, alpha=alpha, rank=rank)
  save_merged(base, save_dir, adapter, family, lora_model.config)  # type: ignore[attr-defined]


def save_merged(
  base: str | os.PathLike, save_dir: str | os.PathLike, adapter: Adapter, family: Family, config: Any
) -> None:
  """Writes a checkpoint whose weights are those of another one with an adapter merged into them.

  Args:
    base: directory of a safetensors checkpoint.
    save_dir: is missing or empty.
    adapter: of its architecture.
    family: of the model.
    config: of the model.

  Raises:
    AdapterError: if the adapter does not fit.
    CheckpointError: if the base is broken or of another architecture.
    SaveError: if `save_dir` holds something, or the file system refuses.
  """
  files, table = as_files(base), family.huggingface
  plan = plan_load(read_safetensors(files), abstract_model(family.model_class, config), table)
  planned = {one.parameter.name: one for one in plan.parameters}
  own = check_factors(adapter, table, {name: one.parameter.shape for name, one in planned.items()})

  with plan.open() as opened:

    def get(name: str) -> jax.Array:
      array = opened.read(name)
      return merge_parameter(array, adapter, name, own[name]) if name in own else array

    save_parameters_to_safetensors(
      {name: jax.ShapeDtypeStruct(one.parameter.shape, one.dtype) for name, one in planned.items()},
      get,
      save_dir,
      family=family,
      config=config,
      base=Base(files, plan.checkpoint, lambda: opened.reader),
      companions=[name for name in files.names() if not name.endswith(_WEIGHTS) and name != "config.json"],
    )
