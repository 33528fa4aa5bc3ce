"""The KV cache: a dictionary of arrays for each layer.

`{"layer_0": {"k": [B, K, H, S], "v": [B, K, H, S], "end_index": [B], "positions": [B, S]}, ...}`. The slots are the
last axis, so that both products of attention read keys and values as they lie. Each row fills its slots from the left; `end_index` counts the slots in use. `positions` holds the position of each key in its sequence,
negative for padding and for empty slots. A cache that other code made may lack `positions`: a key's slot then counts
as its position.

A layer with a sliding window may be a ring of R slots, as many as the window has tokens. It keeps the newest R tokens
of each row and no padding, and has one more array: "slots" [B, R] holds the slot that each key would have in a cache
that keeps all tokens, negative for empty slots. After six tokens, a ring with R = 4 has the "slots" [3, 4, 5, 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from models_core.errors import CacheError
from models_core.layers.cache_writes import write_slots
from models_core.sharding import fit

LayerCache = dict[str, jax.Array]
Cache = dict[str, LayerCache]


def init_layer(
  batch_size: int,
  cache_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: Any,
  *,
  mesh: Mesh | AbstractMesh | None,
  spec: PartitionSpec,
  window: int | None = None,
) -> LayerCache:
  """Makes an empty cache for one layer, sharded over the mesh along the axes that it can divide.

  Args:
    batch_size: B, rows.
    cache_size: S, slots of a row.
    num_kv_heads: K.
    head_dim: H.
    dtype: of keys and values.
    mesh: of the model's parameters, or None.
    spec: mesh axes of keys and values [B, K, H, S].
    window: sliding window in tokens: the layer becomes a ring of as many slots if cache_size is larger. None keeps all
      tokens.
  """
  size = cache_size if window is None else min(window, cache_size)
  kv, row = (batch_size, num_kv_heads, head_dim, size), spec[:1]
  arrays = {
    "k": (kv, spec, dtype, 0),
    "v": (kv, spec, dtype, 0),
    "end_index": ((batch_size,), row, jnp.int32, 0),
    "positions": ((batch_size, size), row, jnp.int32, -1),
  }
  if size < cache_size:
    arrays["slots"] = arrays["positions"]
  return {
    name: _full(shape, value, dtype, mesh, PartitionSpec(*spec))
    for name, (shape, spec, dtype, value) in arrays.items()
  }


def _full(
  shape: Sequence[int], value: int, dtype: DTypeLike, mesh: Mesh | AbstractMesh | None, spec: PartitionSpec
) -> jax.Array:
  if mesh is None:
    return jnp.full(shape, value, dtype)
  spec, _ = fit(shape, spec, mesh)
  if isinstance(mesh, Mesh):
    return jnp.full(shape, value, dtype, device=NamedSharding(mesh, spec))
  # Inside jit the mesh is abstract.
  if mesh.explicit_axes:
    return jax.sharding.reshard(jnp.full(shape, value, dtype), NamedSharding(mesh, spec))
  return jax.lax.with_sharding_constraint(jnp.full(shape, value, dtype), NamedSharding(mesh, spec))


def check_shapes(cache: Cache, rows: int, num_kv_heads: int, head_dim: int) -> None:
  """Checks that the cache has as many rows as the call's tokens, and the heads of the model.

  Raises:
    CacheError: if it does not.
  """
  for name, layer in cache.items():
    shape = layer["k"].shape
    if shape[0] != rows:
      raise CacheError(
        f"{name}: the cache has {shape[0]} rows, but tokens have {rows}: make the cache with "
        f"init_cache(batch_size={rows}, ...)"
      )
    if shape[1:3] != (num_kv_heads, head_dim):
      raise CacheError(
        f"{name}: keys have shape {shape}, expected [B={rows}, K={num_kv_heads}, H={head_dim}, S]: make the cache with "
        "init_cache"
      )


def check_room(cache: Cache, new_tokens: int) -> None:
  """Checks that new tokens fit into the free slots of every row.

  Under jit the number of free slots is unknown, so that only the size of the cache is checked; tokens without a free
  slot are then not written, and their logits are NaN.

  Raises:
    CacheError: if the tokens do not fit.
  """
  name = limiting_layer(cache)
  if name is None:
    return
  size, end = num_slots(cache[name]), cache[name]["end_index"]
  if isinstance(end, jax.core.Tracer):
    used, row = 0, 0
  else:
    used, row = int(jnp.max(end)), int(jnp.argmax(end))
  if used + new_tokens > size:
    raise CacheError(
      f"{name}: {new_tokens} more tokens do not fit into a cache of {size} slots, of which row {row} uses "
      f"{used}: make it with init_cache(..., cache_size={used + new_tokens}) or more"
    )


def limiting_layer(cache: Cache) -> str | None:
  """Name of a layer whose slots limit the cache: the first that keeps all tokens. None if all layers are rings.

  One is enough, since all layers use the same number of slots; a ring overwrites its oldest tokens and is never full.
  """
  return next((name for name, layer in cache.items() if not is_ring(layer)), None)


def is_ring(layer: LayerCache) -> bool:
  """Whether a layer is a ring, which keeps only the newest tokens."""
  return "slots" in layer


def num_slots(layer: LayerCache) -> int:
  """S, or R for a ring."""
  return layer["k"].shape[-1]


def slots(layer: LayerCache, new_tokens: int) -> jax.Array:
  """Slots [B, T] that the next T tokens take in a cache that keeps all tokens."""
  return layer["end_index"][:, None] + jnp.arange(new_tokens, dtype=jnp.int32)[None]


def next_positions(cache: Cache | None, rows: int, new_tokens: int) -> jax.Array:
  """Positions [B, T] of tokens that continue rows without padding: from 0, or from the cache's slots in use."""
  if cache:
    return slots(next(iter(cache.values())), new_tokens)
  return jnp.broadcast_to(jnp.arange(new_tokens, dtype=jnp.int32)[None], (rows, new_tokens))


