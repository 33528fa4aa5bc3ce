"""The parameters of a model as plain arrays: LoRA factors merged, quantised parameters dequantised, one at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from models_core.adapters import Adapter, Roles, adapter_of, check_factors, merge_parameter
from models_core.errors import AdapterError, ModelsError
from models_core.layers import dotted, on_auto_axes, places, take_layer
from models_core.quantised import Quantised
from models_core.weights import WeightTable


class Source(Protocol):
  """A parameter as a plain array, which is computed when it is asked for."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the parameter."""

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the parameter."""

  def get(self) -> jax.Array:
    """The parameter."""

  def wide(self) -> jax.Array:
    """The parameter for computations in float32, without a rounding of its own."""


@dataclasses.dataclass(frozen=True)
class Plain:
  """A parameter that is an array, or that of a layer in a stack.

  Attributes:
    array: the model's own.
    at: position of the layer in the stack; None if there is no stack.
  """

  array: jax.Array
  at: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the parameter."""
    return tuple(self.array.shape[self.at is not None :])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the parameter."""
    return np.dtype(self.array.dtype)

  def get(self) -> jax.Array:
    """The model's own array; a new one for a layer in a stack."""
    return self.array if self.at is None else take_layer(self.array, self.at)

  def wide(self) -> jax.Array:
    """The same array."""
    return self.get()


@dataclasses.dataclass(frozen=True)
class Dequantised:
  """The numbers of a quantised parameter, or those of a layer in a stack.

  Attributes:
    array: the model's own.
    at: position of the layer in the stack; None if there is no stack.
  """

  array: Quantised
  at: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the parameter."""
    return tuple(self.array.qvalue.shape[self.at is not None :])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the scale, which was that of the parameter."""
    return np.dtype(self.array.scale.dtype)

  def get(self) -> jax.Array:
    """The numbers in the dtype of the scale, computed in float32 and rounded once."""
    return self._numbers(self.dtype)

  def wide(self) -> jax.Array:
    """The numbers in float32."""
    return self._numbers(np.dtype(np.float32))

  def _numbers(self, dtype: np.dtype) -> jax.Array:
    array = self.array
    parts = [array.qvalue, array.scale, array.zero_point]
    if self.at is not None:
      parts = [None if part is None else take_layer(part, self.at) for part in parts]
    assert parts[0] is not None
    return _dequantiser(parts[0].sharding, array.is_nf4, dtype)(*parts)


@dataclasses.dataclass(frozen=True)
class Merged:
  """A parameter with LoRA factors.

  Attributes:
    source: the parameter without them.
    adapter: that changes the parameter.
    name: of the parameter.
    roles: of the parameter's axes.
  """

  source: Source
  adapter: Adapter
  name: str
  roles: Roles

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the parameter."""
    return self.source.shape

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the parameter."""
    return self.source.dtype

  def get(self) -> jax.Array:
    """The sum of the parameter and its change, computed in float32 and rounded once."""
    return self.wide().astype(self.dtype)

  def wide(self) -> jax.Array:
    """The same sum; of a quantised parameter in float32."""
    return merge_parameter(self.source.wide(), self.adapter, self.name, self.roles)


def parameters_of(
  model: nnx.Module, table: WeightTable, *, alpha: float | None, rank: int | None
) -> dict[str, Source]:
  """The parameters that a model has at the moment, by name, without LoRA factors, quantisation and stacks of layers.

  Args:
    model: on any mesh.
    table: the family's weight table of Hugging Face's naming scheme.
    alpha: the alpha of the training that made the model's LoRA factors; None if there are none.
    rank: the rank that the factors must have; None accepts any.

  Raises:
    AdapterError: if the model has LoRA factors and `alpha` is not given, or the other way round, or they do not fit.
    ModelsError: if a parameter does not hold an array, or is quantised in an unknown way.
  """
  leaves: dict[tuple[Any, ...], jax.Array] = {}
  adapted = []
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    value = variable.get_value()
    if not isinstance(value, jax.Array):
      raise ModelsError(
        f"{dotted(path)} is a {type(value).__name__}, expected a jax.Array: load or initialise the weights first"
      )
    if isinstance(variable, nnx.LoRAParam):
      adapted.append(dotted(path))
    else:
      leaves[path] = value
  sources: dict[str, Source] = {}
  for path, value in leaves.items():
    if (owner := quantised_owner(path)) is None:
      sources[dotted(path)] = Plain(value)
    elif path[-1] == "qvalue":
      sources[dotted(owner)] = _quantised(model, leaves, path)
  if (found := places(sources)).keys() != sources.keys():
    sources = {
      layer: sources[name] if at is None else dataclasses.replace(sources[name], at=at)  # type: ignore[type-var]
      for layer, (name, at) in found.items()
    }
  if alpha is None and adapted:
    raise AdapterError(
      f"the model has LoRA factors, such as {adapted[0]}: give alpha=, the alpha of their training, to merge them"
    )
  if alpha is None:
    return sources
  adapter = adapter_of(model, alpha=alpha, rank=rank)
  roles = check_factors(adapter, table, {name: source.shape for name, source in sources.items()})
  return sources | {name: Merged(sources[name], adapter, name, own) for name, own in roles.items()}


def quantised_owner(path: Sequence[Any]) -> tuple[Any, ...] | None:
  """The path of the quantised parameter that a leaf belongs to; None for a leaf of any other kind.

  qwix replaces a parameter `w` by an object whose attribute `array` has `qvalue`, `scale` and perhaps `zero_point`.
  """
  if path[-1] not in ("qvalue", "scale", "zero_point"):
    return None
  return tuple(path[:-2] if path[-2] == "array" else path[:-1])


def _quantised(
  model: nnx.Module, leaves: Mapping[tuple[Any, ...], jax.Array], path: tuple[Any, ...]
) -> Dequantised:
  """The quantised parameter of a leaf `qvalue`."""
  holder: Any = model
  for part in path[:-1]:
    holder = holder[part] if isinstance(part, int) else getattr(holder, part)
  if (scale := leaves.get((*path[:-1], "scale"))) is None:
    raise ModelsError(
      f"{dotted(path)} has no scale beside it: it is quantised in an unknown way; give the model that was quantised"
    )
  is_nf4 = getattr(holder, "qtype", None) == "nf4"
  return Dequantised(Quantised(leaves[path], scale, leaves.get((*path[:-1], "zero_point")), is_nf4))


@functools.lru_cache(256)
def _dequantiser(sharding: Sharding, is_nf4: bool, dtype: np.dtype) -> Callable[..., jax.Array]:
  def run(qvalue: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    return Quantised(qvalue, scale, zero_point, is_nf4).numbers(dtype)

  return jax.jit(on_auto_axes(run, sharding), out_shardings=sharding)
