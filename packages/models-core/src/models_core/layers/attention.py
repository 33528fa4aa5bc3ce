"""Attention and its masks.

Masks follow from the positions of tokens, so that neither padding nor a prefill in chunks changes a logit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models_core.layers import cache as cache_lib
from models_core.layers.linear import products_are_replaced


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float, soft_cap: float | None = None
) -> jax.Array:
  """Grouped-query attention with float32 logits and softmax.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H]; N is a multiple of K.
    v: [B, S, K, H].
    mask: bool [B, T, S], True where a query sees a key. A query that sees no key gets the mean of v.
    scale: factor of the logits, commonly H ** -0.5.
    soft_cap: bounds the logits to (-soft_cap, soft_cap) before the mask applies; None does not bound them.

  Returns:
    [B, T, N, H] in the dtype of q.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, N // K, H)
  # For the backward pass only q, k and v are kept: products and weights are larger by a factor of S / H. A library that
  # replaces products may keep statistics of them, which must not come from inside of a transformation.
  run = _attend if products_are_replaced() else jax.checkpoint(_attend, static_argnums=(4, 5))
  return run(q, k.astype(q.dtype), v.astype(q.dtype), mask, scale, soft_cap).reshape(B, T, N, H)


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


def visible_keys(
  positions: jax.Array,
  layer: cache_lib.LayerCache | None = None,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  window: int | None = None,
) -> jax.Array:
  """Computes which keys each query sees.

  Without a mask, attention is causal: a query sees a key if it was written no later than the query's own key and its
  position is no greater. A negative position marks padding, which no query sees.

  Args:
    positions: int [B, T], of the queries.
    layer: cache to which this call's keys will be appended; None if the queries' own tokens are the only keys.
    mask: bool or int [B, T or 1, S] over all slots of the cache, in place of the causal rule; a shorter one is padded
      with False.
    segment_ids: int [B, T]; tokens of different segments do not see each other. Only without a cache.
    window: sliding window in tokens: a query at position p sees no key before position p - window + 1.

  Returns:
    bool [B, T, S], where S counts the keys that `extend_cache` returns, in the same order.

  Raises:
    ValueError: if the mask has the wrong shape or holds floats, or if segment_ids come with a cache.
  """
  B, T = positions.shape
  if layer is None:
    query_slots = key_slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    key_positions = positions
  else:
    query_slots = cache_lib.slots(layer, T)
    key_slots, kept = cache_lib.places(layer, positions)
    if kept is None:
      key_positions, positions = key_slots, query_slots
    else:
      key_positions = kept
  query, key = positions[:, :, None], key_positions[:, None, :]
  if mask is None:
    visible = (key_slots[:, None, :] <= query_slots[:, :, None]) & (key <= query) & (key >= 0)
  else:
    if layer is not None and cache_lib.is_ring(layer):
      visible = _at_slots(_fit_mask(mask, B, T, mask.shape[-1]), key_slots)
    else:
      visible = _fit_mask(mask, B, T, key_slots.shape[1])
    if layer is not None:
      visible &= (key_slots <= query_slots[:, -1:])[:, None, :]
  if window is not None:
    visible &= key > query - window
  if segment_ids is not None:
    if layer is not None:
      raise ValueError(
        "segment_ids cannot be combined with a cache: pass cache=None, or put each sequence into a row of its own"
      )
    visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
  return visible


def _fit_mask(mask: jax.Array, B: int, T: int, S: int) -> jax.Array:
  if mask.ndim != 3 or mask.shape[0] not in (1, B) or mask.shape[1] not in (1, T) or mask.shape[2] > S:
    remedy = "; make_causal_attn_mask makes one from a padding mask [B, T]" if mask.ndim == 2 else ""
    raise ValueError(f"attention_mask has shape {mask.shape}, expected [B={B}, T={T} or 1, S<={S}]{remedy}")
  if jnp.issubdtype(mask.dtype, jnp.floating):
    raise ValueError(
      f"attention_mask is {mask.dtype}, expected booleans, True where a query sees a key: pass mask == 0 for a mask "
      "that is added to the logits"
    )
  mask = jnp.pad(mask.astype(bool), ((0, 0), (0, 0), (0, S - mask.shape[2])))
  return jnp.broadcast_to(mask, (B, T, S))


def _at_slots(mask: jax.Array, key_slots: jax.Array) -> jax.Array:
  """Picks the columns of a mask [B, T, S] at the slots [B, R] that a ring holds: [B, T, R].

  With key_slots [[4, -1, 2, 3]] these are column 4, False for the empty slot, and columns 2 and 3.
  """
  inside = (key_slots >= 0) & (key_slots < mask.shape[2])
  index = jnp.where(inside, key_slots, 0)[:, None, :]
  return jnp.take_along_axis(mask, index, axis=2) & inside[:, None, :]


def make_causal_attn_mask(input_mask: jax.Array) -> jax.Array:
  """Makes a causal mask from a padding mask.

  Args:
    input_mask: [B, T], True for tokens, False for padding.

  Returns:
    bool [B, T, T].
  """
  T = input_mask.shape[-1]
  return jnp.tril(jnp.ones((T, T), bool))[None] & input_mask.astype(bool)[:, None, :]
