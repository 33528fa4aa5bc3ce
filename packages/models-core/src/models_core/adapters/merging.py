"""Adapters merged into weights: in memory, in a model, or from a checkpoint to a checkpoint.

What an adapter does to one parameter happens in the order in which peft applies it: the parameter is replaced, rows of
it are replaced, what the initialisation of the factors took out of it is taken out, the product of the factors is
added, and with DoRA each row is brought to its magnitude. All of this is computed in float32 and rounded once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models_core.adapters.initial import INITIAL
from models_core.adapters.lora import Adapter, Roles, adapter_of, check_factors
from models_core.adapters.vocabulary import merged_config, twins_of
from models_core.errors import AdapterError
from models_core.family import Family
from models_core.formats import as_files, read_safetensors
from models_core.layers import by_layer, dotted, stack_layers
from models_core.loading import AbstractModel, abstract_model, plan_load
from models_core.saving import Base, save_parameters_to_safetensors, whole
from models_core.sharding import fit
from models_core.stacks import layer_names, layers_of, without_stacks
from models_core.weights import WeightTable


@functools.lru_cache(256)
def _merger(
  equation: str, dtype: np.dtype, sharding: jax.sharding.Sharding, dora: bool
) -> Callable[..., jax.Array]:
  """A compiled `w + scale * (a @ b)`, in float32 and rounded once, for all parameters of the same axes and sharding."""

  def merge(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, magnitude: Any) -> jax.Array:
    wide, a, b = (x.astype(jnp.float32) for x in (w, a, b))
    wide = wide + scale * jnp.einsum(equation, a, b, precision="highest")
    if dora:
      axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
      norm = jnp.sqrt(jnp.sum(wide * wide, axis=axes, keepdims=True))
      wide = magnitude.astype(jnp.float32) / norm * wide
    return wide.astype(dtype)

  return jax.jit(merge, out_shardings=sharding)


@functools.lru_cache(64)
def _row_setter(dtype: np.dtype, sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
  """A compiled function that replaces rows of an array."""
  return jax.jit(lambda w, at, rows: w.at[at].set(rows.astype(w.dtype)).astype(dtype), out_shardings=sharding)


@functools.lru_cache(64)
def _adder(dtype: np.dtype, sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
  """A compiled sum, in float32 and rounded once."""
  return jax.jit(
    lambda w, x: (w.astype(jnp.float32) + x.astype(jnp.float32)).astype(dtype), out_shardings=sharding
  )


def merge_parameter(w: jax.Array, adapter: Adapter, name: str, own: Roles | None) -> jax.Array:
  """Merges an adapter into one parameter. The sum is computed in float32 and rounded once.

  Args:
    w: the parameter.
    adapter: an adapter that changes the parameter.
    name: name of the parameter.
    own: roles of the parameter's axes; None if the adapter has no factors for it.

  Returns:
    The merged parameter, in the dtype and, where the shape stays, in the sharding of `w`.
  """
  dtype, sharding = np.dtype(w.dtype), w.sharding
  if (replacement := adapter.whole.get(name)) is not None:
    sharding = _fitting(sharding, tuple(replacement.shape))
    w = _spread(replacement, sharding)
  # The numbers of an adapter may come from other meshes: replicate them on that of the parameter.
  everywhere = (
    NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
  )
  if (rows := adapter.rows.get(name)) is not None:
    values = _spread(rows.values, everywhere)
    w = _row_setter(np.dtype(w.dtype), sharding)(w, np.asarray(rows.indices, np.int32), values)
  if (shift := adapter.shifts.get(name)) is not None:
    w = _adder(dtype, sharding)(w, _spread(shift, everywhere))
  factors = adapter.factors.get(name)
  if factors is None or own is None:
    return w if w.dtype == dtype else jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(w)
  if factors.initial is not None:
    remainder = INITIAL[factors.initial](whole(w), factors.rank, adapter.scale_of(name))
    w = _spread(remainder, sharding)
  equation = f"{own.a},{own.b_of(factors.b)}->{own.axes}"
  a, b = (_spread(factor, everywhere) for factor in (factors.a, factors.b))
  magnitude = None if factors.magnitude is None else _spread(factors.magnitude, everywhere)
  merge = _merger(equation, dtype, sharding, magnitude is not None)
  return merge(w, a, b, np.float32(adapter.scale_of(name)), magnitude)


def _fitting(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
  """A sharding for an array of another shape: axes that the mesh cannot split are replicated."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, fit(shape, sharding.spec, sharding.mesh)[0])


