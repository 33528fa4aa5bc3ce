"""Attention, by the implementation that suits its sizes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models_core.layers.blockwise import attend_blockwise, block_sizes
from models_core.layers.linear import products_are_replaced
from models_core.layers.mesh import call_auto, spec_of
from models_core.layers.visibility import KEYS, QUERIES, VisibleKeys, dense_mask, keys_of_mask


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: VisibleKeys | jax.Array,
  *,
  scale: float,
  soft_cap: float | None = None,
) -> jax.Array:
  """Grouped-query attention with float32 logits and softmax.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H]; N is a multiple of K.
    v: [B, S, K, H].
    visible: which keys a query sees: of `visible_keys`, or a mask bool [B, T, S]. A query that sees no key gets the mean
      of v, as in transformers.
    scale: factor of the logits, commonly H ** -0.5.
    soft_cap: bounds the logits to (-soft_cap, soft_cap) before the mask applies; None does not bound them.

  Returns:
    [B, T, N, H] in the dtype of q.
  """
  B, T, N, H = q.shape
  K, S = k.shape[2], k.shape[1]
  if not isinstance(visible, dict):
    visible = keys_of_mask(visible)
  q, k, v = q.reshape(B, T, K, N // K, H), k.astype(q.dtype), v.astype(q.dtype)
  if why_not_blockwise(B, T, S, N) is None:
    blocks = block_sizes(B * N, T, S)
    run_blocks = functools.partial(attend_blockwise, scale=scale, soft_cap=soft_cap, blocks=blocks)
    out = call_auto(run_blocks, spec_of(q), q, k, v, visible)
  else:
    # For the backward pass only q, k and v are kept: products and weights are larger by a factor of S / H. A library
    # that replaces products may keep statistics of them, which must not come from inside of a transformation.
    run = _attend if products_are_replaced() else jax.checkpoint(_attend, static_argnums=(4, 5))
    out = run(q, k, v, dense_mask(visible), scale, soft_cap)
  return out.reshape(B, T, N, H)


def why_not_blockwise(B: int, T: int, S: int, N: int) -> str | None:
  """Why attention of these sizes is computed at once, in one sentence; None if it is computed block by block."""
  if not all(isinstance(size, int) for size in (B, T, S, N)):
    return "its sizes are symbolic"
  if products_are_replaced():
    return "a library replaces JAX's products, and must see them as they are"
  if T < QUERIES or T * S <= QUERIES * KEYS:
    return "all its queries and keys are one block"
  return None


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, soft_cap: float | None
) -> jax.Array:
  """Attention of q [B, T, K, N // K, H] to k and v [B, S, K, H], all of one dtype -> [B, T, K, N // K, H]."""
  products = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
  weights = _softmax(products, mask[:, None, None], scale, soft_cap, v.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, v)


# Where the products are kept, what lies between them and the weights is not: it is cheap to recompute.
@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def _softmax(
  products: jax.Array, mask: jax.Array, scale: float, soft_cap: float | None, dtype: DTypeLike
) -> jax.Array:
  """Attention weights from the products of queries and keys, both [B, K, N // K, T, S]."""
  logits = bound(products * scale, soft_cap)
  return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
  """Splits the result of a projection into heads: [B, T, N * H] -> [B, T, N, H]."""
  return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def join_heads(x: jax.Array) -> jax.Array:
  """Joins heads for a projection: [B, T, N, H] -> [B, T, N * H]."""
  return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def bound(x: jax.Array, soft_cap: float | None) -> jax.Array:
  """Bounds x to (-soft_cap, soft_cap) by tanh (arXiv:2408.00118). With None, x is returned unchanged."""
  return x if soft_cap is None else jnp.tanh(x / soft_cap) * soft_cap
