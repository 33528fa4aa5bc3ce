"""Loads any Flax NNX model from a directory of safetensors files, by a mapping from tensors to parameters."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models_core.dequantising import DequantisedCheckpoint, dequantised
from models_core.dtypes import as_dtype
from models_core.errors import CheckpointError
from models_core.formats import Checkpoint, Files, TensorInfo, as_files, read_safetensors
from models_core.layers import dotted
from models_core.loading import (
  AbstractModel,
  AbstractParameter,
  LoadPlan,
  PlannedParameter,
  abstract_model,
  load,
  load_arrays,
  loaded_dtype,
  plan_load,
)
from models_core.sharding import default_sharding
from models_core.weights import Piece, WeightTable

M = TypeVar("M", bound=nnx.Module)
Transform = tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None
KeyMapping = Mapping[str, tuple[str, Transform]]


def load_and_create_model(
  file_dir: str | os.PathLike | Files,
  model_class: type[M],
  config: Any,
  key_mapping: WeightTable | Callable[[Any], WeightTable | KeyMapping],
  mesh: Mesh | None = None,
  preprocess_fn: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
  dtype: Any = None,
) -> M:
  """Creates a model and loads its weights. All mismatches are reported as one error, before tensor data is read.

  Args:
    file_dir: directory of safetensors files.
    model_class: called as `model_class(config, rngs=...)`.
    config: the configuration that the class takes.
    key_mapping: a weight table, or a function of the configuration that returns a weight table or a dictionary
      `{regex of a tensor's name: (name, (permutation, shape) or None)}`. The regex must match the whole name of the
      tensor; `name` is that of the parameter and may refer to groups of the regex, such as `\\1`. The tensor is
      transposed by `permutation`, then reshaped to `shape`; either may be None.
    mesh: with Auto or Explicit axes; None is one device.
    preprocess_fn: dictionary of arrays by mapped name -> dictionary of arrays by parameter name. It works only with a
      mapping that is a dictionary, whose names need not be those of parameters then. Each array is loaded onto one
      device before it is sharded.
    dtype: dtype of the loaded floating-point parameters; None keeps the stored dtype of each.

  Returns:
    The model.

  Raises:
    CheckpointError: with all missing, unexpected, duplicate and mis-shaped tensors.
    TypeError: if `mesh` is neither a Mesh nor None, `dtype` is not a floating-point type, or `preprocess_fn` is given
      together with a weight table.
  """
  checkpoint: Checkpoint = read_safetensors(as_files(file_dir))
  model = abstract_model(model_class, config, mesh)
  mapping = key_mapping if isinstance(key_mapping, WeightTable) else key_mapping(config)
  dtype = as_dtype(dtype)
  if isinstance(mapping, WeightTable):
    if preprocess_fn is not None:
      raise TypeError(
        "preprocess_fn works only with a key mapping that is a dictionary: express the change in the layouts of the "
        "weight table instead"
      )
    return cast(M, load(plan_load(checkpoint, model, mapping, dtype=dtype)))
  checkpoint = dequantised(checkpoint, dtype=dtype)
  mapped = _map_names(checkpoint, mapping)
  if preprocess_fn is None:
    return cast(M, load(_plan_parameters(checkpoint, model, mapped, dtype)))
  arrays = preprocess_fn(load_arrays(_plan_free(checkpoint, model, mapped, dtype)))
  return cast(M, model.fill(_fit_arrays(checkpoint, model, arrays)))


@dataclasses.dataclass(frozen=True)
class _Mapped:
  """A tensor, with the name, the shape and the order of axes that a key mapping gives it."""

  name: str
  shape: tuple[int, ...]
  info: TensorInfo
  order: tuple[int, ...]

  def planned(self, parameter: AbstractParameter, dtype: np.dtype | None) -> PlannedParameter:
    everything = (slice(None),) * len(self.info.shape)
    piece = Piece(
      self.info.name,
      self.info.shape,
      self.info.shape,
      everything,
      self.order,
      (slice(None),) * len(self.shape),
    )
    return PlannedParameter(parameter, loaded_dtype([self.info.dtype], dtype), (piece,))


def _map_names(checkpoint: Checkpoint, mapping: KeyMapping) -> list[_Mapped]:
  """All tensors of a checkpoint, under the names that the key mapping gives them.

  Raises:
    CheckpointError: with all tensors that no pattern matches, or more than one, all duplicate names, and all
      transforms that do not fit their tensors.
  """
  patterns = [(re.compile(pattern), target) for pattern, target in mapping.items()]
  mapped: dict[str, _Mapped] = {}
  problems = list(checkpoint.problems)
  if isinstance(checkpoint, DequantisedCheckpoint):
    problems += checkpoint.contradictions
  for info in checkpoint.tensors.values():
    found = [(match, target) for pattern, target in patterns if (match := pattern.fullmatch(info.name))]
    if len(found) != 1:
      problem = (
        "is unexpected: no pattern of the key mapping matches it"
        if not found
        else f"is ambiguous: {len(found)} patterns of the key mapping match it, expected one"
      )
      problems.append(f"{info.name} {info.shape} {problem}")
      continue
    match, (template, transform) = found[0]
    name = match.expand(template)
    permutation, shape = transform or (None, None)
    order = tuple(permutation) if permutation else tuple(range(len(info.shape)))
    try:
      permuted = np.broadcast_to(np.False_, info.shape).transpose(order).shape
      final = np.broadcast_to(np.False_, permuted).reshape(shape).shape if shape else permuted
    except ValueError as error:
      problems.append(
        f"{info.name} {info.shape} does not fit the transform {transform} of the key mapping: {error}"
      )
      continue
    if name in mapped:
      problems.append(
        f"{name} occurs twice: the key mapping gives this name to {mapped[name].info.name} and to {info.name}"
      )
    mapped[name] = _Mapped(name, final, info, order)
  if problems:
    raise CheckpointError(checkpoint.files.path, problems)
  return list(mapped.values())


def _plan_parameters(
  checkpoint: Checkpoint, model: AbstractModel, mapped: list[_Mapped], dtype: np.dtype | None
) -> LoadPlan:
  """A plan for a mapping whose names are exactly those of the model's parameters.

  Raises:
    CheckpointError: with all missing, unexpected and mis-shaped parameters.
  """
  by_name = {entry.name: entry for entry in mapped}
  _check(checkpoint, model, {name: (entry.shape, entry.info.name) for name, entry in by_name.items()})
  planned = [by_name[name].planned(parameter, dtype) for name, parameter in model.parameters.items()]
  return LoadPlan(checkpoint, model, tuple(planned))


def _plan_free(
  checkpoint: Checkpoint, model: AbstractModel, mapped: list[_Mapped], dtype: np.dtype | None
) -> LoadPlan:
  """A plan that loads each tensor onto one device, under whatever name the mapping gives it."""
  planned = [
    entry.planned(
      AbstractParameter(entry.name, entry.shape, entry.info.dtype, default_sharding(), "normal", ()), dtype
    )
    for entry in mapped
  ]
  return LoadPlan(checkpoint, model, tuple(planned))


def _fit_arrays(
  checkpoint: Checkpoint, model: AbstractModel, arrays: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Shards the arrays that a preprocess function returned as the model's parameters are sharded.

  Raises:
    CheckpointError: with all missing, unexpected and mis-shaped parameters.
  """
  flat = {dotted(path): array for path, array in nnx.traversals.flatten_mapping(arrays).items()}
  _check(checkpoint, model, {name: (tuple(array.shape), "preprocess_fn") for name, array in flat.items()})
  return {name: _spread(flat[name], parameter.sharding) for name, parameter in model.parameters.items()}


def _spread(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """Shards an array of this process. Over several processes `device_put` is avoided: it would compare their values."""
  if sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))


def _check(
  checkpoint: Checkpoint, model: AbstractModel, found: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
  """Compares mapped names and shapes with those of the model's parameters.

  Args:
    checkpoint: where the tensors come from.
    model: the model to fill.
    found: by mapped name, the shape, and the tensor or function that it comes from.

  Raises:
    CheckpointError: with all missing, unexpected and mis-shaped parameters.
  """
  problems = []
  for name, parameter in model.parameters.items():
    if name not in found:
      problems.append(
        f"the parameter {name} {parameter.shape} is missing: the key mapping assigns no tensor to it"
      )
    elif found[name][0] != parameter.shape:
      shape, origin = found[name]
      problems.append(
        f"{origin} gives {name} the shape {shape}, but the parameter has the shape {parameter.shape}"
      )
  problems += [
    f"{origin} gives {name}, which is unexpected: the model has no parameter of this name"
    for name, (_, origin) in found.items()
    if name not in model.parameters
  ]
  if problems:
    raise CheckpointError(checkpoint.files.path, problems)
