"""Prompts as arrays: checked, and cut into chunks of few lengths, so that few programs are compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models_core.errors import ConfigError

# Tokens of a row that run through the model at once.
CHUNK = 512
# Lengths of chunks, all multiples of the first. A prompt is filled up by at most half of its length, or by the first.
_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, CHUNK)
# A shorter beginning that prompts share takes less time than the program for it.
_WORTH_SHARING = 64
_PADDING = -1

Prompt = Sequence[int] | np.ndarray


def check_prompts(
  prompts: Sequence[Prompt],
  *,
  num_embed: int | None = None,
  context: int | None = None,
  new_tokens: int = 0,
) -> list[np.ndarray]:
  """Checks prompts, which needs no model.

  Args:
    prompts: token ids of each row.
    num_embed: V, the size of the model's vocabulary; None does not check the ids.
    context: tokens of a row that the model was made for; None does not check it.
    new_tokens: that are to follow each prompt.

  Returns:
    int32 [T] for each row.

  Raises:
    ConfigError: if there is no prompt; one is empty, or holds an id outside the vocabulary; or prompt and new tokens are
      longer than the context.
  """
  if isinstance(prompts, str) or len(prompts) == 0:
    raise ConfigError("there is no prompt: give a list of prompts, each a list of at least one token id")
  rows = [_checked(row, i, num_embed) for i, row in enumerate(prompts)]
  if context is not None:
    for i, row in enumerate(rows):
      if len(row) + new_tokens > context:
        new = f" and {new_tokens:,} new one{'s' * (new_tokens > 1)}" if new_tokens else ""
        remedy = "shorten it" if len(row) >= context else f"ask for at most {context - len(row):,} new tokens"
        raise ConfigError(
          f"prompt {i} has {len(row):,} tokens{new}, but the model's context is {context:,}: {remedy}"
        )
  return rows


def _checked(prompt: Any, index: int, num_embed: int | None) -> np.ndarray:
  ids = None if isinstance(prompt, str) else np.asarray(prompt)
  if ids is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
    found = "a text" if ids is None else "a number" if ids.ndim == 0 else f"{ids.dtype} {list(ids.shape)}"
    raise ConfigError(f"prompt {index} is {found}, expected a list of token ids")
  if not ids.size:
    raise ConfigError(f"prompt {index} is empty: give it at least one token id, such as BOS")
  outside = (ids < 0) | (ids >= num_embed) if num_embed is not None else ids < 0
  # A gather would clamp such an id silently.
  if outside.any():
    size = "" if num_embed is None else f" of {num_embed:,}"
    raise ConfigError(
      f"prompt {index} holds {ids[outside][0]}, which is outside the model's vocabulary{size}"
    )
  return ids.astype(np.int32)


def lengths_of_chunks(length: int) -> list[int]:
  """Lengths of the chunks of a prompt: the first has one of few lengths, all others have CHUNK tokens.

  A prompt of 600 tokens has chunks of 96 and 512, of which the first begins with 8 tokens of padding.
  """
  whole, rest = divmod(length, CHUNK)
  first = [next(size for size in _LENGTHS if size >= rest)] if rest else []
  return first + [CHUNK] * whole


def slots_of(length: int) -> int:
  """Slots of the KV cache that a prompt takes, padding included."""
  return sum(lengths_of_chunks(length))


def chunks(rows: Sequence[np.ndarray], start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Tokens and positions of rows, chunk after chunk, with padding on the left.

  The last tokens of all rows are side by side in the last chunk, and all rows use the same slots of a cache.

  Args:
    rows: token ids int32 [T] of each row.
    start: position of each row's first token.

  Yields:
    Tokens int32 [B, chunk] and positions int32 [B, chunk], negative for padding.
  """
  sizes = lengths_of_chunks(max(map(len, rows)))
  tokens = np.zeros((len(rows), sum(sizes)), np.int32)
  positions = np.full(tokens.shape, _PADDING, np.int32)
  for row, (ids, places) in zip(rows, zip(tokens, positions, strict=True), strict=True):
    ids[len(ids) - len(row) :] = row
    places[len(ids) - len(row) :] = start + np.arange(len(row))
  ends = list(itertools.accumulate(sizes))
  for begin, end in zip([0, *ends], ends, strict=False):
    yield tokens[:, begin:end], positions[:, begin:end]


def shared_length(rows: Sequence[np.ndarray]) -> int:
  """Number of tokens that all rows begin with and that are worth to run once: as many as fill chunks without padding.

  At least one token of each row is not shared, since its hidden state is needed.
  """
  least = min(map(len, rows)) - 1
  if len(rows) == 1 or least < _WORTH_SHARING:
    return 0
  head = np.stack([row[:least] for row in rows])
  differs = (head != head[:1]).any(axis=0)
  common = int(differs.argmax()) if differs.any() else least
  if common >= CHUNK:
    return common - common % CHUNK
  return max((size for size in _LENGTHS if _WORTH_SHARING <= size <= common), default=0)
