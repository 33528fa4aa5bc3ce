"""Runs prompts through a model: a beginning that they share once, and chunk after chunk, so that memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from models_core.errors import ConfigError
from models_core.generation.placement import Placed
from models_core.generation.programs import Places, cache_program, prefill_program, repeat_program
from models_core.generation.prompts import Prompt, check_prompts, chunks, shared_length, slots_of
from models_core.layers import Cache


class Prefix:
  """Token ids that the prompts of several calls begin with, such as a system prompt, and their keys and values.

  They run through the model once for each size of the KV cache: give the calls one `cache_size`.
  """

  def __init__(self, model: Any, ids: Prompt):
    """Keeps the model as it is now: make a new prefix when its weights change.

    Args:
      model: a `models_core.layers.CausalLM`.
      ids: at least one token id.

    Raises:
      ConfigError: if there are no ids, or one is outside the vocabulary.
    """
    self._placed = Placed.of(model)
    (self.ids,) = check_prompts([ids], num_embed=self._placed.num_embed)
    self._caches: dict[tuple[int, Any], Cache] = {}

  def cache(self, size: int, dtype: Any) -> Cache:
    """A cache of one row that holds the prefix. It must not be donated."""
    if (size, dtype) not in self._caches:
      _, self._caches[size, dtype] = run_rows(self._placed, [self.ids], size, dtype)
    return self._caches[size, dtype]


class Beginning:
  """What all prompts of a call begin with, and what follows it in each.

  Attributes:
    prefix: that runs once for all; None if they share too little.
    rests: int32 [T] of each row.
    slots: of the KV cache that prefix and rests take.
  """

  def __init__(self, model: Any, rows: Sequence[np.ndarray], prefix: Prefix | None):
    """Splits prompts after the prefix that is given, or after what they share.

    Raises:
      ConfigError: if a prompt does not begin with the prefix, or nothing follows it.
    """
    if prefix is None and (length := shared_length(rows)):
      prefix = Prefix(model, rows[0][:length])
    for i, row in enumerate(rows if prefix else ()):
      known = prefix.ids if prefix else ()
      if len(row) <= len(known) or (row[: len(known)] != known).any():
        raise ConfigError(
          f"prompt {i} does not begin with the {len(known):,} tokens of the prefix, or nothing follows them: give whole "
          "prompts, prefix included"
        )
    self.prefix = prefix
    self.rests = [row[len(prefix.ids) :] for row in rows] if prefix else list(rows)
    self.slots = slots_of(max(map(len, self.rests))) + (slots_of(len(prefix.ids)) if prefix else 0)

  def run(self, placed: Placed, size: int, dtype: Any) -> tuple[jax.Array, Cache]:
    """Hidden states of the prompts' last tokens [B, 1, D], and a cache of `size` slots."""
    if self.prefix is None:
      return run_rows(placed, self.rests, size, dtype)
    rows = np.zeros(len(self.rests), np.int32)
    cache = placed.run(repeat_program(placed.structure, size, dtype), self.prefix.cache(size, dtype), rows)
    return run_rows(placed, self.rests, size, dtype, cache, len(self.prefix.ids))


def run_rows(
  placed: Placed,
  rows: Sequence[np.ndarray],
  size: int,
  dtype: Any,
  cache: Cache | None = None,
  start: int = 0,
) -> tuple[jax.Array, Cache]:
  """Runs rows chunk after chunk.

  Args:
    placed: the model.
    rows: int32 [T] of each row.
    size: slots of the cache.
    dtype: of keys and values, or None.
    cache: that the rows continue, and that is overwritten; None makes an empty one.
    start: position of each row's first token.

  Returns:
    Hidden states of the rows' last tokens [B, 1, D], and the cache.
  """
  if cache is None:
    cache = placed.commit(placed.run(cache_program(placed.structure, len(rows), size, dtype)))
  program = prefill_program(placed.structure, Places.of(cache))
  for tokens, positions in chunks(rows, start):
    hidden, cache = placed.run(program, tokens, positions, cache)
  return hidden, cache