def extend_cache(
  layer: LayerCache | None,
  k: jax.Array,
  v: jax.Array,
  positions: jax.Array,
  spec: PartitionSpec | None = None,
) -> tuple[LayerCache | None, jax.Array, jax.Array]:
  """Appends keys and values to a layer's cache, and returns all keys and values that the new tokens attend to.

  Tokens beyond the last slot are dropped; only a ring overwrites older tokens.

  Args:
    layer: cache of the layer, with S slots; None without a cache.
    k: [B, T, K, H], of the new tokens.
    v: [B, T, K, H], of the new tokens.
    positions: int [B, T], of the new tokens.
    spec: mesh axes of k and v. With it a TPU writes to a sharded cache in place; with None it copies the cache.

  Returns:
    The cache with T more slots in use, and keys and values [B, S, K, H] in the order of `places`. For several new
    tokens in a ring of R slots, S is R + T: the ring's keys before this call, then the new ones. Without a cache:
    None, k and v.
  """
  if layer is None:
    return None, k, v
  T = k.shape[1]
  own_k, own_v = (x.transpose(0, 2, 3, 1) for x in (k, v))
  new = layer | _write(layer, positions, {"k": own_k, "v": own_v, "positions": positions}, spec)
  new["end_index"] = layer["end_index"] + jnp.int32(T)
  if "new_k" in layer:
    new |= {"new_k": k, "new_v": v}
  keys, values = new["k"], new["v"]
  if _joins(layer, T):
    keys, values = _joined(layer, "k", own_k), _joined(layer, "v", own_v)
  # The compiler drops this order again: attention reads the arrays as they lie.
  return new, keys.transpose(0, 3, 1, 2), values.transpose(0, 3, 1, 2)


