"""A loss whose logits are there for a few tokens at a time only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from models_core.layers.logits import cross_entropy

# Bytes of a chunk's float32 logits.
_BYTES = 1 << 27


def chunk_length(rows: int, vocab_size: int) -> int:
  """How many tokens of each row a chunk has, so that its logits take about 128 MiB."""
  return max(1, _BYTES // (4 * rows * vocab_size))


def mean_loss_in_chunks(
  logits_of: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  chunk: int,
) -> jax.Array:
  """`mean_cross_entropy` of the logits of hidden states.

  The backward pass computes the logits of each chunk again.

  Args:
    logits_of: hidden states [B, C, D] -> logits [B, C, V].
    hidden: [B, T, D].
    targets: int [B, T].
    weights: float32 [B, T].
    chunk: C, tokens of a row in a chunk.
  """
  T = hidden.shape[1]
  chunk = min(chunk, T)
  missing = -T % chunk

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    hidden, targets, weights = part
    losses = cross_entropy(logits_of(hidden), targets)
    return total + jnp.sum(jnp.where(weights == 0, 0, losses) * weights), None

  parts: Any = jax.tree.map(split, (hidden, targets, weights))
  total, _ = lax.scan(add, jnp.float32(0), parts)
  count = jnp.sum(weights)
  return total / jnp.where(count == 0, 1, count)
