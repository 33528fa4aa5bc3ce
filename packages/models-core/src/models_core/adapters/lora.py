"""LoRA (arXiv:2106.09685): the low-rank factors of a model, and weights that they are merged into.

The factors of a parameter `w` are stored next to it, under the names that qwix and Flax use: `w_lora_a` [in, r] and
`w_lora_b` [r, out]. Which axis of `w` is in and which is out follows from its row of the weight table, since a matrix
in Hugging Face's files is [out, in].

Example: the query projection has the layout "(n h) d", so d is in, and the heads are out. For the parameter
[4096, 2048] and rank 8, `w_lora_a` is [2048, 8] and `w_lora_b` is [8, 4096]. A leading axis of experts is also in
`w_lora_a`, and in `w_lora_b` unless all experts share it.
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


@dataclasses.dataclass(frozen=True)
class Factors:
  """The two factors of one parameter's change, without the scale.

  Attributes:
    a: [experts, in, r].
    b: [experts, r, out]; without the experts if all of them share it.
  """

  a: Any
  b: Any

  @property
  def rank(self) -> int:
    """The rank r: the size of the axis that both factors have."""
    return self.a.shape[-1]


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Low-rank changes of a model's parameters, each of them `a @ b * alpha / rank`.

  Attributes:
    factors: the factors, by the name of the parameter that they change.
    alpha: LoRA's scale alpha.
    rank: the rank of all factors.
  """

  factors: Mapping[str, Factors]
  alpha: float
  rank: int


