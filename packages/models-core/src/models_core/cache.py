"""The KV cache: one dictionary of arrays a layer.

`{"layer_0": {"k": [B, S, K, H], "v": [B, S, K, H], "end_index": [B], "positions": [B, S]}, ...}`. Slots fill
from the left, row by row; `end_index` counts those in use. `positions` holds each key's position in its
sequence, negative where a slot holds padding. A cache made elsewhere may lack it: slots then stand for positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from models_core.errors import CacheError
from models_core.sharding import fit

LayerCache = dict[str, jax.Array]
Cache = dict[str, LayerCache]


def init_layer(
  batch_size: int,
  cache_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype,
  *,
  mesh: Mesh | AbstractMesh | None,
  spec: PartitionSpec,
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
  """
  kv, row = (batch_size, cache_size, num_kv_heads, head_dim), spec[:2]
  arrays = {
    "k": (kv, spec, dtype, 0),
    "v": (kv, spec, dtype, 0),
    "end_index": (kv[:1], row[:1], jnp.int32, 0),
    "positions": (kv[:2], row, jnp.int32, -1),
  }
  return {
    name: _full(shape, value, dtype, mesh, PartitionSpec(*spec)) for name, (shape, spec, dtype, value) in arrays.items()
  }


def _full(shape, value, dtype, mesh, spec) -> jax.Array:
  if mesh is None:
    return jnp.full(shape, value, dtype)
  spec, _ = fit(shape, spec, mesh)
  if isinstance(mesh, Mesh):
    return jnp.full(shape, value, dtype, device=NamedSharding(mesh, spec))
  # Inside jit a mesh is abstract.
  if mesh.explicit_axes:
    return jax.sharding.reshard(jnp.full(shape, value, dtype), NamedSharding(mesh, spec))
  return jax.lax.with_sharding_constraint(jnp.full(shape, value, dtype), NamedSharding(mesh, spec))


def check_room(cache: Cache, new_tokens: int) -> None:
  """Refuses a call that would write past the cache.

  Under jit only the sizes are known: tokens that find no room there are not written, and their logits are NaN.

  Raises:
    CacheError: naming the row and the sizes.
  """
  for name, layer in cache.items():
    size, end = layer["k"].shape[1], layer["end_index"]
    if isinstance(end, jax.core.Tracer):
      used, row = 0, 0
    else:
      used, row = int(jnp.max(end)), int(jnp.argmax(end))
    if used + new_tokens > size:
      raise CacheError(
        f"{name}: {new_tokens} more tokens do not fit into a cache of {size} slots, of which row {row} uses "
        f"{used}: make it with init_cache(..., cache_size={used + new_tokens}) or more"
      )
    return  # All layers of a cache advance together.


def slots(layer: LayerCache, new_tokens: int) -> jax.Array:
  """Slots [B, T] that the next tokens take."""
  return layer["end_index"][:, None] + jnp.arange(new_tokens, dtype=jnp.int32)


def update(layer: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
  """Appends keys and values.

  Args:
    layer: of S slots.
    k: [B, T, K, H].
    v: [B, T, K, H].
    positions: [B, T].

  Returns:
    The layer, T slots further. What lies beyond S is dropped, never wrapped.
  """
  index = slots(layer, k.shape[1])
  rows = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
  new = {"k": k, "v": v, "positions": positions}
  written = {
    name: layer[name].at[rows, index].set(value.astype(layer[name].dtype), mode="drop")
    for name, value in new.items()
    if name in layer
  }
  return layer | written | {"end_index": layer["end_index"] + jnp.int32(k.shape[1])}
