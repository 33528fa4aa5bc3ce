"""Any Flax NNX model from a directory of safetensors files, by a mapping of names."""

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
  """Creates a model and loads its weights, strictly: all that does not fit is one error, before data is read.

  Args:
    file_dir: directory of safetensors files.
    model_class: called as `model_class(config, rngs=...)`.
    config: for the class.
    key_mapping: a weight table, or a function of the config that returns one or a dictionary
      `regex of a tensor's name -> (parameter's name, (permutation, shape) or None)`; the regex must match
      the whole name, and the parameter's name may refer to its groups.
    mesh: of either kind; None is one device.
    preprocess_fn: dictionary of arrays by name -> dictionary of arrays by parameter name. Only with a
      dictionary: mapped names need not be parameters then. Such arrays pass through one device.
    dtype: of the loaded floating-point parameters; None keeps each as it is stored.

  Raises:
    CheckpointError: with all missing, unexpected, doubled and mis-shaped tensors.
    TypeError: if `mesh` is neither a Mesh nor None, `dtype` is no floating-point type, or a weight table comes with a
      `preprocess_fn`.
  """
  checkpoint = read_safetensors(as_files(file_dir))
  model = abstract_model(model_class, config, mesh)
  mapping = key_mapping if isinstance(key_mapping, WeightTable) else key_mapping(config)
  dtype = as_dtype(dtype)
  if isinstance(mapping, WeightTable):
    if preprocess_fn is not None:
      raise TypeError(
        "preprocess_fn works on a dictionary of names: a weight table says the same in its layouts"
      )
    return cast(M, load(plan_load(checkpoint, model, mapping, dtype=dtype)))
  mapped = _map_names(checkpoint, mapping)
  if preprocess_fn is None:
    return cast(M, load(_plan_parameters(checkpoint, model, mapped, dtype)))
  arrays = preprocess_fn(load_arrays(_plan_free(checkpoint, model, mapped, dtype)))
  return cast(M, model.fill(_fit_arrays(checkpoint, model, arrays)))


@dataclasses.dataclass(frozen=True)
class _Mapped:
  """A tensor under the name that a mapping gives it."""

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
  """Every tensor under its new name.

  Raises:
    CheckpointError: for tensors that no pattern matches or several, doubled names and impossible transforms.
  """
  patterns = [(re.compile(pattern), target) for pattern, target in mapping.items()]
  mapped: dict[str, _Mapped] = {}
  problems = list(checkpoint.problems)
  for info in checkpoint.tensors.values():
    found = [(match, target) for pattern, target in patterns if (match := pattern.fullmatch(info.name))]
    if len(found) != 1:
      what = "is unexpected: no pattern" if not found else f"is ambiguous: {len(found)} patterns"
      problems.append(f"{info.name} {info.shape} {what} of the key mapping matches it")
      continue
    match, (template, transform) = found[0]
    name = match.expand(template)
    permutation, shape = transform or (None, None)
    order = tuple(permutation) if permutation else tuple(range(len(info.shape)))
    try:
      permuted = np.broadcast_to(np.False_, info.shape).transpose(order).shape
      final = np.broadcast_to(np.False_, permuted).reshape(shape).shape if shape else permuted
    except ValueError as error:
      problems.append(f"{info.name} {info.shape} cannot take the transform {transform}: {error}")
      continue
    if name in mapped:
      problems.append(
        f"{name} is doubled: the key mapping gives it to {mapped[name].info.name} and {info.name}"
      )
    mapped[name] = _Mapped(name, final, info, order)
  if problems:
    raise CheckpointError(checkpoint.files.path, problems)
  return list(mapped.values())


def _plan_parameters(
  checkpoint: Checkpoint, model: AbstractModel, mapped: list[_Mapped], dtype: np.dtype | None
) -> LoadPlan:
  """A plan in which every mapped name is a parameter of the model."""
  by_name = {entry.name: entry for entry in mapped}
  _check(checkpoint, model, {name: (entry.shape, entry.info.name) for name, entry in by_name.items()})
  planned = [by_name[name].planned(parameter, dtype) for name, parameter in model.parameters.items()]
  return LoadPlan(checkpoint, model, tuple(planned))


def _plan_free(
  checkpoint: Checkpoint, model: AbstractModel, mapped: list[_Mapped], dtype: np.dtype | None
) -> LoadPlan:
  """A plan whose arrays lie whole on one device, under names of the mapping's own."""
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
  """Places what a preprocess function returned on the shardings of the model."""
  flat = {dotted(path): array for path, array in nnx.traversals.flatten_mapping(arrays).items()}
  _check(checkpoint, model, {name: (tuple(array.shape), "preprocess_fn") for name, array in flat.items()})
  return {name: _spread(flat[name], parameter.sharding) for name, parameter in model.parameters.items()}


def _spread(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """An array of this process onto a sharding; `device_put` to one of several processes would compare it over them."""
  if sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))


def _check(
  checkpoint: Checkpoint, model: AbstractModel, found: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
  """Compares names and shapes with the model's.

  Raises:
    CheckpointError: with all that are missing, unexpected or mis-shaped.
  """
  problems = []
  for name, parameter in model.parameters.items():
    if name not in found:
      problems.append(
        f"the parameter {name} {parameter.shape} is missing: the key mapping gives it no tensor"
      )
    elif found[name][0] != parameter.shape:
      shape, origin = found[name]
      problems.append(f"{origin} gives {name} the shape {shape}, but the parameter has {parameter.shape}")
  problems += [
    f"{origin} gives {name}, which is unexpected: the model has no such parameter"
    for name, (_, origin) in found.items()
    if name not in model.parameters
  ]
  if problems:
    raise CheckpointError(checkpoint.files.path, problems)