def recording(layer: LayerCache) -> LayerCache:
  """The cache of a layer, which also keeps what `extend_cache` appends to it, for `extended`."""
  empty = jnp.zeros(0, layer["k"].dtype)
  return layer | {"new_k": empty, "new_v": empty}


def recorded(layer: LayerCache) -> LayerCache:
  """The keys and values that were appended to a cache since `recording` made it, without the rest of it."""
  return {name: layer[name] for name in ("new_k", "new_v")}


def extended(
  layer: LayerCache, new: LayerCache, positions: jax.Array, spec: PartitionSpec | None
) -> LayerCache:
  """Appends to a cache what was `recorded` for tokens at positions [B, T]; `spec` is as for `extend_cache`."""
  cache, _, _ = extend_cache(layer, new["new_k"], new["new_v"], positions, spec)
  assert cache is not None
  return cache


def pick(layers: Sequence[LayerCache], at: jax.Array) -> LayerCache:
  """The cache of one of some layers, whose number is known to a scan only. It is copied, and no other one is."""
  return jax.lax.switch(at, [lambda layer=layer: layer for layer in layers])


def places(layer: LayerCache, positions: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """Slot and position of each key that `extend_cache` returns for the same new tokens.

  Args:
    layer: cache of the layer before the new tokens are appended.
    positions: int [B, T], of the new tokens.

  Returns:
    Slots [B, S], and positions [B, S] or None if the cache does not hold positions.
  """
  B, T = positions.shape
  if _joins(layer, T):
    return _joined(layer, "slots", slots(layer, T)), _joined(layer, "positions", positions)
  written = _write(layer, positions, {"positions": positions}, None)
  S = num_slots(layer)
  every = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  return written.get("slots", every), written.get("positions")


def _joins(layer: LayerCache, new_tokens: int) -> bool:
  """Whether new tokens attend to the old keys and the new ones side by side.

  Several tokens that are written to a ring overwrite keys that the first of them still see.
  """
  return is_ring(layer) and new_tokens > 1


def _joined(layer: LayerCache, name: str, new: jax.Array) -> jax.Array:
  return jnp.concatenate([layer[name], new.astype(layer[name].dtype)], axis=-1)


def _write(
  layer: LayerCache, positions: jax.Array, new: dict[str, jax.Array], spec: PartitionSpec | None
) -> LayerCache:
  """Writes arrays of new tokens, at positions [B, T], to their slots; returns those arrays that the layer has.

  Args:
    layer: cache of the layer.
    positions: int [B, T].
    new: arrays [B, ..., T].
    spec: mesh axes of tokens [B, T, K, H], or None.
  """
  T = positions.shape[1]
  index = slots(layer, T)
  if is_ring(layer):
    new = new | {"slots": index}
    index = _ring_slots(layer["slots"], positions)
  old = {name: layer[name] for name in new if name in layer}
  rows, _, heads = ([*spec, None, None, None] if spec else [None] * 3)[:3]
  kv = None if spec is None else PartitionSpec(rows, heads)
  return write_slots(old, new, index, kv, consecutive=T == 1 or not is_ring(layer))


def _ring_slots(held: jax.Array, positions: jax.Array) -> jax.Array:
  """Index in a ring where each new token is written: they follow the newest token in turn.

  Padding is not written, and of more than R tokens only the last R are. A ring with `held` [[3, 4, 5, 2]] writes tokens
  at positions [[6, -1, 7]] to the indices [[3, 4, 0]], where 4 = R stands for "not written".

  Args:
    held: int [B, R], the "slots" of the ring.
    positions: int [B, T], of the new tokens.

  Returns:
    int [B, T]; R for tokens that are not written.
  """
  R = held.shape[1]
  real = positions >= 0
  count = jnp.cumsum(real.astype(jnp.int32), axis=1)
  newest = jnp.argmax(held, axis=1, keepdims=True).astype(jnp.int32)
  return jnp.where(real & (count > count[:, -1:] - R), (newest + count) % R, R)
