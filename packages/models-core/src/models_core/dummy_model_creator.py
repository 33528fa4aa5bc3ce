"""Models with random weights, for tests, benchmarks and training from scratch."""

from __future__ import annotations

import collections
import functools
import zlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from models_core.dtypes import as_dtype
from models_core.layers import INITIALIZERS, SCALE, explicit_axes
from models_core.loading import AbstractParameter, abstract_model

M = TypeVar("M", bound=nnx.Module)


def create_dummy_model(
  model_class: type[M],
  config: Any,
  mesh: Mesh | None = None,
  dtype: Any = None,
  random_seed: int = 0,
  scale: float = SCALE,
) -> M:
  """Creates a model with random parameters, each device making its own shards.

  Norms are ones (or what their module calls neutral), biases and integers zero, all else normal. A parameter's values
  depend on the seed and its name: they are the same on every mesh, and in every dtype but for rounding.

  Args:
    model_class: called as `model_class(config, rngs=...)`.
    config: for the class.
    mesh: of either kind; None is one device.
    dtype: of the floating-point parameters; None keeps what the class declares.
    random_seed: of the values.
    scale: standard deviation of the random ones.

  Raises:
    TypeError: if `mesh` is neither a Mesh nor None, or `dtype` is no floating-point type.
  """
  dtype = as_dtype(dtype)
  model = abstract_model(model_class, config, mesh)
  groups: dict[Any, list[AbstractParameter]] = collections.defaultdict(list)
  for parameter in model.parameters.values():
    floating = jax.numpy.issubdtype(parameter.dtype, jax.numpy.floating)
    kind = dtype if dtype is not None and floating else parameter.dtype
    init = parameter.init if floating else "zeros"
    groups[parameter.shape, kind, parameter.sharding, init].append(parameter)
  seed = jax.random.key(random_seed)
  arrays = {}
  for kind, members in groups.items():
    make = _maker(*kind)
    for parameter in members:
      arrays[parameter.name] = make(seed, np.uint32(zlib.crc32(parameter.name.encode())), np.float32(scale))
  return cast(M, model.fill(arrays))


@functools.lru_cache(256)
def _maker(
  shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding, init: str
) -> Callable[..., jax.Array]:
  """One compilation for all parameters of a kind, whatever the number of layers and of models."""

  def make(seed: jax.Array, name: jax.Array, scale: jax.Array) -> jax.Array:
    return INITIALIZERS[init](jax.random.fold_in(seed, name), shape, dtype, scale)

  if isinstance(sharding, NamedSharding) and (axes := explicit_axes(sharding.mesh)):
    # With such a mesh in context every device would make the whole, and keep its shard.
    make = jax.sharding.auto_axes(make, axes=axes, out_sharding=sharding)
  return jax.jit(make, out_shardings=sharding)
