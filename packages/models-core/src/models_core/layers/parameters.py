"""How a module declares a parameter: shape, sharding and initial values."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

# Standard deviation of random weights, the usual one of published models.
SCALE = 0.02

INITIALIZERS = {
  # Drawn in float32 and rounded, so that a dtype changes no value beyond its precision.
  "normal": lambda key, shape, dtype, scale=SCALE: (
    scale * jax.random.normal(key, shape, jnp.float32)
  ).astype(dtype),
  "ones": lambda key, shape, dtype, scale=SCALE: jnp.ones(shape, dtype),
  "zeros": lambda key, shape, dtype, scale=SCALE: jnp.zeros(shape, dtype),
}


_shapes_only: contextvars.ContextVar[bool] = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
  """Context in which parameters are shapes: `parameter` draws no values, whose traces would take a minute for a thousand."""
  token = _shapes_only.set(True)
  try:
    yield
  finally:
    _shapes_only.reset(token)


def only_shapes() -> bool:
  """Whether this is the context of `shapes_only`."""
  return _shapes_only.get()


def parameter(
  shape: Sequence[int],
  spec: PartitionSpec,
  *,
  rngs: nnx.Rngs,
  heads: Sequence[int | None] = (),
  init: str = "normal",
  dtype: Any = jnp.float32,
) -> nnx.Param:
  """Makes a parameter with its initial values.

  Args:
    shape: of the parameter, its axes in the order of Hugging Face's files, output axes first.
    spec: mesh axes of each axis; stored as metadata, so that no mesh is needed.
    rngs: source of random keys.
    heads: for each axis, the number of heads that it consists of, or None. No mesh splits a head.
    init: a name in INITIALIZERS; stored as metadata, by which a dummy model tells a norm from a projection.
    dtype: of the values.
  """
  if _shapes_only.get():
    value = jax.ShapeDtypeStruct(tuple(shape), dtype)
  else:
    value = INITIALIZERS[init](rngs.params(), tuple(shape), dtype)
  # Eager sharding would need a mesh in context, even if the model is only traced for its shapes.
  return nnx.Param(value, out_sharding=spec, eager_sharding=False, heads=tuple(heads), init=init)


def value_of(parameter: Any) -> Any:
  """The value of a parameter: an array, a shape, or that of what a library put in the parameter's place, as qwix does."""
  return parameter.get_value() if isinstance(parameter, nnx.Variable) else parameter[...]


def abstract_state(make: Callable[..., nnx.Module]) -> tuple[Any, Any]:
  """The structure of a module, and its state with a `jax.ShapeDtypeStruct` for each array. Nothing is allocated.

  Args:
    make: called as `make(rngs=...)`, returns the module.

  Returns:
    The graphdef and the state, as `nnx.split` returns them.
  """
  found: list[tuple[Any, Any]] = []

  def trace() -> None:
    # Whatever the module computes besides its parameters is traced.
    found.append(nnx.split(make(rngs=nnx.Rngs(params=0))))

  # With eager sharding, a module with annotated parameters would require a mesh in context.
  with nnx.use_eager_sharding(False), shapes_only():
    jax.eval_shape(trace)
  [(graphdef, state)] = found
  flat = []
  for path, variable in nnx.to_flat_state(state):
    value = variable.get_raw_value()
    flat.append((path, variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))))
  return graphdef, nnx.from_flat_state(flat)


def along_last(vector: jax.Array, ndim: int) -> jax.Array:
  """A vector [D] as an array [1, ..., 1, D] of as many axes as what it is combined with: no rank is promoted."""
  return jnp.expand_dims(vector, tuple(range(ndim - 1)))


def dotted(path: tuple[Any, ...]) -> str:
  """Name of a parameter from its path: ("layers", 0, "attn") -> "layers.0.attn"."""
  return ".".join(map(str, path))
