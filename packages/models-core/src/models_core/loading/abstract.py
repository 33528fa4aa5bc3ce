"""Abstract models: the structure, shapes and shardings of a model whose parameters have no values yet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from models_core.errors import ShardingError
from models_core.layers import abstract_state, dotted
from models_core.sharding import Misfit, check_mesh_of_plan, fit, named
from models_core.weights import letter_sizes


@dataclasses.dataclass(frozen=True)
class AbstractParameter:
  """A parameter of an abstract model.

  Attributes:
    name: the parameter's path, joined by dots.
    shape: shape of the whole parameter.
    dtype: the dtype that the model class declares.
    sharding: the declared sharding, as far as the mesh can hold it.
    init: kind of the initial values, a key of `models_core.layers.INITIALIZERS`.
    misfits: axes that are replicated because the mesh cannot hold their declared sharding.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  sharding: NamedSharding | SingleDeviceSharding
  init: str
  misfits: tuple[Misfit, ...]


@dataclasses.dataclass(frozen=True)
class AbstractModel:
  """A model whose parameters have no values yet.

  Attributes:
    parameters: the parameters by name, in the model's order.
    config: the configuration that it was built from.
    letters: sizes of letters in layouts that the configuration tells, as `letter_sizes` returns them.
  """

  parameters: Mapping[str, AbstractParameter]
  config: Any
  letters: Mapping[str, int]
  _graphdef: Any
  _state: Any

  def fill(self, arrays: Mapping[str, Any]) -> nnx.Module:
    """The model with the given arrays as its parameters.

    Args:
      arrays: an array for each parameter, by name; or a `jax.ShapeDtypeStruct`.
    """
    filled = [
      (path, variable.replace(arrays[dotted(path)])) for path, variable in nnx.to_flat_state(self._state)
    ]
    return nnx.merge(self._graphdef, nnx.from_flat_state(filled))


def abstract_model(
  model_class: Any, config: Any, mesh: Mesh | AbstractMesh | None = None, *, strict: bool = False
) -> AbstractModel:
  """Builds the structure of a model without allocating its parameters.

  Args:
    model_class: called as `model_class(config, rngs=...)`.
    config: the configuration that the class takes.
    mesh: with Auto or Explicit axes; None is one device. An AbstractMesh, which needs no devices, is for plans alone.
    strict: whether to raise if the mesh cannot hold the declared sharding of an axis; otherwise the axis is replicated.

  Raises:
    ShardingError: if a declared sharding contradicts itself; with `strict`, if the mesh cannot hold some of them,
      listing all of these.
    TypeError: if `mesh` is neither a mesh nor None, or a parameter of the model is not numeric, such as the key of a
      random state.
  """
  check_mesh_of_plan(mesh)
  graphdef, state = abstract_state(functools.partial(model_class, config))
  parameters = {}
  # Layers are alike: few declarations differ.
  placed: dict[tuple[Any, ...], tuple[NamedSharding | SingleDeviceSharding, tuple[Misfit, ...]]] = {}
  for path, variable in nnx.to_flat_state(state):
    metadata = variable.get_metadata()
    name, value = dotted(path), variable.get_value()
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
      raise TypeError(
        f"{name} has the dtype {value.dtype}, which is not numeric: build the model without a random state of its own"
      )
    spec = PartitionSpec(*(metadata.get("out_sharding") or ()))
    declared = (tuple(value.shape), spec, tuple(metadata.get("heads") or ()))
    try:
      sharding, misfits = placed.get(declared) or placed.setdefault(declared, _placed(*declared, mesh))
    except ShardingError as error:
      raise ShardingError(f"{name}: {error}") from None
    parameters[name] = AbstractParameter(
      name, tuple(value.shape), np.dtype(value.dtype), sharding, metadata.get("init", "normal"), misfits
    )
  if strict and (notes := misfit_notes(parameters)):
    raise ShardingError("strict_sharding: the mesh cannot hold these shardings:\n  - " + "\n  - ".join(notes))
  return AbstractModel(parameters, config, letter_sizes(config), graphdef, state)


def _placed(
  shape: tuple[int, ...],
  spec: PartitionSpec,
  heads: tuple[int | None, ...],
  mesh: Mesh | AbstractMesh | None,
) -> tuple[NamedSharding | SingleDeviceSharding, tuple[Misfit, ...]]:
  """The declared sharding of a parameter, as far as the mesh can hold it, and the axes that it cannot hold."""
  fitted, misfits = (spec, ()) if mesh is None else fit(shape, spec, mesh, heads)
  return named(mesh, fitted), misfits


def misfit_notes(parameters: Mapping[str, AbstractParameter]) -> list[str]:
  """One sentence for each reason why axes are replicated, with the axes of all parameters that it applies to.

  Layer numbers become `*`: "layers.*.w, axis 0: replicated, since 3 does not divide by tp=2 (...)".
  """
  places: dict[str, dict[str, None]] = {}
  for parameter in parameters.values():
    name = ".".join("*" if part.isdigit() else part for part in parameter.name.split("."))
    for misfit in parameter.misfits:
      why = f"replicated, since {misfit.reason} ({misfit.remedy})"
      places.setdefault(why, {})[f"{name}, axis {misfit.axis}"] = None
  return [f"{'; '.join(where)}: {why}" for why, where in places.items()]
