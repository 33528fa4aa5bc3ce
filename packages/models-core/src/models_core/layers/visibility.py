"""Which keys a query sees: described by slots, positions, segments and a window, and evaluated a block at a time.

A mask [B, T, S] of a long sequence is larger than its keys and values, so that none is made unless a caller brings it.
Visibility follows from the positions of tokens, so that neither padding nor a prefill in chunks changes a logit.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NotRequired, Required, TypedDict

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from models_core.layers import cache as cache_lib

# Numbers of queries and of keys for which extremes are kept: blocks of attention have multiples of them.
QUERIES, KEYS = 64, 128
_LARGEST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Counted:
  """Says that query i and key i are the token at position i: kernels need a rule that is known when they are traced.

  Attributes:
    window: sliding window in tokens, or None.
  """

  window: int | None


class VisibleKeys(TypedDict, total=False):
  """Which keys each query sees, as a dictionary of arrays, like a cache. `visible_keys` makes it.

  A query sees a key if the key's slot is not greater than the query's, if their segments are the same, and if the
  window reaches back to the key. Without a mask the key's position must also be no greater than the query's, and not
  negative; with one, the mask decides instead.

  Attributes:
    query_slots: int [B, T].
    query_positions: int [B, T].
    key_slots: int [B, S].
    key_positions: int [B, S].
    query_segments: int [B, T], of packed sequences.
    key_segments: int [B, S], of packed sequences.
    window: int [], the sliding window in tokens.
    mask: bool or int [B or 1, T or 1, S].
    mask_of_slots: bool or int [B or 1, T or 1, slots], in place of `mask` for a ring, which holds keys in another order.
    extremes: of each block of queries and keys; missing if a size is symbolic, or T is less than QUERIES.
    counted: present if positions count from 0 in every row, without a cache and without a mask.
  """

  query_slots: Required[jax.Array]
  query_positions: Required[jax.Array]
  key_slots: Required[jax.Array]
  key_positions: Required[jax.Array]
  query_segments: jax.Array
  key_segments: jax.Array
  window: jax.Array
  mask: jax.Array
  mask_of_slots: jax.Array
  extremes: Extremes
  counted: Counted


class Extremes(TypedDict):
  """The least and greatest slots, positions and segments of each block in each row.

  They tell which blocks see one another.

  Attributes:
    last_query_slot: int [B, blocks of queries].
    last_query_position: int [B, blocks of queries].
    first_query_position: int [B, blocks of queries].
    first_slot: int [B, blocks of keys].
    first_position: int [B, blocks of keys], of keys that are no padding.
    last_position: int [B, blocks of keys].
    first_query_segment: int [B, blocks of queries], of packed sequences, as the next three.
    last_query_segment: int [B, blocks of queries].
    first_segment: int [B, blocks of keys].
    last_segment: int [B, blocks of keys].
  """

  last_query_slot: jax.Array
  last_query_position: jax.Array
  first_query_position: jax.Array
  first_slot: jax.Array
  first_position: jax.Array
  last_position: jax.Array
  first_query_segment: NotRequired[jax.Array]
  last_query_segment: NotRequired[jax.Array]
  first_segment: NotRequired[jax.Array]
  last_segment: NotRequired[jax.Array]


def is_causal(visible: VisibleKeys) -> bool:
  """Whether no mask replaces the causal rule."""
  return "mask" not in visible and "mask_of_slots" not in visible


def dense_mask(visible: VisibleKeys) -> jax.Array:
  """The mask of all queries and keys: bool [B, T, S]."""
  query, key = visible["query_positions"][:, :, None], visible["key_positions"][:, None, :]
  seen = visible["key_slots"][:, None, :] <= visible["query_slots"][:, :, None]
  if is_causal(visible):
    seen &= (key <= query) & (key >= 0)
  elif "mask" in visible:
    seen &= visible["mask"].astype(bool)
  else:
    mask, slots = visible["mask_of_slots"].astype(bool), visible["key_slots"]
    seen &= _at_slots(jnp.broadcast_to(mask, (slots.shape[0], *mask.shape[1:])), slots)
  if "window" in visible:
    seen &= key > query - visible["window"]
  if "query_segments" in visible:
    seen &= visible["query_segments"][:, :, None] == visible["key_segments"][:, None, :]
  return seen


def block_mask(
  visible: VisibleKeys, query: jax.Array | int, queries: int, key: jax.Array | int, keys: int
) -> jax.Array:
  """The mask of some queries and keys: bool [B, queries, keys].

  Args:
    visible: which keys each query sees.
    query: index of the first query.
    queries: number of queries.
    key: index of the first key.
    keys: number of keys.
  """
  whole: Any = visible
  part: Any = {name: whole[name] for name in ("window", "mask", "mask_of_slots") if name in whole}
  for side, start, size in (("query_", query, queries), ("key_", key, keys)):
    for name, array in whole.items():
      if name.startswith(side):
        part[name] = lax.dynamic_slice_in_dim(array, start, size, 1)
  if "mask" in part:
    part["mask"] = lax.dynamic_slice_in_dim(part["mask"], key, keys, 2)
  for name in part.keys() & {"mask", "mask_of_slots"}:
    if (rows := part[name].shape[1]) != 1:
      start = jnp.minimum(query, rows - queries)
      block = lax.dynamic_slice_in_dim(part[name], start, queries, 1)
      # The last block begins earlier than it should: its first rows are those of the block before.
      part[name] = jnp.roll(block, start - query, axis=1) if rows % queries else block
  return dense_mask(part)


def pad_queries(visible: VisibleKeys, queries: int) -> VisibleKeys:
  """The same with further queries at the end, up to a multiple of a number, of which it does not matter what they see.

  A mask is as large as all blocks: it gets further rows only if it has fewer than one block, see `block_mask`.
  """
  padded: Any = dict(visible)
  for name, array in list(padded.items()):
    is_mask = name.startswith("mask") and 1 < array.shape[1] < queries
    if name.startswith("query_") or is_mask:
      missing = -array.shape[1] % queries
      padded[name] = jnp.pad(array, [(0, missing if axis == 1 else 0) for axis in range(array.ndim)])
  return padded


def block_ranges(visible: VisibleKeys, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
  """For each block of queries, the first block of keys that it may see, and the one after the last.

  Args:
    visible: which keys each query sees, with extremes.
    queries: size of a block of queries, a multiple of QUERIES.
    keys: size of a block of keys, a multiple of KEYS.

  Returns:
    int32 [number of blocks of queries], twice.
  """
  extremes = visible["extremes"]
  of_queries = lambda reduce, x: reduce(x, queries // QUERIES)[:, :, None]
  of_keys = lambda reduce, x: reduce(x, keys // KEYS)[:, None, :]
  seen = of_keys(_least, extremes["first_slot"]) <= of_queries(_greatest, extremes["last_query_slot"])
  if is_causal(visible):
    seen &= of_keys(_least, extremes["first_position"]) <= of_queries(
      _greatest, extremes["last_query_position"]
    )
  if "window" in visible:
    first_query = of_queries(_least, extremes["first_query_position"])
    seen &= of_keys(_greatest, extremes["last_position"]) > first_query - visible["window"]
  if "query_segments" in visible:
    last_query = of_queries(_greatest, extremes["last_query_segment"])
    first_query = of_queries(_least, extremes["first_query_segment"])
    seen &= of_keys(_least, extremes["first_segment"]) <= last_query
    seen &= of_keys(_greatest, extremes["last_segment"]) >= first_query
  seen = jnp.any(seen, axis=0)  # a block that any row sees is visited for all
  blocks = jnp.arange(seen.shape[1], dtype=jnp.int32)
  first = jnp.min(jnp.where(seen, blocks, seen.shape[1]), axis=1)
  end = jnp.max(jnp.where(seen, blocks + 1, 0), axis=1)
  return jnp.minimum(first, end).astype(jnp.int32), end.astype(jnp.int32)


def _extremes(visible: VisibleKeys) -> Extremes:
  """The extremes of blocks of QUERIES queries and KEYS keys."""
  queries, keys, slots = visible["query_positions"], visible["key_positions"], visible["key_slots"]
  without_padding = lambda x: jnp.where(x >= 0, x, _LARGEST)
  found: Extremes = {
    "last_query_slot": _greatest(visible["query_slots"], QUERIES),
    "last_query_position": _greatest(queries, QUERIES),
    # Padding sees nothing, unless a mask says so.
    "first_query_position": _least(without_padding(queries) if is_causal(visible) else queries, QUERIES),
    "first_slot": _least(without_padding(slots), KEYS),
    "first_position": _least(without_padding(keys), KEYS),
    "last_position": _greatest(keys, KEYS),
  }
  if "query_segments" in visible:
    found["first_query_segment"] = _least(visible["query_segments"], QUERIES)
    found["last_query_segment"] = _greatest(visible["query_segments"], QUERIES)
    found["first_segment"] = _least(visible["key_segments"], KEYS)
    found["last_segment"] = _greatest(visible["key_segments"], KEYS)
  return found


def _least(x: jax.Array, size: int) -> jax.Array:
  """The least of each block of x, int [B, L] -> [B, blocks]."""
  return jnp.min(_blocks(x, size, jnp.iinfo(x.dtype).max), axis=2)


def _greatest(x: jax.Array, size: int) -> jax.Array:
  """The greatest of each block of x, int [B, L] -> [B, blocks]."""
  return jnp.max(_blocks(x, size, jnp.iinfo(x.dtype).min), axis=2)


def _blocks(x: jax.Array, size: int, filler: int) -> jax.Array:
  """Blocks of x, int [B, L] -> [B, blocks, size]; the filler completes the last one."""
  B, L = x.shape
  # Segments may be negative, or unsigned: the filler is a number of their dtype that changes no extreme.
  x = jnp.pad(x, ((0, 0), (0, -L % size)), constant_values=jnp.asarray(filler, x.dtype))
  return x.reshape(B, -(-L // size), size)


def visible_keys(
  positions: jax.Array,
  layer: cache_lib.LayerCache | None = None,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  window: int | None = None,
  *,
  counted: bool = False,
) -> VisibleKeys:
  """Describes which keys each query sees.

  Without a mask, attention is causal: a query sees a key if it was written no later than the query's own key and its
  position is no greater. A negative position marks padding, which no query sees.

  Args:
    positions: int [B, T], of the queries.
    layer: cache to which this call's keys will be appended; None if the queries' own tokens are the only keys.
    mask: bool or int [B, T or 1, S] over all slots of the cache, in place of the causal rule; a shorter one is padded
      with False.
    segment_ids: int or bool [B, T]; tokens of different segments do not see each other. Only without a cache.
    window: sliding window in tokens: a query at position p sees no key before position p - window + 1.
    counted: whether positions are known to count from 0 in every row.

  Returns:
    Visibility of the S keys that `extend_cache` returns, in the same order.

  Raises:
    TypeError: if positions are not integers, or segment_ids neither integers nor booleans.
    ValueError: if the mask or segment_ids have the wrong shape, if the mask holds floats, or if segment_ids come with a
      cache.
  """
  if not jnp.issubdtype(positions.dtype, jnp.integer):
    raise TypeError(f"positions are {positions.dtype}, expected integers: positions.astype(int) makes them")
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
  visible: VisibleKeys = {
    "query_slots": query_slots,
    "query_positions": positions,
    "key_slots": key_slots,
    "key_positions": key_positions,
  }
  if mask is not None:
    # A mask may show a query the keys of later queries, but no empty slots.
    visible["query_slots"] = jnp.broadcast_to(query_slots[:, -1:], (B, T))
    if layer is not None and cache_lib.is_ring(layer):
      visible["mask_of_slots"] = _fit_mask(mask, B, T, mask.shape[-1])
    else:
      visible["mask"] = _fit_mask(mask, B, T, key_slots.shape[1])
  if segment_ids is not None:
    visible["query_segments"] = visible["key_segments"] = checked_segments(segment_ids, B, T)
  if window is not None:
    visible["window"] = jnp.int32(window)
  if counted and layer is None and mask is None:
    visible["counted"] = Counted(window)
  return with_extremes(visible)


def checked_segments(segment_ids: ArrayLike, B: int, T: int) -> jax.Array:
  """Segments of tokens as integers: [B, T], where either B may be 1.

  Raises:
    TypeError: if they are neither integers nor booleans.
    ValueError: if they have another shape.
  """
  segments = jnp.asarray(segment_ids)
  if segments.dtype == bool:
    segments = segments.astype(jnp.int32)
  if not jnp.issubdtype(segments.dtype, jnp.integer):
    raise TypeError(
      f"segment_ids are {segments.dtype}, expected integers that number the sequences of a row: segment_ids.astype(int) "
      "makes them"
    )
  rows, tokens = segments.shape if segments.ndim == 2 else (None, None)
  if tokens != T or (rows != B and 1 not in (rows, B)):
    raise ValueError(
      f"segment_ids have shape {segments.shape}, expected [B, T], the shape {(B, T)} of positions"
    )
  return segments


def keys_of_mask(mask: jax.Array) -> VisibleKeys:
  """Visibility by a mask alone, bool [B, T, S]."""
  B, T, S = mask.shape
  query, key = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
  return with_extremes(
    {"query_slots": query, "query_positions": query, "key_slots": key, "key_positions": key, "mask": mask}
  )


def with_extremes(visible: VisibleKeys) -> VisibleKeys:
  """Adds the extremes of its blocks, where sizes are numbers and there are enough queries for a block."""
  B, T = visible["query_slots"].shape
  sizes = (B, T, visible["key_slots"].shape[1])
  if all(isinstance(n, int) for n in sizes) and T >= QUERIES:
    visible["extremes"] = _extremes(visible)
  return visible


def _fit_mask(mask: jax.Array, B: int, T: int, S: int) -> jax.Array:
  """Checks a caller's mask, and pads its last axis to S: [B or 1, T or 1, S]."""
  if mask.ndim != 3 or mask.shape[0] not in (1, B) or mask.shape[1] not in (1, T) or mask.shape[2] > S:
    remedy = "; make_causal_attn_mask makes one from a padding mask [B, T]" if mask.ndim == 2 else ""
    raise ValueError(f"attention_mask has shape {mask.shape}, expected [B={B}, T={T} or 1, S<={S}]{remedy}")
  if jnp.issubdtype(mask.dtype, jnp.floating):
    raise ValueError(
      f"attention_mask is {mask.dtype}, expected booleans, True where a query sees a key: pass mask == 0 for a mask "
      "that is added to the logits"
    )
  return jnp.pad(mask, ((0, 0), (0, 0), (0, S - mask.shape[2])))


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
