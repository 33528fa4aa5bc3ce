"""Which keys a query sees: described by slots, positions, segments and a window, and evaluated a block at a time.

A mask [B, T, S] of a long sequence is larger than its keys and values, so that none is made unless a caller brings it.
Visibility follows from the positions of tokens, so that neither padding nor a prefill in chunks changes a logit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from models_core.layers import cache as cache_lib

# Numbers of queries and of keys for which extremes are kept: blocks of attention have multiples of them.
QUERIES, KEYS = 64, 128
_LARGEST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisibleKeys:
  """Which keys each query sees. `visible_keys` makes it.

  A query sees a key if the key's slot is not greater than the query's, if their segments are the same, and if the
  window reaches back to the key. Without a mask the key's position must also be no greater than the query's, and not
  negative; with one, the mask decides instead.

  Attributes:
    query_slots: int [B, T].
    query_positions: int [B, T].
    key_slots: int [B, S].
    key_positions: int [B, S].
    query_segments: int [B, T], or None.
    key_segments: int [B, S], or None.
    mask: bool [B or 1, T or 1, S], or None. For a ring it has a column for each slot instead of each key.
    extremes: of each block of queries and keys; None if T or S is symbolic.
    window: sliding window in tokens, or None.
    ring: whether the columns of the mask are slots.
  """

  query_slots: jax.Array
  query_positions: jax.Array
  key_slots: jax.Array
  key_positions: jax.Array
  query_segments: jax.Array | None = None
  key_segments: jax.Array | None = None
  mask: jax.Array | None = None
  extremes: Extremes | None = None
  window: int | None = dataclasses.field(default=None, metadata={"static": True})
  ring: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int, int]:
    """B, T and S."""
    B, T = self.query_slots.shape
    return B, T, self.key_slots.shape[1]

  def dense(self) -> jax.Array:
    """The mask of all queries and keys: bool [B, T, S]."""
    return self._evaluate(self, self.mask)

  def block(self, query: jax.Array | int, queries: int, key: jax.Array | int, keys: int) -> jax.Array:
    """The mask of some queries and keys: bool [B, queries, keys].

    Args:
      query: index of the first query.
      queries: number of queries.
      key: index of the first key.
      keys: number of keys.
    """
    cut = {"query": (query, queries), "key": (key, keys)}
    parts: dict[str, Any] = {}
    for side, (start, size) in cut.items():
      for name in ("slots", "positions", "segments"):
        array = getattr(self, f"{side}_{name}")
        parts[f"{side}_{name}"] = None if array is None else lax.dynamic_slice_in_dim(array, start, size, 1)
    mask = self.mask
    if mask is not None and mask.shape[1] != 1:
      mask = lax.dynamic_slice_in_dim(mask, query, queries, 1)
    if mask is not None and not self.ring:
      mask = lax.dynamic_slice_in_dim(mask, key, keys, 2)
    return self._evaluate(dataclasses.replace(self, **parts), mask)

  @staticmethod
  def _evaluate(part: VisibleKeys, mask: jax.Array | None) -> jax.Array:
    """The mask of all queries and keys of a part, for which a caller's mask has been cut."""
    query, key = part.query_positions[:, :, None], part.key_positions[:, None, :]
    visible = part.key_slots[:, None, :] <= part.query_slots[:, :, None]
    if mask is None:
      visible &= (key <= query) & (key >= 0)
    else:
      if part.ring:
        mask = _at_slots(jnp.broadcast_to(mask, (part.shape[0], *mask.shape[1:])), part.key_slots)
      visible &= mask
    if part.window is not None:
      visible &= key > query - part.window
    if part.query_segments is not None and part.key_segments is not None:
      visible &= part.query_segments[:, :, None] == part.key_segments[:, None, :]
    return visible

  def pad_queries(self, new: int) -> VisibleKeys:
    """The same with further queries at the end, of which it does not matter what they see."""
    if not new:
      return self
    pad = lambda x, axis: jnp.pad(x, [(0, new if i == axis else 0) for i in range(x.ndim)])
    segments, mask = self.query_segments, self.mask
    return dataclasses.replace(
      self,
      query_slots=pad(self.query_slots, 1),
      query_positions=pad(self.query_positions, 1),
      query_segments=None if segments is None else pad(segments, 1),
      mask=mask if mask is None or mask.shape[1] == 1 else pad(mask, 1),
    )

  def ranges(self, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """For each block of queries, the first block of keys that it may see, and the one after the last.

    Args:
      queries: size of a block of queries, a multiple of QUERIES.
      keys: size of a block of keys, a multiple of KEYS.

    Returns:
      int32 [number of blocks of queries], twice.
    """
    assert self.extremes is not None
    e = self.extremes.merged(queries // QUERIES, keys // KEYS)
    seen = e.first_slot[None, :] <= e.last_query_slot[:, None]
    if self.mask is None:
      seen &= e.first_position[None, :] <= e.last_query_position[:, None]
    if self.window is not None:
      seen &= e.last_position[None, :] > e.first_query_position[:, None] - self.window
    blocks = jnp.arange(seen.shape[1], dtype=jnp.int32)
    first = jnp.min(jnp.where(seen, blocks, seen.shape[1]), axis=1)
    end = jnp.max(jnp.where(seen, blocks + 1, 0), axis=1)
    return jnp.minimum(first, end).astype(jnp.int32), end.astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extremes:
  """The least and greatest slots and positions of each block, over all rows: they tell which blocks see one another.

  Attributes:
    last_query_slot: of each block of queries.
    last_query_position: of each block of queries.
    first_query_position: of each block of queries.
    first_slot: of each block of keys, as are the following.
    first_position: of keys that are no padding.
    last_position: of keys.
  """

  last_query_slot: jax.Array
  last_query_position: jax.Array
  first_query_position: jax.Array
  first_slot: jax.Array
  first_position: jax.Array
  last_position: jax.Array

  @classmethod
  def of(cls, keys: VisibleKeys) -> Extremes:
    """The extremes of blocks of QUERIES queries and KEYS keys."""
    least = lambda x, size: _reduced(x, size, jnp.min, _LARGEST)
    greatest = lambda x, size: _reduced(x, size, jnp.max, -1)
    # Without a mask, padding sees nothing and is not seen.
    queries = keys.query_positions
    if keys.mask is None:
      queries = jnp.where(queries >= 0, queries, _LARGEST)
    real = jnp.where(keys.key_positions >= 0, keys.key_positions, _LARGEST)
    return cls(
      greatest(keys.query_slots, QUERIES),
      greatest(keys.query_positions, QUERIES),
      least(queries, QUERIES),
      least(jnp.where(keys.key_slots >= 0, keys.key_slots, _LARGEST), KEYS),
      least(real, KEYS),
      greatest(keys.key_positions, KEYS),
    )

  def merged(self, queries: int, keys: int) -> Extremes:
    """The extremes of larger blocks, of so many blocks of queries and of keys."""
    least = lambda x, size: _reduced(x[None], size, jnp.min, _LARGEST)
    greatest = lambda x, size: _reduced(x[None], size, jnp.max, -1)
    return Extremes(
      greatest(self.last_query_slot, queries),
      greatest(self.last_query_position, queries),
      least(self.first_query_position, queries),
      least(self.first_slot, keys),
      least(self.first_position, keys),
      greatest(self.last_position, keys),
    )


def _reduced(x: jax.Array, size: int, function: Callable[..., jax.Array], neutral: int) -> jax.Array:
  """Reduces blocks of x [B, L] over all rows -> [blocks]; the last block may be incomplete."""
  B, L = x.shape
  x = jnp.pad(x, ((0, 0), (0, -L % size)), constant_values=neutral)
  return function(x.reshape(B, -1, size), axis=(0, 2))


def visible_keys(
  positions: jax.Array,
  layer: cache_lib.LayerCache | None = None,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  window: int | None = None,
) -> VisibleKeys:
  """Describes which keys each query sees.

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
    Visibility of the S keys that `extend_cache` returns, in the same order.

  Raises:
    ValueError: if the mask has the wrong shape or holds floats, or if segment_ids come with a cache.
  """
  B, T = positions.shape
  if layer is None:
    query_slots = key_slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    key_positions = positions
  else:
    if segment_ids is not None:
      raise ValueError(
        "segment_ids cannot be combined with a cache: pass cache=None, or put each sequence into a row of its own"
      )
    query_slots = cache_lib.slots(layer, T)
    key_slots, kept = cache_lib.places(layer, positions)
    if kept is None:
      key_positions, positions = key_slots, query_slots
    else:
      key_positions = kept
  ring = layer is not None and cache_lib.is_ring(layer)
  if mask is not None:
    mask = _fit_mask(mask, B, T, mask.shape[-1] if ring else key_slots.shape[1])
    # A mask may show a query the keys of later queries, but no empty slots.
    query_slots = jnp.broadcast_to(query_slots[:, -1:], (B, T))
  return _with_extremes(
    VisibleKeys(
      query_slots, positions, key_slots, key_positions, segment_ids, segment_ids, mask, None, window, ring
    )
  )


def keys_of_mask(mask: jax.Array) -> VisibleKeys:
  """Visibility by a mask alone, bool [B, T, S]."""
  B, T, S = mask.shape
  zeros = lambda size: jnp.zeros((B, size), jnp.int32)
  return _with_extremes(VisibleKeys(zeros(T), zeros(T), zeros(S), zeros(S), mask=mask))


def _with_extremes(visible: VisibleKeys) -> VisibleKeys:
  """Adds the extremes, which need sizes that are numbers."""
  if not all(isinstance(size, int) for size in visible.shape):
    return visible
  return dataclasses.replace(visible, extremes=Extremes.of(visible))


def _fit_mask(mask: jax.Array, B: int, T: int, S: int) -> jax.Array:
  """Checks a caller's mask, and pads its last axis to S: bool [B or 1, T or 1, S]."""
  if mask.ndim != 3 or mask.shape[0] not in (1, B) or mask.shape[1] not in (1, T) or mask.shape[2] > S:
    remedy = "; make_causal_attn_mask makes one from a padding mask [B, T]" if mask.ndim == 2 else ""
    raise ValueError(f"attention_mask has shape {mask.shape}, expected [B={B}, T={T} or 1, S<={S}]{remedy}")
  if jnp.issubdtype(mask.dtype, jnp.floating):
    raise ValueError(
      f"attention_mask is {mask.dtype}, expected booleans, True where a query sees a key: pass mask == 0 for a mask "
      "that is added to the logits"
    )
  return jnp.pad(mask.astype(bool), ((0, 0), (0, 0), (0, S - mask.shape[2])))


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
