"""The compiled programs of generation. Each takes a model's arrays as its first argument.

One program runs a chunk of the prompts for each of few lengths, one chooses the first token, and one loops over all
others. Numbers of a sampling, ends, seeds and the number of steps are arguments, so that they compile nothing anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from models_core.generation.placement import Structure
from models_core.generation.sampling import Numbers, Steps, choose
from models_core.generation.stopping import NO_TOKEN, Ends, is_end, no_recent, push
from models_core.layers import Cache, shard

Leaves = list[jax.Array]
# Steps of the loop between two looks of the host, at most.
LONGEST = 32
# How many structures keep their programs.
_STRUCTURES = 16


class Rows(TypedDict):
  """Where the rows of a batch stand.

  Attributes:
    cache: of all tokens but the newest; only in the loop.
    token: int32 [B], the newest of each row.
    position: int32 [B], its position.
    ended: bool [B], whether no token follows.
    count: int32 [], new tokens so far.
    seeds: uint32 [B], of the sampling.
    recent: int32 [B, M], the newest tokens, for stop sequences.
    seen: bool [B, V], tokens of prompt and answer; missing if repetitions are not penalised.
  """

  cache: NotRequired[Cache]
  token: jax.Array
  position: jax.Array
  ended: jax.Array
  count: jax.Array
  seeds: jax.Array
  recent: jax.Array
  seen: NotRequired[jax.Array]


class Drawn(TypedDict):
  """New tokens, as the host reads them.

  Attributes:
    tokens: int32 [B, N], NO_TOKEN where a row has none.
    log_probs: float32 [B, N].
    ended: bool [B].
  """

  tokens: jax.Array
  log_probs: jax.Array
  ended: jax.Array


@dataclasses.dataclass(frozen=True)
class Places:
  """How a cache is sharded. Programs keep it so, since the compiler's own choice would compile the next call anew.

  Attributes:
    structure: of the cache.
    shardings: of its arrays.
  """

  structure: Any
  shardings: tuple[jax.sharding.Sharding, ...]

  @classmethod
  def of(cls, cache: Cache) -> Places:
    """The places of a cache that lies on devices."""
    arrays, structure = jax.tree.flatten(cache)
    return cls(structure, tuple(array.sharding for array in arrays))

  def tree(self) -> Any:
    """The shardings as a tree."""
    return jax.tree.unflatten(self.structure, self.shardings)


@functools.lru_cache(_STRUCTURES)
def cache_program(structure: Structure, rows: int, size: int, dtype: Any) -> Callable[[Leaves], Cache]:
  """Makes an empty cache; layers with a sliding window keep only its tokens, which changes no logit."""

  def make(leaves: Leaves) -> Cache:
    return structure.model(leaves).init_cache(rows, size, dtype, ring=True)

  return jax.jit(make)


@functools.lru_cache(_STRUCTURES)
def prefill_program(structure: Structure, places: Places) -> Callable[..., tuple[jax.Array, Cache]]:
  """Runs a chunk of tokens [B, C]: the hidden states of the last ones [B, 1, D], and the cache."""

  def prefill(
    leaves: Leaves, tokens: jax.Array, positions: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    return structure.call(leaves, tokens, positions, cache, skip_lm_head=True, decode_only_last_token=True)

  return jax.jit(prefill, donate_argnames=("cache",), out_shardings=(None, places.tree()))


@functools.lru_cache(_STRUCTURES)
def repeat_program(structure: Structure, size: int, dtype: Any) -> Callable[..., Cache]:
  """Makes a cache with the rows int32 [B] of another one, which stays as it is."""

  def fresh(leaves: Leaves, rows: int) -> Cache:
    return structure.model(leaves).init_cache(rows, size, dtype, ring=True)

  def repeat(leaves: Leaves, cache: Cache, rows: jax.Array) -> Cache:
    one, two = (jax.eval_shape(functools.partial(fresh, rows=n), leaves) for n in (1, 2))

    def take(one: Any, two: Any, x: jax.Array, new: jax.Array) -> jax.Array:
      # The layout of a cache is its own: the axis of rows is the one that grows with their number.
      axis = next(i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b)
      # The new array says how rows are sharded.
      return lax.dynamic_update_slice(new, jnp.take(x, rows, axis, mode="clip"), (0,) * x.ndim)

    return jax.tree.map(take, one, two, cache, fresh(leaves, rows.shape[0]))

  return jax.jit(repeat)


@functools.lru_cache(_STRUCTURES)
def rewind_program(places: Places) -> Callable[..., Cache]:
  """Drops the tokens at positions from `length` on. Their slots stay in use, as those of padding do."""

  def rewind(leaves: Leaves, cache: Cache, length: jax.Array) -> Cache:
    def cut(positions: jax.Array) -> jax.Array:
      return jnp.where(positions >= length, -1, positions)

    return {name: layer | {"positions": cut(layer["positions"])} for name, layer in cache.items()}

  return jax.jit(rewind, donate_argnames=("cache",), out_shardings=places.tree())


@functools.lru_cache(_STRUCTURES)
def begin_program(structure: Structure, steps: Steps) -> Callable[..., tuple[Rows, Drawn]]:
  """Chooses the first token of each row.

  It takes the hidden states [U, 1, D] of the prompts' last tokens, the prompt int32 [B] that each row continues, the
  lengths int32 [B] of the prompts, seeds uint32 [B], the tokens that rows hold, bool [B, V] or None, and the numbers and
  ends.
  """

  def begin(
    leaves: Leaves,
    hidden: jax.Array,
    prompts: jax.Array,
    lengths: jax.Array,
    seeds: jax.Array,
    seen: jax.Array | None,
    numbers: Numbers,
    ends: Ends,
  ) -> tuple[Rows, Drawn]:
    logits = structure.model(leaves).compute_final_logits(hidden)[:, 0]
    logits = jnp.take(logits, prompts, axis=0, mode="clip")
    rows: Rows = {
      "token": jnp.full_like(prompts, NO_TOKEN),
      "position": lengths - 1,
      "ended": jnp.zeros(prompts.shape, bool),
      "count": jnp.int32(0),
      "seeds": seeds,
      "recent": no_recent(prompts.shape[0], ends),
    }
    if seen is not None:
      rows["seen"] = seen
    rows, tokens, log_probs = _append(rows, logits, steps, numbers, ends)
    return _whole(rows), _drawn(tokens[:, None], log_probs[:, None], rows)

  return jax.jit(begin)


@functools.lru_cache(_STRUCTURES)
def decode_program(
  structure: Structure, steps: Steps, places: Places
) -> Callable[..., tuple[Cache, Rows, Drawn]]:
  """Loops over up to LONGEST tokens of each row, until as many as asked for are there or all rows have ended.

  It takes the cache and the rows, which are donated, further rows that end, bool [B], the number of tokens, and the numbers and ends.
  """

  def decode(
    leaves: Leaves,
    cache: Cache,
    rows: Rows,
    ended: jax.Array,
    count: jax.Array,
    numbers: Numbers,
    ends: Ends,
  ) -> tuple[Cache, Rows, Drawn]:
    B = ended.shape[0]

    def goes_on(state: tuple[jax.Array, Rows, jax.Array, jax.Array]) -> jax.Array:
      i, rows, _, _ = state
      return (i < count) & ~jnp.all(rows["ended"])

    def step(state: tuple[jax.Array, Rows, jax.Array, jax.Array]) -> Any:
      i, rows, tokens, log_probs = state
      # A row that ended goes on with padding, which no token sees.
      fed = jnp.maximum(rows["token"], 0)[:, None]
      position = jnp.where(rows["ended"], -1, rows["position"])[:, None]
      logits, cache = structure.call(leaves, fed, position, rows["cache"])
      new, token, log_prob = _append(rows, logits[:, 0], steps, numbers, ends)
      new["cache"] = cache
      return i + 1, new, tokens.at[:, i].set(token), log_probs.at[:, i].set(log_prob)

    rows = {**rows, "cache": cache, "ended": rows["ended"] | ended}
    start = (jnp.int32(0), rows, jnp.full((B, LONGEST), NO_TOKEN, jnp.int32), jnp.zeros((B, LONGEST)))
    _, rows, tokens, log_probs = lax.while_loop(goes_on, step, start)
    cache = rows.pop("cache")
    return cache, _whole(rows), _drawn(tokens, log_probs, rows)

  return jax.jit(decode, donate_argnames=("cache", "rows"), out_shardings=(places.tree(), None, None))


def _append(
  rows: Rows, logits: jax.Array, steps: Steps, numbers: Numbers, ends: Ends
) -> tuple[Rows, jax.Array, jax.Array]:
  """Chooses a token for each row that has not ended: the rows, tokens and log-probabilities [B]."""
  key_of = lambda seed: jax.random.fold_in(jax.random.key(seed), rows["count"])
  tokens, log_probs = choose(logits, jax.vmap(key_of)(rows["seeds"]), rows.get("seen"), steps, numbers)
  new: Rows = {**rows}
  was = rows["ended"]
  new["recent"] = push(rows["recent"], tokens)
  new["ended"] = was | is_end(tokens, new["recent"], ends)
  new["token"], new["position"], new["count"] = tokens, rows["position"] + 1, rows["count"] + 1
  if "seen" in rows:
    new["seen"] = rows["seen"].at[jnp.arange(tokens.shape[0]), tokens].set(True)
  return new, jnp.where(was, NO_TOKEN, tokens), jnp.where(was, 0, log_probs)


def _drawn(tokens: jax.Array, log_probs: jax.Array, rows: Rows) -> Drawn:
  """The new tokens, as every process can read them."""
  drawn: Drawn = {"tokens": tokens, "log_probs": log_probs, "ended": rows["ended"]}
  return _whole(drawn)


def _whole(tree: Any) -> Any:
  """The same arrays, whole on each device."""
  return jax.tree.map(lambda x: shard(x, PartitionSpec()), tree)
