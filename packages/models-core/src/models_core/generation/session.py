"""The KV cache of one row from call to call, so that a conversation runs each of its tokens once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from models_core.generation.placement import Placed
from models_core.generation.prefixes import run_rows
from models_core.generation.programs import Places, rewind_program
from models_core.generation.prompts import slots_of
from models_core.layers import Cache

# Sizes of caches are powers of two from this on, so that few programs are compiled for a conversation that grows.
_LEAST = 1024


@dataclasses.dataclass(frozen=True)
class Held:
  """A cache of one row, and what is in it.

  Attributes:
    cache: overwritten by the next program that continues it.
    ids: int32 [T], the tokens in the cache, from the first on.
    slots: in use, padding included; an upper limit.
    is_exact: whether nothing follows the tokens in the cache.
    kind: its size, and the dtype of keys and values.
  """

  cache: Cache
  ids: np.ndarray
  slots: int
  is_exact: bool
  kind: tuple[int, Any]

  def can_be_cut(self) -> bool:
    """Whether tokens at the end can be dropped. A ring has lost those that they took the places of."""
    return all("positions" in layer and "slots" not in layer for layer in self.cache.values())


class Session:
  """Keeps the KV cache of a row, for calls of `stream` one after the other.

  A call continues it where its prompt is the same: only the rest runs through the model. The next turn of a
  conversation thus costs its new tokens alone. What cannot be continued runs anew: another conversation, a full cache, or,
  where sliding windows are rings, a prompt that leaves out some of what was generated.

  Attributes:
    reused: number of the latest prompt's tokens that did not run again.
  """

  def __init__(self, model: Any):
    """Keeps the model as it is now: make a new session when its weights change.

    Args:
      model: a `models_core.layers.CausalLM`.
    """
    self.reused = 0
    self.placed = Placed.of(model)
    self.held: Held | None = None
    self._size = 0

  def size_for(self, needed: int) -> int:
    """Slots of the cache for a call that needs so many: a power of two, and never fewer than for the calls before."""
    self._size = max(self._size, _LEAST, 1 << (needed - 1).bit_length())
    return self._size

  def take(self, ids: np.ndarray, new_slots: int, kind: tuple[int, Any]) -> Held | None:
    """What is held, cut to what a prompt begins with; None if the prompt must run from its first token on.

    Args:
      ids: int32 [T], the prompt.
      new_slots: that new tokens need after the prompt.
      kind: of the cache that is asked for.
    """
    held, self.held, self.reused = self.held, None, 0
    if held is None or held.kind != kind:
      return None
    # The last token runs in any case, since its hidden state is needed.
    shared = _shared(held.ids, ids[:-1])
    if not shared or held.slots + slots_of(len(ids) - shared) + new_slots > kind[0]:
      return None
    if shared < len(held.ids) or not held.is_exact:
      if not held.can_be_cut():
        return None
      program = rewind_program(Places.of(held.cache))
      cache = self.placed.run(program, held.cache, np.int32(shared))
      held = dataclasses.replace(held, cache=cache, ids=ids[:shared])
    self.reused = shared
    return held


class Continued:
  """The one prompt of a call with a session.

  Attributes:
    session: whose cache it continues.
    ids: int32 [T], of the whole prompt.
    slots: that the prompt takes in an empty cache.
    used: slots in use after the prompt; only after `run`.
  """

  def __init__(self, session: Session, ids: np.ndarray, new_slots: int):
    """Takes the prompt, and the number of slots that new tokens need after it."""
    self.session, self.ids, self._new_slots = session, ids, new_slots
    self.slots, self.used = slots_of(len(ids)), 0

  def run(self, placed: Placed, size: int, dtype: Any) -> tuple[jax.Array, Cache]:
    """Hidden states of the prompt's last token [1, 1, D], and a cache of `size` slots."""
    held = self.session.take(self.ids, self._new_slots, (size, dtype))
    if held is None:
      self.used = self.slots
      return run_rows(placed, [self.ids], size, dtype)
    rest = self.ids[len(held.ids) :]
    self.used = held.slots + slots_of(len(rest))
    return run_rows(placed, [rest], size, dtype, held.cache, len(held.ids))


def _shared(a: np.ndarray, b: np.ndarray) -> int:
  """Number of tokens that both begin with."""
  length = min(len(a), len(b))
  differs = a[:length] != b[:length]
  return int(differs.argmax()) if differs.any() else length
