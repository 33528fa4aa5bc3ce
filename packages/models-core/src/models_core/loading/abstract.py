"""A model without numbers: shapes, fitted shardings, and the way to fill it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from models_core.errors import ShardingError
from models_core.layers import dotted, shapes_only
from models_core.sharding import Misfit, check_mesh, fit, named


@dataclasses.dataclass(frozen=True)
class AbstractParameter:
  """One parameter of a model that has no values yet.

  Attributes:
    name: its path, joined by dots.
    shape: of the whole parameter.
    dtype: that the model's own initialisation would give it.
    sharding: that the mesh can hold.
    init: which initial values suit it, a key of INITIALIZERS.
    misfits: axes that stay whole because the mesh cannot hold their spec.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  sharding: NamedSharding | SingleDeviceSharding
  init: str
  misfits: tuple[Misfit, ...]


@dataclasses.dataclass(frozen=True)
class AbstractModel:
  """A model's structure.

  Attributes:
    parameters: by name, in the model's order.
  """

  parameters: Mapping[str, AbstractParameter]
  _graphdef: Any
  _state: Any

  def fill(self, arrays: Mapping[str, jax.Array]) -> nnx.Module:
    """The model with these arrays as its parameters, one for each name."""
    filled = []
    for path, variable in nnx.to_flat_state(self._state):
      name = dotted(path)
      parameter = self.parameters[name]
      if isinstance(parameter.sharding, NamedSharding):
        # What optimizers and partitioners read: the spec that the mesh holds, not the one that was asked for.
        variable = variable.replace(out_sharding=tuple(parameter.sharding.spec))
      filled.append((path, variable.replace(arrays[name])))
    return nnx.merge(self._graphdef, nnx.from_flat_state(filled))


def abstract_model(
  model_class: Any, config: Any, mesh: Mesh | None = None, *, strict: bool = False
) -> AbstractModel:
  """Builds a model's structure without allocating a parameter.

  Args:
    model_class: called as `model_class(config, rngs=...)`.
    config: for the class.
    mesh: of either kind; None is one device.
    strict: raise where the mesh cannot hold a spec instead of replicating that axis.

  Raises:
    ShardingError: with `strict`, listing every axis that does not fit.
    TypeError: if `mesh` is neither a Mesh nor None.
  """
  check_mesh(mesh)
  # A module with annotated parameters would demand a mesh in context.
  with nnx.use_eager_sharding(False), shapes_only():
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(params=0)))
  graphdef, state = nnx.split(model)
  parameters = {}
  for path, variable in nnx.to_flat_state(state):
    metadata = variable.get_metadata()
    name, value = dotted(path), variable.get_value()
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
      raise TypeError(
        f"{name} is {value.dtype}, no array of numbers: build the model without a random state of its own"
      )
    spec = PartitionSpec(*(metadata.get("out_sharding") or ()))
    try:
      fitted, misfits = (spec, ()) if mesh is None else fit(value.shape, spec, mesh)
    except ShardingError as error:
      raise ShardingError(f"{name}: {error}") from None
    parameters[name] = AbstractParameter(
      name,
      tuple(value.shape),
      np.dtype(value.dtype),
      named(mesh, fitted),
      metadata.get("init", "normal"),
      misfits,
    )
  if strict and (notes := misfit_notes(parameters)):
    raise ShardingError(
      "strict_sharding: the mesh does not hold every sharding:\n  - " + "\n  - ".join(notes)
    )
  return AbstractModel(parameters, graphdef, state)


def misfit_notes(parameters: Mapping[str, AbstractParameter]) -> list[str]:
  """One sentence for each reason why axes stay whole, however many parameters have them."""
  places: dict[str, dict[str, None]] = {}
  for parameter in parameters.values():
    name = ".".join("*" if part.isdigit() else part for part in parameter.name.split("."))
    for misfit in parameter.misfits:
      why = f"replicated, since {misfit.reason} ({misfit.remedy})"
      places.setdefault(why, {})[f"{name}, axis {misfit.axis}"] = None
  return [f"{'; '.join(where)}: {why}" for why, where in places.items()]
