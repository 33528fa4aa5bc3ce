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
from jax.sharding import Mesh

from models_core.dtypes import as_dtype
from models_core.layers import INITIALIZERS, SCALE, on_auto_axes
from models_core.loading import AbstractParameter, abstract_model
from models_core.sharding import check_mesh
from models_core.stacks import layer_names, layers_of

M = TypeVar("M", bound=nnx.Module)


def create_dummy_model(
  model_class: type[M],
  config: Any,
  mesh: Mesh | None = None,
  dtype: Any = None,
  random_seed: int = 0,
  scale: float = SCALE,
) -> M:
  """Creates a model with random parameters. Each device generates its own shards.

  Norm weights are ones (or whatever value is neutral in their module), biases and integer parameters are zeros, all
  other parameters are normally distributed. The values of a parameter depend on the seed and on its name: they are the
  same on every mesh, whether or not layers are stacked, and, up to rounding, in every dtype.

  Args:
    model_class: called as `model_class(config, rngs=...)`.
    config: the configuration that the class takes.
    mesh: with Auto or Explicit axes; None is one device.
    dtype: dtype of the floating-point parameters; None keeps what the class declares.
    random_seed: seed of the random values.
    scale: standard deviation of the normally distributed values.

  Returns:
    The model.

  Raises:
    TypeError: if `mesh` is neither a Mesh nor None, or `dtype` is not a floating-point type.
  """
  dtype = as_dtype(dtype)
  check_mesh(mesh)
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
      names = np.array([zlib.crc32(name.encode()) for name in layer_names(parameter.name)], np.uint32)
      is_stack = layers_of(parameter.name) is not None
      arrays[parameter.name] = make(seed, names if is_stack else names[0], np.float32(scale))
  return cast(M, model.fill(arrays))


@functools.lru_cache(256)
def _maker(
  shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding, init: str
) -> Callable[..., jax.Array]:
  """A compiled initialiser for all parameters of one shape, dtype, sharding and kind, in all layers and models."""

  def make(seed: jax.Array, name: jax.Array, scale: jax.Array) -> jax.Array:
    if name.ndim:  # of all layers of a stack, one after another
      return jax.lax.map(
        lambda one: INITIALIZERS[init](jax.random.fold_in(seed, one), shape[1:], dtype, scale), name
      )
    return INITIALIZERS[init](jax.random.fold_in(seed, name), shape, dtype, scale)

  # On Explicit axes, each device would generate the whole array and keep only its shard.
  return jax.jit(on_auto_axes(make, sharding), out_shardings=sharding)
