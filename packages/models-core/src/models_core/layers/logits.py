"""Losses, log-probabilities and the largest logits, however the logits are sharded.

Logits [..., V] may be sharded over any axes, the vocabulary too, on meshes with Auto or Explicit axes. No function
gathers them: between devices only numbers for each token move.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from models_core.layers.mesh import call_auto, fit_auto, spec_of
from models_core.sharding import Spec, axis_names


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Negative log-likelihood of each target, as optax.softmax_cross_entropy_with_integer_labels computes it.

  The gradient is softmax(logits) minus 1 at the target, in the dtype of logits and sharded as they are.

  Args:
    logits: [..., V], floats.
    targets: int [...], from 0 to V - 1. Any other target, -1 included, gives NaN, and no gradient.

  Returns:
    float32 [...], computed in float32.

  Raises:
    TypeError: if logits are not floats, or targets not integers.
    ValueError: if targets do not have the shape of logits without V.
  """
  logits, targets = jnp.asarray(logits), jnp.asarray(targets)
  if not jnp.issubdtype(logits.dtype, jnp.floating) or not jnp.issubdtype(targets.dtype, jnp.integer):
    raise TypeError(f"logits are {logits.dtype} and targets {targets.dtype}, expected floats and integers")
  if targets.shape != logits.shape[:-1]:
    raise ValueError(
      f"logits have shape {logits.shape} and targets {targets.shape}, expected [..., V] and [...]: give one target for "
      "each token"
    )
  return _cross_entropy(logits, targets.astype(jnp.int32))


def mean_cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Mean of `cross_entropy` over all tokens, or its weighted mean.

  Args:
    logits: [..., V], floats.
    targets: int [...], from 0 to V - 1; where the weight is 0, any integer.
    weights: bool or numbers [...], a mask or the weight of each token. None weights all tokens equally.

  Returns:
    float32 scalar: sum of weights * losses, divided by the sum of weights. It is 0 if all weights are 0.

  Raises:
    TypeError: if logits are not floats, or targets not integers.
    ValueError: if targets or weights do not have the shape of logits without V.
  """
  losses = cross_entropy(logits, targets)
  if weights is None:
    return jnp.mean(losses)
  if jnp.shape(weights) != losses.shape:
    raise ValueError(
      f"weights have shape {jnp.shape(weights)}, expected {losses.shape}, the shape of targets"
    )
  return _weighted_mean(losses, jnp.asarray(weights).astype(jnp.float32))


def log_probs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probability of each token: minus `cross_entropy`, with the same arguments and errors.

  For a sampling temperature, divide the logits by it first.
  """
  return -cross_entropy(logits, tokens)


def _follow(x: jax.Array, leader: jax.Array) -> jax.Array:
  """Shards x as the leading axes of another array are on Explicit axes; without such axes, x is returned unchanged."""
  if not (mesh := jax.typeof(leader).sharding.mesh).explicit_axes:
    return x
  return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec_of(leader)[: x.ndim])))


# Compiled for eager callers, too: for them each operation would make an array of the size of the logits.
@jax.jit
def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  # The gradient would follow targets that are sharded in another way, and be gathered in the end.
  targets = _follow(targets, logits)
  return call_auto(_losses, spec_of(targets), logits, targets)


@jax.jit
def _weighted_mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
  weights = _follow(weights, losses)
  total = jnp.sum(weights)
  return jnp.sum(jnp.where(weights == 0, 0, losses) * weights) / jnp.where(total == 0, 1, total)


@jax.custom_jvp
def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
  return _losses_and_totals(logits, targets)[0]


def _losses_and_totals(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross entropy, and the logarithm of the sum of exp(logits), both float32 [...]."""
  inside = (targets >= 0) & (targets < logits.shape[-1])
  largest = jnp.max(logits, axis=-1).astype(jnp.float32)
  largest = jnp.where(jnp.isfinite(largest), largest, 0)
  total = jnp.log(jnp.sum(jnp.exp(logits.astype(jnp.float32) - largest[..., None]), axis=-1))
  # XLA's CPU backend does not fuse the comparison into the sum.
  chosen = lax.platform_dependent(
    logits, jnp.where(inside, targets, 0), cpu=_chosen_by_gather, default=_chosen_by_comparison
  )
  return jnp.where(inside, total - (chosen - largest), jnp.nan), total + largest


def _chosen_by_comparison(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Logits of the targets, float32 [...], in a pass over all logits that needs no memory on any sharding."""
  return jnp.sum(jnp.where(_is_target(logits, targets), logits.astype(jnp.float32), 0), axis=-1)


def _chosen_by_gather(logits: jax.Array, targets: jax.Array) -> jax.Array:
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="promise_in_bounds")
  return chosen[..., 0].astype(jnp.float32)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """True [..., V] at the target of each token."""
  return lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