def adapter_of(model: nnx.Module, *, alpha: float, rank: int | None = None) -> Adapter:
  """The adapter that a model carries in its `nnx.LoRAParam`s.

  Args:
    model: a model to which qwix, or code of yours, added factors.
    alpha: the alpha of the training; the model does not store it.
    rank: the rank that the factors must have; None accepts any.

  Raises:
    AdapterError: if there are no factors, only one of a pair exists, or the ranks differ.
  """
  found: dict[str, dict[str, Any]] = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
    name = dotted(path)
    side = next((side for side in (A, B) if name.endswith(side)), None)
    if side is None:
      raise AdapterError(
        f"{name} is an nnx.LoRAParam: name it after the parameter that it changes, with {A} or {B}"
      )
    found.setdefault(name.removesuffix(side), {})[side] = variable.get_value()
  if not found:
    raise AdapterError("the model has no nnx.LoRAParam: apply LoRA to it first, for example with qwix")
  if alone := [f"{name}{side}" for name, sides in found.items() for side in (A, B) if side not in sides]:
    raise AdapterError(f"each LoRA parameter needs both factors, but these are missing: {', '.join(alone)}")
  factors = {name: Factors(sides[A], sides[B]) for name, sides in found.items()}
  ranks = {one.rank for one in factors.values()}
  if len(ranks | ({rank} if rank is not None else set())) > 1:
    stated = "" if rank is None else f", and rank={rank} is given"
    raise AdapterError(
      f"all LoRA factors must have one rank, but they have the ranks {sorted(ranks)}{stated}"
    )
  return Adapter(factors, alpha, ranks.pop())


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
  for row in table.rows:
    if (placeholders := row.match(name)) is not None:
      return row, placeholders
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
  for name, factors in adapter.factors.items():
    try:
      row, _ = find_row(table, name)
      found[name] = own = roles(row, row.forms[0])
      if name not in parameters:
        raise AdapterError(f"the adapter changes {name}, which the model does not have")
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
  """A compiled `w + scale * (a @ b)`, in float32 and rounded once, for all parameters of the same axes and sharding."""

  def merge(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    wide, a, b = (x.astype(jnp.float32) for x in (w, a, b))
    return (wide + scale * jnp.einsum(equation, a, b, precision="highest")).astype(w.dtype)

  return jax.jit(merge, out_shardings=sharding)


def merge_parameter(w: jax.Array, adapter: Adapter, name: str, own: Roles) -> jax.Array:
  """Merges an adapter into one parameter. The sum is computed in float32 and rounded once.

  Args:
    w: the parameter.
    adapter: an adapter that changes the parameter.
    name: name of the parameter.
    own: roles of the parameter's axes.

  Returns:
    The merged parameter, in the dtype and sharding of `w`.
  """
  factors, sharding = adapter.factors[name], w.sharding
  equation = f"{own.a},{own.b_of(factors.b)}->{own.axes}"
  # The factors may come from other meshes: replicate them on that of the parameter.
  replicated = (
    NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
  )
  a, b = (_spread(factor, replicated) for factor in (factors.a, factors.b))
  scale = np.float32(adapter.alpha / adapter.rank)
  return _merger(equation, sharding)(w, a, b, scale)


def _spread(factor: Any, replicated: jax.sharding.Sharding) -> jax.Array:
  """Copies a factor to all devices of a sharding. All processes that hold a part of the factor must call this."""
  here = not isinstance(factor, jax.Array) or factor.is_fully_addressable
  if here and replicated.is_fully_addressable:
    return jax.device_put(factor, replicated)
  values = whole(factor)
  return jax.make_array_from_callback(values.shape, replicated, values.__getitem__)


def merge_adapter(
  arrays: Mapping[str, jax.Array], adapter: Adapter, table: WeightTable
) -> dict[str, jax.Array]:
  """Merges an adapter into the arrays of a model.

  Args:
    arrays: the model's parameters by name, in any dtype and sharding.
    adapter: an adapter of the model's architecture.
    table: the family's weight table of Hugging Face's naming scheme.

  Returns:
    All arrays by name, in the dtypes and shardings of the given ones. Those that the adapter does not change are the
    same objects.

  Raises:
    AdapterError: if the adapter does not fit.
  """
  own = check_factors(adapter, table, {name: tuple(array.shape) for name, array in arrays.items()})
  return {
    name: merge_parameter(array, adapter, name, own[name]) if name in own else array
    for name, array in arrays.items()
  }


def merge_lora(
  lora_model: nnx.Module, family: Family, *, alpha: float, rank: int | None = None
) -> nnx.Module:
  """Merges the LoRA factors of a model into its weights.

  Args:
    lora_model: a model with `nnx.LoRAParam`s next to its parameters. It is not changed.
    family: family of the model.
    alpha: the alpha of the training.
    rank: the rank that the factors must have; None accepts any.

  Returns:
    A model of the family without LoRA factors, on the mesh of the given model.

  Raises:
    AdapterError: if there are no factors, or they do not fit.
  """
  return merge_into(lora_model, adapter_of(lora_model, alpha=alpha, rank=rank), family)


def merge_into(model: nnx.Module, adapter: Adapter, family: Family) -> nnx.Module:
  """Merges an adapter into the weights of a model.

  Args:
    model: the model. It is not changed; LoRA factors of its own are ignored.
    adapter: an adapter of the model's architecture, such as `load_peft_adapter` returns.
    family: family of the model.

  Returns:
    A model of the family without LoRA factors, on the mesh of the given model.

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
  """Sets the LoRA factors of a model to those of an adapter, in the dtypes and shardings that the model's factors have.

  Args:
    lora_model: a model whose `nnx.LoRAParam`s belong to the same parameters as the adapter's factors.
    adapter: the adapter.

  Raises:
    AdapterError: if the model and the adapter do not have the same factors, of the same shapes; the model is unchanged.
  """
  variables = {dotted(path): v for path, v in nnx.to_flat_state(nnx.state(lora_model, nnx.LoRAParam))}
  values = {name + A: factors.a for name, factors in adapter.factors.items()}
  values |= {name + B: factors.b for name, factors in adapter.factors.items()}
  if odd := sorted(variables.keys() ^ values.keys()):
    raise AdapterError(
      "the model and the adapter must have the same factors, but only one of them has "
      f"{', '.join(odd[:8])}{', ...' if len(odd) > 8 else ''}"
    )
  for name, variable in variables.items():
    if (shape := variable.get_value().shape) != values[name].shape:
      raise AdapterError(
        f"{name} has shape {shape} in the model, but shape {tuple(values[name].shape)} in the adapter"
      )
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
  """Writes a copy of a checkpoint with a model's LoRA factors merged into its weights.

  Sums are computed in float32 and rounded once, to the dtype of the checkpoint. Everything else is the same as in the
  checkpoint. Under several processes all must call this.

  Args:
    lora_model: a model with `nnx.LoRAParam`s next to its parameters.
    family: family of the model.
    base: directory of the safetensors checkpoint that the model was loaded from.
    save_dir: directory to write; it may be missing or empty. The write is atomic.
    rank: the rank of the training.
    alpha: the alpha of the training.

  Raises:
    AdapterError: if there are no factors, or they do not fit.
    CheckpointError: if the base is broken or of another architecture.
    SaveError: if `save_dir` is not empty, or the file system refuses the write.
  """
  adapter = adapter_of(lora_model, alpha=alpha, rank=rank)
  save_merged(base, save_dir, adapter, family, lora_model.config)  # type: ignore[attr-defined]


def save_merged(
  base: str | os.PathLike, save_dir: str | os.PathLike, adapter: Adapter, family: Family, config: Any
) -> None:
  """Writes a copy of a checkpoint with an adapter merged into its weights.

  Under several processes all must call this.

  Args:
    base: directory of a safetensors checkpoint.
    save_dir: directory to write; it may be missing or empty. The write is atomic.
    adapter: an adapter of the checkpoint's architecture.
    family: family of the model.
    config: configuration of the model.

  Raises:
    AdapterError: if the adapter does not fit.
    CheckpointError: if the base is broken or of another architecture.
    SaveError: if `save_dir` is not empty, or the file system refuses the write.
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
    )
