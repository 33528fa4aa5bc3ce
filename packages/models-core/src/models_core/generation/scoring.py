"""Log-probabilities of given continuations, without logits of all tokens at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from models_core.errors import ConfigError
from models_core.generation.placement import Placed, Structure
from models_core.generation.programs import Places, cache_program
from models_core.generation.prompts import Prompt, check_prompts, chunks, slots_of
from models_core.layers import Cache, log_probs, shard

# Tokens of a row whose logits are there at once; a divisor of the lengths of all chunks.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Scored:
  """The continuation of one prompt.

  Attributes:
    log_probs: float32 [N] of its tokens.
    is_likeliest: bool [N], whether a token is the likeliest.
  """

  log_probs: np.ndarray
  is_likeliest: np.ndarray


def score(
  model: Any,
  prompts: Sequence[Prompt],
  continuations: Sequence[Prompt],
  *,
  context: int | None = None,
  cache_dtype: Any = None,
) -> list[Scored]:
  """Computes log-probabilities of continuations. All rows run together.

  Texts run through the model in chunks, as prompts do, so that memory does not grow with their length but for the KV
  cache.

  Args:
    model: as `stream` takes it.
    prompts: at least one token id for each.
    continuations: at least one token id for each prompt.
    context: tokens of a row that the model was made for; a longer row is an error. None does not check it.
    cache_dtype: of the cached keys and values; None takes the model's default.

  Raises:
    ConfigError: as `stream`, or if there is not one continuation for each prompt, or one is empty.
  """
  placed = Placed.of(model)
  if len(prompts) != len(continuations):
    raise ConfigError(
      f"there are {len(prompts)} prompts and {len(continuations)} continuations: give one for each prompt"
    )
  before = check_prompts(prompts, num_embed=placed.num_embed)
  try:
    after = check_prompts(continuations, num_embed=placed.num_embed)
  except ConfigError as error:
    raise ConfigError(f"among the continuations, {error}") from None
  rows = check_prompts([np.concatenate(pair) for pair in zip(before, after, strict=True)], context=context)
  # The last token predicts nothing that is asked for.
  inputs = [row[:-1] for row in rows]
  size = slots_of(max(map(len, inputs)))
  cache = placed.run(cache_program(placed.structure, len(rows), size, cache_dtype))
  found = []
  program = _score_program(placed.structure, Places.of(cache))
  targets = (tokens for tokens, _ in chunks([row[1:] for row in rows]))
  for (tokens, positions), wanted in zip(chunks(inputs), targets, strict=True):
    *numbers, cache = placed.run(program, tokens, positions, wanted, cache)
    found.append(numbers)
  values, likeliest = (
    np.concatenate([np.asarray(part) for part in parts], axis=1) for parts in zip(*found, strict=True)
  )
  return [Scored(values[i, -len(row) :], likeliest[i, -len(row) :]) for i, row in enumerate(after)]


@functools.lru_cache(16)
def _score_program(structure: Structure, places: Places) -> Callable[..., tuple[jax.Array, jax.Array, Cache]]:
  """Log-probabilities of targets [B, C] behind the tokens of a chunk, whether they are the likeliest, and the cache."""

  def run(
    leaves: list[jax.Array], tokens: jax.Array, positions: jax.Array, targets: jax.Array, cache: Cache
  ) -> tuple[jax.Array, jax.Array, Cache]:
    hidden, cache = structure.call(leaves, tokens, positions, cache, skip_lm_head=True)
    B, C = tokens.shape
    blocks = lambda x: jnp.moveaxis(x.reshape(B, C // _BLOCK, _BLOCK, *x.shape[2:]), 1, 0)

    def of_block(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      logits = structure.model(leaves).compute_final_logits(block[0])
      return log_probs(logits, block[1]), jnp.argmax(logits, axis=-1) == block[1]

    joined = lambda x: shard(jnp.moveaxis(x, 0, 1).reshape(B, C), PartitionSpec())
    values, likeliest = lax.map(of_block, (blocks(hidden), blocks(targets)))
    return joined(values), joined(likeliest), cache

  return jax.jit(run, donate_argnames=("cache",), out_shardings=(None, None, places.tree()))