@_losses.defjvp
def _losses_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
  logits, targets = primals
  losses, totals = _losses_and_totals(logits, targets)
  inside = (targets >= 0) & (targets < logits.shape[-1])
  return losses, jnp.where(inside, _change(logits, targets, totals, tangents[0]), 0)


# For the backward pass only the logits are kept: the softmax is as large, and cheap to recompute.
@jax.checkpoint
def _change(logits: jax.Array, targets: jax.Array, totals: jax.Array, tangent: jax.Array) -> jax.Array:
  """Change of the losses, float32 [...], with a change of the logits: its product with softmax - one_hot(targets)."""
  softmax = jnp.exp(logits.astype(jnp.float32) - totals[..., None])
  slope = jnp.where(_is_target(logits, targets), softmax - 1, softmax)
  return jnp.sum(slope * tangent.astype(jnp.float32), axis=-1)


def top_k(logits: jax.Array, k: int, spec: Spec | None = None) -> tuple[jax.Array, jax.Array]:
  """The k largest logits of each token and their places in the vocabulary, as jax.lax.top_k computes them.

  Each device takes the k largest of its part of the vocabulary, and only these are gathered.

  Args:
    logits: [..., V].
    k: how many, from 1 to V.
    spec: how logits are sharded. It is used only under jit on a mesh with Auto axes, where an array does not know its
      sharding. With None, the logits are first spread there over all devices, by the vocabulary as far as it divides,
      which sends the part of each device once.

  Returns:
    The values [..., k] in the dtype of logits, the largest first, and their indices, int32 [..., k]. Of equal values,
    that with the lower index comes first.

  Raises:
    ValueError: if k is not from 1 to V.
  """
  logits = jnp.asarray(logits)
  if not 1 <= k <= logits.shape[-1]:
    raise ValueError(
      f"k is {k}, expected a number from 1 to V={logits.shape[-1]}, the size of the vocabulary"
    )
  types = spec_of(logits)
  if jax.typeof(logits).sharding.mesh.explicit_axes:
    spec = types
  elif not isinstance(logits, jax.core.Tracer):
    spec = logits.sharding.spec if isinstance(logits.sharding, NamedSharding) else PartitionSpec()

  def run(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    own = _spread(logits.shape) if spec is None else fit_auto(logits.shape, PartitionSpec(*spec))
    return _top_k(logits, k, own)

  tokens = PartitionSpec(*types[:-1])
  return call_auto(run, (tokens, tokens), logits)


def _spread(shape: Sequence[int]) -> PartitionSpec:
  """A spec that shards an array over all Auto axes of the mesh in context: its last axis if that divides.

  On a mesh a=2, b=4, the shape (3, 8, 12) gets (None, "a", "b"): 12 is divisible by 4, but not by 8.
  """
  mesh = jax.sharding.get_abstract_mesh()
  names: list[tuple[str, ...]] = [()] * len(shape)
  left = list(shape)
  for name in reversed(mesh.auto_axes):
    size = mesh.shape[name]
    axis = next((axis for axis in reversed(range(len(shape))) if left[axis] % size == 0), None)
    if axis is not None:
      names[axis] += (name,)
      left[axis] //= size
  return PartitionSpec(*names)


# Compiled for eager callers, too: for them shard_map would run one operation at a time.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _top_k(logits: jax.Array, k: int, spec: PartitionSpec) -> tuple[jax.Array, jax.Array]:
  """`top_k` of logits that are sharded by `spec` over Auto axes."""
  vocabulary = axis_names(spec[-1]) if len(spec) == logits.ndim else ()

  def candidates(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = logits.shape[-1]
    values, indices = lax.top_k(logits, min(k, size))
    return values, indices + lax.axis_index(vocabulary) * size if vocabulary else indices

  def largest(values: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, places = lax.top_k(values, k)
    return values, jnp.take_along_axis(indices, places, axis=-1)

  if not any(map(axis_names, spec)):
    return candidates(logits)
  # shard_map gets no mesh: it takes the one in context, which is the user's.
  axes = set(jax.sharding.get_abstract_mesh().auto_axes)
  found = jax.shard_map(candidates, in_specs=spec, out_specs=spec, axis_names=axes)(logits)
  if not vocabulary:
    return found
  tokens = PartitionSpec(*spec[:-1])
  return jax.shard_map(largest, in_specs=(tokens, tokens), out_specs=tokens, axis_names=axes)(*found)
