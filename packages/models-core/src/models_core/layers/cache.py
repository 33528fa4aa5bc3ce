"""The KV cache: one dictionary of arrays a layer.

`{"layer_0": {"k": [B, S, K, H], "v": [B, S, K, H], "end_index": [B], "positions": [B, S]}, ...}`. Slots fill
from the left, row by row; `end_index` counts those in use. `positions` holds each key's position in its
sequence, negative where a slot holds padding. A cache made elsewhere may lack it: slots then stand for positions.

A layer with a sliding window may be a ring, with no more slots than the window has tokens. It keeps the newest
tokens of each row and no padding, and has one array more: "slots" [B, R], the slot that each of its keys would have
in a cache that keeps all, negative where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from models_core.errors import CacheError
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
  """An empty cache of one layer, placed on the mesh where its axes divide.

  Args:
    batch_size: B, rows.
    cache_size: S, slots of a row.
    num_kv_heads: K.
    head_dim: H.
    dtype: of keys and values.
    mesh: of the model's parameters, or None.
    spec: of [B, S, K, H].
    window: makes a ring of so many slots, unless the whole cache has no more.
  """
  size = cache_size if window is None else min(window, cache_size)
  kv, row = (batch_size, size, num_kv_heads, head_dim), spec[:2]
  arrays = {
    "k": (kv, spec, dtype, 0),
    "v": (kv, spec, dtype, 0),
    "end_index": (kv[:1], row[:1], jnp.int32, 0),
    "positions": (kv[:2], row, jnp.int32, -1),
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
  # Inside jit a mesh is abstract.
  if mesh.explicit_axes:
    return jax.sharding.reshard(jnp.full(shape, value, dtype), NamedSharding(mesh, spec))
  return jax.lax.with_sharding_constraint(jnp.full(shape, value, dtype), NamedSharding(mesh, spec))


def check_rows(cache: Cache, rows: int) -> None:
  """Refuses a call whose batch the cache is not of.

  Raises:
    CacheError: with both sizes.
  """
  for name, layer in cache.items():
    if layer["k"].shape[0] != rows:
      raise CacheError(f"{name}: the cache has {layer['k'].shape[0]} rows, but tokens have {rows}")


def check_room(cache: Cache, new_tokens: int) -> None:
  """Refuses a call that would write past the cache.

  Under jit only the sizes are known: tokens that find no room there are not written, and their logits are NaN.

  Raises:
    CacheError: naming the row and the sizes.
  """
  name = limiting_layer(cache)
  if name is None:
    return
  size, end = cache[name]["k"].shape[1], cache[name]["end_index"]
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
  """The first layer that keeps all tokens. All layers advance together; rings alone have no end."""
  return next((name for name, layer in cache.items() if not is_ring(layer)), None)


def is_ring(layer: LayerCache) -> bool:
  """Whether a layer keeps the newest tokens alone."""
  return "slots" in layer


def slots(layer: LayerCache, new_tokens: int) -> jax.Array:
  """Slots [B, T] that the next tokens take."""
  return layer["end_index"][:, None] + jnp.arange(new_tokens, dtype=jnp.int32)


def extend_cache(
  layer: LayerCache | None, k: jax.Array, v: jax.Array, positions: jax.Array
) -> tuple[LayerCache | None, jax.Array, jax.Array]:
  """Appends keys and values, and gives those that the new tokens attend to.

  Args:
    layer: of S slots; None where there is no cache.
    k: [B, T, K, H].
    v: [B, T, K, H].
    positions: [B, T].

  Returns:
    The layer, T slots further, and keys and values [B, S, K, H], whose slots and positions are those of `places`;
    k and v themselves where there is no cache. What lies beyond S is dropped; only a ring overwrites what it holds.
  """
  if layer is None:
    return None, k, v
  T = k.shape[1]
  new = layer | _write(layer, positions, {"k": k, "v": v, "positions": positions})
  new["end_index"] = layer["end_index"] + jnp.int32(T)
  if _joins(layer, T):
    return new, _joined(layer, "k", k), _joined(layer, "v", v)
  return new, new["k"], new["v"]


def places(layer: LayerCache, positions: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """Slots and positions [B, S] of the keys once those of new tokens are appended; None for positions not kept.

  Args:
    layer: before.
    positions: [B, T] of the new tokens.
  """
  B, T = positions.shape
  if _joins(layer, T):
    return _joined(layer, "slots", slots(layer, T)), _joined(layer, "positions", positions)
  written = _write(layer, positions, {"positions": positions})
  S = layer["k"].shape[1]
  every = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  return written.get("slots", every), written.get("positions")


def _joins(layer: LayerCache, new_tokens: int) -> bool:
  """Whether queries need keys that their own call overwrites: in a ring, unless there is one query alone."""
  return is_ring(layer) and new_tokens > 1


def _joined(layer: LayerCache, name: str, new: jax.Array) -> jax.Array:
  return jnp.concatenate([layer[name], new.astype(layer[name].dtype)], axis=1)


def _write(layer: LayerCache, positions: jax.Array, new: dict[str, jax.Array]) -> LayerCache:
  """The arrays of `new` that the layer has, with new tokens at positions [B, T] written."""
  B, T = positions.shape
  index = slots(layer, T)
  if is_ring(layer):
    new = new | {"slots": index}
    index = _ring_slots(layer["slots"], positions)
  rows = jnp.arange(B, dtype=jnp.int32)[:, None]
  return {
    name: layer[name].at[rows, index].set(value.astype(layer[name].dtype), mode="drop")
    for name, value in new.items()
    if name in layer
  }


def _ring_slots(held: jax.Array, positions: jax.Array) -> jax.Array:
  """Where in a ring new tokens go: one after the other behind the newest, padding and all but the last R nowhere.

  Args:
    held: [B, R], the slots of the keys in the ring.
    positions: [B, T] of the new tokens.

  Returns:
    [B, T], R for nowhere.
  """
  R = held.shape[1]
  real = positions >= 0
  count = jnp.cumsum(real.astype(jnp.int32), axis=1)
  newest = jnp.argmax(held, axis=1, keepdims=True).astype(jnp.int32)
  return jnp.where(real & (count > count[:, -1:] - R), (newest + count) % R, R)
