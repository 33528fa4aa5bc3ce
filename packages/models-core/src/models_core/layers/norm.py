"""Normalisation layers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from models_core.layers.parameters import along_last, parameter


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * w over the last axis, in float32 (arXiv:1910.07467)."""

  def __init__(self, dim: int, eps: float, spec: PartitionSpec, *, rngs: nnx.Rngs):
    self.eps = eps
    self.w = parameter((dim,), spec, rngs=rngs, init="ones")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [..., D] -> [..., D] in the dtype of x."""
    return _normalise(x, self.w[...].astype(jnp.float32), self.eps).astype(x.dtype)


class OffsetRMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * (1 + w) over the last axis, in float32. Gemma's checkpoints store w, not 1 + w."""

  def __init__(self, dim: int, eps: float, spec: PartitionSpec, *, rngs: nnx.Rngs):
    self.eps = eps
    self.w = parameter((dim,), spec, rngs=rngs, init="zeros")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [..., D] -> [..., D] in the dtype of x."""
    return self._float32(x).astype(x.dtype)

  def add_to(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes x + norm(y), both [..., D] -> [..., D] in the dtype of x; added in float32 and rounded once."""
    return (x.astype(jnp.float32) + self._float32(y)).astype(x.dtype)

  def _float32(self, x: jax.Array) -> jax.Array:
    return _normalise(x, 1 + self.w[...].astype(jnp.float32), self.eps)


# For the backward pass only x and the scale are kept: the float32 values are larger, and cheap to recompute.
@functools.partial(jax.checkpoint, static_argnums=2)
def _normalise(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  y = x.astype(jnp.float32)
  return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps) * along_last(scale, x.ndim)