def _spread(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """Copies an array to the devices of a sharding. All processes that hold a part of the array must call this."""
  here = not isinstance(array, jax.Array) or array.is_fully_addressable
  if here and sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  values = whole(array)
  return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def merge_adapter(
  arrays: Mapping[str, jax.Array], adapter: Adapter, table: WeightTable
) -> dict[str, jax.Array]:
  """Merges an adapter into the arrays of a model.

  Args:
    arrays: the model's parameters by name, in any dtype and sharding. Layers may be stacked.
    adapter: an adapter of the model's architecture.
    table: the family's weight table of Hugging Face's naming scheme.

  Returns:
    All arrays by name, in the dtypes and shardings of the given ones. Those that the adapter does not change are the
    same objects. An adapter that changes the size of the vocabulary, or one of embedding and head that were the same,
    makes the arrays of another configuration: that of `merged_config`.

  Raises:
    AdapterError: if the adapter does not fit.
  """
  if adapter.unties:
    embedding, head = twins_of(table)
    arrays = {head: arrays[embedding]} | dict(arrays) if embedding in arrays else arrays
  shapes, get = by_layer(arrays, arrays.__getitem__)
  own = check_factors(adapter, table, {name: tuple(one.shape) for name, one in shapes.items()})
  changed = set(adapter.names)

  def merged(name: str) -> jax.Array:
    array = get(name)
    return merge_parameter(array, adapter, name, own.get(name)) if name in changed else array

  result = {}
  for name, array in arrays.items():
    layers = layer_names(name)
    if changed.isdisjoint(layers):
      result[name] = array
    elif layers_of(name) is None:
      result[name] = merged(name)
    else:
      result[name] = stack_layers([merged(layer) for layer in layers], array.sharding)
  return result


def merge_lora(
  lora_model: nnx.Module, family: Family, *, alpha: float | Mapping[str, float], rank: int | None = None
) -> nnx.Module:
  """Merges the LoRA factors of a model into its weights.

  Args:
    lora_model: a model with `nnx.LoRAParam`s next to its parameters. It is not changed.
    family: family of the model.
    alpha: the alpha of the training, or that of each parameter by name.
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
    A model of the family without LoRA factors, on the mesh of the given model. Its configuration is that of the given
    model, except for the size of the vocabulary and a tied head if the adapter changes these.

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
  abstract = merged_model(model.config, adapter, family, mesh)  # type: ignore[attr-defined]
  _check_whole(merged, {name: p.shape for name, p in abstract.parameters.items()})
  return abstract.fill(merged)


def merged_model(config: Any, adapter: Adapter, family: Family, mesh: Mesh | None) -> AbstractModel:
  """The structure of the model that `merge_into` returns.

  Args:
    config: of the model that the adapter is merged into.
    adapter: an adapter of the model's architecture.
    family: family of the model.
    mesh: of the model, or None.

  Raises:
    AdapterError: if the adapter does not fit.
  """
  return abstract_model(family.model_class, merged_config(config, adapter, family), mesh)


def _check_whole(merged: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Checks that merged arrays have the shapes of the merged configuration.

  Raises:
    AdapterError: if an array that grows with the vocabulary has not grown.
  """
  for name, shape in shapes.items():
    if name not in merged or tuple(merged[name].shape) != shape:
      found = tuple(merged[name].shape) if name in merged else "no array"
      raise AdapterError(
        f"the adapter changes the size of the vocabulary, so that {name} needs shape {shape}, but it leaves it with "
        f"{found}: save the adapter with its embedding and its head (save_embedding_layers=True)"
      )


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
  files, table, config = as_files(base), family.huggingface, without_stacks(config)
  plan = plan_load(read_safetensors(files), abstract_model(family.model_class, config), table)
  planned = {one.parameter.name: one for one in plan.parameters}
  final = merged_config(config, adapter, family)
  # A head that the model had no parameter for is the embedding of the base.
  sources = {name: name for name in planned}
  if adapter.unties:
    embedding, head = twins_of(table)
    sources[head] = embedding
  shapes = {name: planned[source].parameter.shape for name, source in sources.items()}
  own = check_factors(adapter, table, shapes)
  changed = set(adapter.names)
  merged = {
    name: jax.ShapeDtypeStruct(p.shape, planned[sources[name]].dtype)
    for name, p in abstract_model(family.model_class, final).parameters.items()
  }
  _check_whole(
    {name: adapter.whole.get(name, planned[s].parameter) for name, s in sources.items()},
    {name: struct.shape for name, struct in merged.items()},
  )

  with plan.open() as opened:

    def get(name: str) -> jax.Array:
      array = opened.read(sources[name])
      return merge_parameter(array, adapter, name, own.get(name)) if name in changed else array

    save_parameters_to_safetensors(
      merged,
      get,
      save_dir,
      family=family,
      config=final,
      base=Base(files, plan.checkpoint, lambda: opened.reader),
    )
