"""What ends a row: token ids, and sequences of token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from models_core.errors import ConfigError

# Sizes of the arrays are multiples of this, so that calls with a few ids more or less share a program.
_STEP = 8
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Stop:
  """What ends a row. The token that ends it is the last of the row.

  Attributes:
    ids: token ids, such as all ends of a text and of a turn.
    sequences: sequences of token ids. Only new tokens count, not those of the prompt.

  Raises:
    ConfigError: if a sequence is empty, or an id is negative.
  """

  ids: Collection[int] = ()
  sequences: Sequence[Sequence[int]] = ()

  def __post_init__(self) -> None:
    if any(len(sequence) == 0 for sequence in self.sequences):
      raise ConfigError("a stop sequence is empty: give it at least one token id")
    if negative := [i for i in (*self.ids, *(i for s in self.sequences for i in s)) if i < 0]:
      raise ConfigError(f"the stop id {negative[0]} is negative, and no token has such an id")


class Ends(TypedDict):
  """A Stop as arrays, in which NO_TOKEN fills up.

  Attributes:
    ids: int32 [n].
    sequences: int32 [m, M], each at the end of its row.
  """

  ids: np.ndarray
  sequences: np.ndarray


def ends_of(stop: Stop) -> Ends:
  """The arrays of a Stop."""
  ids = np.full(_padded(max(len(stop.ids), 1)), NO_TOKEN, np.int32)
  ids[: len(stop.ids)] = sorted(stop.ids)
  longest = max(map(len, stop.sequences), default=0)
  sequences = np.full((_padded(len(stop.sequences)), _padded(longest)), NO_TOKEN, np.int32)
  for row, sequence in zip(sequences, stop.sequences, strict=False):
    row[len(row) - len(sequence) :] = sequence
  return {"ids": ids, "sequences": sequences}


def _padded(size: int) -> int:
  return -(-size // _STEP) * _STEP


def no_recent(rows: int, ends: Ends) -> jax.Array:
  """The newest tokens of rows that have no new ones yet: int32 [B, M]."""
  return jnp.full((rows, ends["sequences"].shape[1]), NO_TOKEN, jnp.int32)


def push(recent: jax.Array, tokens: jax.Array) -> jax.Array:
  """Puts tokens [B] behind the newest ones [B, M], of which the oldest falls off."""
  return jnp.concatenate([recent, tokens[:, None]], axis=1)[:, 1:] if recent.shape[1] else recent


def is_end(tokens: jax.Array, recent: jax.Array, ends: Ends) -> jax.Array:
  """Whether the newest token of each row ends it.

  Args:
    tokens: int32 [B].
    recent: int32 [B, M], whose last column are these tokens.
    ends: what ends a row.

  Returns:
    bool [B].
  """
  stopped = jnp.any(tokens[:, None] == ends["ids"], axis=1)
  wanted = ends["sequences"][None]
  same = jnp.all((wanted == NO_TOKEN) | (wanted == recent[:, None]), axis=2)
  return stopped | jnp.any(same & jnp.any(wanted != NO_TOKEN, axis=2), axis=1)
