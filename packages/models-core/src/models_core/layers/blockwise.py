"""Attention whose memory is linear in the sequence, on every backend.

Keys are visited a block at a time, with a running maximum and sum of the softmax (arXiv:2112.05682); the backward pass
computes each block again (arXiv:2205.14135). Blocks that no query of a block sees are skipped: a causal prefill visits
half of them, a layer with a sliding window visits as many as its window needs, and packed sequences skip blocks of the
sequences before them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from models_core.layers.attention_case import AttentionCase
from models_core.layers.mesh import platform_of
from models_core.layers.visibility import KEYS, QUERIES, VisibleKeys, block_mask, block_ranges, pad_queries

# A float that every product exceeds, and that exp can subtract from minus infinity.
_LOWEST = -1e30
# Limits of the products in one block, of all heads together and of one head; the larger one counts. 4 MB of float32 fit
# the caches of a CPU, 32 MB the memory of a TPU's core: larger blocks go to the main memory and back. Blocks of one head
# below the second limit are multiplied at a lower rate.
_PRODUCTS = {"cpu": (1 << 20, 1 << 14)}
_PRODUCTS_ELSEWHERE = 1 << 23, QUERIES * KEYS
# Most queries, and most keys, in a block.
_MOST = 512

Blocks = tuple[int, int]


def why_not_blockwise(case: AttentionCase) -> str | None:
  """Why attention cannot be computed block by block, in one sentence; None if it can."""
  if case.is_symbolic:
    return "its sizes are symbolic"
  if case.products_replaced:
    return "a library replaces JAX's products, and must see them as they are"
  if case.queries < QUERIES * case.sequence_shards:
    return f"it has fewer than {QUERIES} queries on a device, the size of a block"
  return None


def block_sizes(rows: int, T: int, S: int, platform: str) -> Blocks:
  """Numbers of queries and of keys in a block.

  Args:
    rows: B * N, the number of query heads of all sequences.
    T: number of queries.
    S: number of keys.
    platform: "cpu", "gpu" or "tpu".

  Returns:
    Numbers of queries, a multiple of QUERIES, and of keys, a multiple of KEYS.
  """
  of_all, of_one = _PRODUCTS.get(platform, _PRODUCTS_ELSEWHERE)
  products = max(of_all // rows, of_one)
  queries, keys = QUERIES, KEYS
  most_queries, most_keys = min(T, _MOST), min(S, _MOST)
  while 2 * queries * keys <= products and (queries < most_queries or keys < most_keys):
    if queries < most_queries and (queries <= keys or keys >= most_keys):
      queries *= 2
    else:
      keys *= 2
  return queries, keys


def attend_blockwise(
  q: jax.Array, k: jax.Array, v: jax.Array, visible: VisibleKeys, scale: float, soft_cap: float | None
) -> jax.Array:
  """Attention of q [B, T, N, H] to k and v [B, S, K, H], all of one dtype -> [B, T, N, H].

  Args:
    q: queries.
    k: keys.
    v: values.
    visible: which keys a query sees; a query that sees none gets the mean of v.
    scale: factor of the logits.
    soft_cap: bounds the logits before the mask applies, or None.
  """
  B, T, N, H = q.shape
  blocks = block_sizes(B * N, T, k.shape[1], platform_of(q))
  missing = -T % blocks[0]
  q = q.reshape(B, T, k.shape[2], -1, H)
  # As a KV cache lies, [B, K, H, S]: a block of keys is cut out of it, and not out of a copy.
  k, v = (x.transpose(0, 2, 3, 1) for x in (k, v))
  if missing:
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
  out, sees = _attend(q, k, v, pad_queries(visible, blocks[0]), scale, soft_cap, blocks)
  mean = jnp.mean(v, axis=3, dtype=jnp.float32).astype(v.dtype)
  out = jnp.where(sees[:, :, None, None, None], out, mean[:, None, :, None, :])
  return out[:, :T].reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: VisibleKeys,
  scale: float,
  soft_cap: float | None,
  blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q [B, T, K, G, H] to k and v [B, K, H, S], 0 for a query that sees no key; and whether a query sees one,
  bool [B, T].
  """
  return _forward(q, k, v, visible, scale, soft_cap, blocks)[0]


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: VisibleKeys,
  scale: float,
  soft_cap: float | None,
  blocks: Blocks,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  """The results, and what the backward pass needs: the logarithm of each softmax' sum [B, K, G, T], too."""
  B, T, K, G, H = q.shape
  firsts, ends = block_ranges(visible, *blocks)
  zeros = functools.partial(_zeros, (q, k, v, visible))

  def rows(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    out, sums = carry
    queries = _rows(out, i, blocks[0])

    def step(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      greatest, total, acc = state
      keys, values = _cut(k, j, blocks[1]), _cut(v, j, blocks[1])
      logits, _ = _logits(queries, keys, _seen(visible, i, j, blocks), scale, soft_cap)
      new = jnp.maximum(greatest, jnp.max(logits, axis=-1))
      weights = jnp.exp(logits - new[..., None])
      shrink = jnp.exp(greatest - new)
      new_acc = _product("bkrs,bkhs->bkrh", weights.astype(v.dtype), values)
      return new, total * shrink + jnp.sum(weights, axis=-1), acc * shrink[..., None] + new_acc

    size = (B, K, G * blocks[0])
    state = zeros(size) + _LOWEST, zeros(size), zeros((*size, H))
    greatest, total, acc = lax.fori_loop(firsts[i], ends[i], step, state)
    some = jnp.where(total == 0, 1, total)  # it is 0 for a query that sees no key
    result = (acc / some[..., None]).astype(q.dtype)
    logs = (greatest + jnp.log(some)).reshape(B, K, G, -1)
    return (
      lax.dynamic_update_slice_in_dim(out, _split(result, G), i * blocks[0], 1),
      lax.dynamic_update_slice_in_dim(sums, logs, i * blocks[0], 3),
    )

  # A block of results takes the place of its queries. Zeros in their place would be there for all layers from the start.
  carry = _as_varying((q, k, v, visible), q), zeros((B, K, G, T))
  out, sums = lax.fori_loop(jnp.int32(0), jnp.int32(T // blocks[0]), rows, carry)
  # Of a query that sees no key, the greatest product is the lowest number. NaN counts as seen, or the mean of v would hide
  # it: a comparison with NaN is False, hence the negation.
  return (out, ~(sums[:, 0, 0] <= _LOWEST / 2)), (q, k, v, visible, out, sums)


def _backward(
  scale: float,
  soft_cap: float | None,
  blocks: Blocks,
  kept: tuple[Any, ...],
  cotangents: tuple[jax.Array, Any],
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  (q, k, v, visible, out, sums), (d_out, _) = kept, cotangents
  B, T, K, G, _ = q.shape
  firsts, ends = block_ranges(visible, *blocks)
  zeros = functools.partial(_zeros, (kept, d_out))

  def rows(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    dq, dk, dv = carry
    queries, result, d_result = (_rows(x, i, blocks[0]) for x in (dq, out, d_out))
    # The sum over keys of weight times its gradient equals this sum over the head's dimensions.
    inner = jnp.sum(result.astype(jnp.float32) * d_result.astype(jnp.float32), axis=-1)
    log = lax.dynamic_slice_in_dim(sums, i * blocks[0], blocks[0], 3).reshape(B, K, -1)

    def step(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      d_queries, dk, dv = state
      keys, values = _cut(k, j, blocks[1]), _cut(v, j, blocks[1])
      logits, slope = _logits(queries, keys, _seen(visible, i, j, blocks), scale, soft_cap)
      weights = jnp.exp(logits - log[..., None])
      d_values = _product("bkrs,bkrh->bkhs", weights.astype(v.dtype), d_result)
      d_weights = _product("bkrh,bkhs->bkrs", d_result, values)
      d_logits = weights * (d_weights - inner[..., None])
      if slope is not None:
        d_logits *= slope
      d_logits = (d_logits * scale).astype(q.dtype)
      d_queries += _product("bkrs,bkhs->bkrh", d_logits, keys)
      d_keys = _product("bkrs,bkrh->bkhs", d_logits, queries)
      return d_queries, _add(dk, d_keys, j, blocks[1]), _add(dv, d_values, j, blocks[1])

    state = zeros(queries.shape), dk, dv
    d_queries, dk, dv = lax.fori_loop(firsts[i], ends[i], step, state)
    d_queries = _split(d_queries.astype(q.dtype), G)
    return lax.dynamic_update_slice_in_dim(dq, d_queries, i * blocks[0], 1), dk, dv

  # A block of gradients takes the place of its queries.
  carry = _as_varying((kept, d_out), q), zeros(k.shape), zeros(v.shape)
  dq, dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(T // blocks[0]), rows, carry)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(
  queries: jax.Array, keys: jax.Array, seen: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | None]:
  """Logits of a block, and the derivative of the soft cap: float32 [B, K, G * queries, keys].

  Args:
    queries: [B, K, G * queries, H].
    keys: [B, K, H, keys].
    seen: bool [B, queries, keys].
    scale: factor of the logits.
    soft_cap: bounds the logits, or None, for which the derivative is None.
  """
  logits, slope = _product("bkrh,bkhs->bkrs", queries, keys) * scale, None
  if soft_cap is not None:
    tanh = jnp.tanh(logits / soft_cap)
    logits, slope = tanh * soft_cap, 1 - tanh**2
  B, K, R, S = logits.shape
  split = logits.reshape(B, K, R // seen.shape[1], *seen.shape[1:])
  return jnp.where(seen[:, None, None], split, -jnp.inf).reshape(B, K, R, S), slope


def _zeros(inputs: Any, shape: tuple[int, ...]) -> jax.Array:
  """Zeros in float32 that a loop carries."""
  return _as_varying(inputs, jnp.zeros(shape, jnp.float32))


def _as_varying(inputs: Any, array: jax.Array) -> jax.Array:
  """An array that a loop carries: inside shard_map, it may differ along the mesh axes along which an input does."""
  axes = {axis for leaf in jax.tree.leaves(inputs) for axis in _varying_axes(jax.typeof(leaf))}
  axes -= _varying_axes(jax.typeof(array))
  return lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def _varying_axes(type: Any) -> frozenset[str]:
  """The mesh axes along which an array may differ inside shard_map; older versions of JAX name them `vma`."""
  new = getattr(type, "manual_axis_type", None)
  return type.vma if new is None else new.varying


def _seen(visible: VisibleKeys, i: jax.Array, j: jax.Array, blocks: Blocks) -> jax.Array:
  """The mask of block i of queries and block j of keys: bool [B, queries, keys]."""
  start, size = _place(visible["key_slots"].shape[1], j, blocks[1])
  seen = block_mask(visible, i * blocks[0], blocks[0], start, size)
  return seen & (start + jnp.arange(size, dtype=jnp.int32) >= j * blocks[1])[None, None]


def _place(S: int, j: jax.Array, keys: int) -> tuple[jax.Array, int]:
  """Index of the first of a block of keys, and their number. The last block overlaps the one before if S needs it."""
  size = min(keys, S)
  return jnp.minimum(j * keys, S - size), size


def _cut(x: jax.Array, j: jax.Array, keys: int) -> jax.Array:
  """Block j of keys or values [B, K, H, S]."""
  return lax.dynamic_slice_in_dim(x, *_place(x.shape[3], j, keys), axis=3)


def _add(x: jax.Array, new: jax.Array, j: jax.Array, keys: int) -> jax.Array:
  """Adds to block j of an array [B, K, H, S]."""
  start, _ = _place(x.shape[3], j, keys)
  return lax.dynamic_update_slice_in_dim(x, _cut(x, j, keys) + new, start, 3)


def _rows(x: jax.Array, i: jax.Array, queries: int) -> jax.Array:
  """Block i of queries [B, T, K, G, H] as rows of matrices [B, K, G * queries, H]."""
  B, _, K, G, H = x.shape
  block = lax.dynamic_slice_in_dim(x, i * queries, queries, 1)
  return block.transpose(0, 2, 3, 1, 4).reshape(B, K, G * queries, H)


def _split(x: jax.Array, G: int) -> jax.Array:
  """The inverse of `_rows`: [B, K, G * queries, H] -> [B, queries, K, G, H]."""
  B, K, R, H = x.shape
  return x.reshape(B, K, G, R // G, H).transpose(0, 3, 1, 2, 4)
