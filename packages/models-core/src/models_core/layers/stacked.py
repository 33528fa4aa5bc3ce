"""Arrays of stacked layers, seen layer by layer, by the names of a model without stacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from models_core.layers.mesh import on_auto_axes
from models_core.stacks import in_order, layer_names, layers_of


class Shaped(Protocol):
  """What has a shape and a dtype: an array, or a promise of one."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Its shape."""

  @property
  def dtype(self) -> np.dtype:
    """Its dtype."""


T = TypeVar("T", bound=Shaped)


def places(names: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
  """Where each layer's parameter is: the name of the array that holds it, and its position; None if it is no stack."""
  found: dict[str, tuple[str, int | None]] = {}
  for name in names:
    if layers_of(name) is None:
      found[name] = (name, None)
    else:
      found |= {layer: (name, at) for at, layer in enumerate(layer_names(name))}
  # Without stacks the order is that of the model.
  return found if found.keys() == names.keys() else {name: found[name] for name in in_order(found)}


def by_layer(
  parameters: Mapping[str, Shaped], get: Callable[[str], Any]
) -> tuple[Mapping[str, Shaped], Callable[[str], Any]]:
  """Parameters and a function that returns them, as if no layers were stacked.

  Args:
    parameters: shapes and dtypes by name.
    get: a parameter's name -> its array.
  """
  found = places(parameters)
  if found.keys() == parameters.keys():
    return parameters, get

  def shape_of(name: str, at: int | None) -> Shaped:
    one = parameters[name]
    return one if at is None else jax.ShapeDtypeStruct(one.shape[1:], one.dtype)

  def get_layer(layer: str) -> Any:
    name, at = found[layer]
    return get(name) if at is None else take_layer(get(name), at)

  return {layer: shape_of(*place) for layer, place in found.items()}, get_layer


def take_layer(stack: Any, at: int) -> Any:
  """The array of one layer from that of all: a view of an array of NumPy, and a new array of JAX on the same devices."""
  if not isinstance(stack, jax.Array) or isinstance(stack, jax.core.Tracer):
    return stack[at]
  return _taker(_sharding_of_layer(stack.sharding))(stack, np.int32(at))


def stack_layers(layers: Sequence[jax.Array], sharding: Sharding) -> jax.Array:
  """The array of all layers from those of each, in a sharding."""
  return _stacker(sharding)(list(layers))


def _sharding_of_layer(sharding: Sharding) -> Sharding:
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(
    sharding.mesh, PartitionSpec(*tuple(sharding.spec)[1:]), memory_kind=sharding.memory_kind
  )


@functools.lru_cache(256)
def _taker(sharding: Sharding) -> Callable[[jax.Array, np.int32], jax.Array]:
  def take(stack: jax.Array, at: jax.Array) -> jax.Array:
    # As integers: where the axis of layers is sharded, devices may add zeros, which would turn -0 into 0.
    bits = lax.dynamic_index_in_dim(
      lax.bitcast_convert_type(stack, _unsigned(stack.dtype)), at, keepdims=False
    )
    return lax.bitcast_convert_type(bits, stack.dtype)

  return jax.jit(on_auto_axes(take, sharding), out_shardings=sharding)


def _unsigned(dtype: Any) -> str:
  kind = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
  return f"uint{kind(dtype).bits}"


@functools.lru_cache(256)
def _stacker(sharding: Sharding) -> Callable[[list[jax.Array]], jax.Array]:
  return jax.jit(on_auto_axes(lambda layers: jnp.stack(layers), sharding), out_shardings=sharding)
