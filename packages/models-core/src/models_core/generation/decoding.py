"""New tokens for prompts: all at once, or streamed while the device goes on."""

from __future__ import annotations

import dataclasses
import math
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from models_core.errors import CacheError, ConfigError
from models_core.generation.placement import Placed
from models_core.generation.prefixes import Beginning, Prefix
from models_core.generation.programs import (
  LONGEST,
  Drawn,
  Places,
  Rows,
  begin_program,
  decode_program,
  repeat_program,
)
from models_core.generation.prompts import Prompt, check_prompts
from models_core.generation.sampling import GREEDY, Sampling, numbers_of, steps_of
from models_core.generation.session import Continued, Held, Session
from models_core.generation.stopping import NO_TOKEN, Stop, ends_of
from models_core.layers import Cache

# Cache sizes are multiples of this, so that prompts of similar lengths share programs.
_CACHE_STEP = 256
_NO_STOP = Stop()


@dataclasses.dataclass(frozen=True)
class Generated:
  """New tokens. The samples of a prompt are rows side by side: row r continues prompt r // num_samples.

  Attributes:
    tokens: int32 [N] for each row, with the token that ended it.
    log_probs: float32 [N] for each row: of each token by the model's logits, before temperature and filters.
    stopped: bool [rows], whether an end was reached; otherwise the row has as many tokens as were asked for.
  """

  tokens: list[np.ndarray]
  log_probs: list[np.ndarray]
  stopped: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
  """The next tokens of each row.

  Attributes:
    tokens: int32 [N] for each row; empty for a row that ended before.
    log_probs: float32 [N] for each row.
    ended: bool [rows], whether no token follows because an end was reached.
  """

  tokens: list[np.ndarray]
  log_probs: list[np.ndarray]
  ended: np.ndarray


def generate(model: Any, prompts: Sequence[Prompt], **options: Any) -> Generated:
  """Continues prompts, and returns when all rows have ended.

  Args:
    model: as `stream` takes it.
    prompts: as `stream` takes them.
    **options: all others of `stream`; the default of `interval` is 32.

  Raises:
    CacheError: as `stream`.
    ConfigError: as `stream`.
  """
  pieces = list(stream(model, prompts, **{"interval": LONGEST, **options}))
  rows = len(prompts) * options.get("num_samples", 1)
  joined = lambda parts, dtype: [np.concatenate([np.zeros(0, dtype), *row]) for row in parts]
  return Generated(
    joined(([p.tokens[r] for p in pieces] for r in range(rows)), np.int32),
    joined(([p.log_probs[r] for p in pieces] for r in range(rows)), np.float32),
    pieces[-1].ended if pieces else np.zeros(rows, bool),
  )


def stream(
  model: Any,
  prompts: Sequence[Prompt],
  *,
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  stop: Stop = _NO_STOP,
  seeds: int | Sequence[int] = 0,
  num_samples: int = 1,
  prefix: Prefix | None = None,
  session: Session | None = None,
  context: int | None = None,
  cache_size: int | None = None,
  cache_dtype: Any = None,
  interval: int = 8,
) -> Stream:
  """Continues prompts, a few tokens at a time, while the device computes the next ones.

  Prompts may have any lengths. What they all begin with runs through the model once, if it is long enough.

  Args:
    model: a `models_core.layers.CausalLM`, on any mesh or none, with LoRA factors, quantised or neither. One without
      arrays, as `LoadPlan.shapes` returns it, is for `Stream.compile`.
    prompts: at least one token id for each.
    max_new_tokens: upper limit of the new tokens of a row.
    sampling: how tokens are chosen.
    stop: what ends a row.
    seeds: of the sampling; row r of a single number s has the seed s + r. The same seed and prompt give the same tokens,
      whatever else is in the batch, up to rounding of the logits.
    num_samples: rows for each prompt.
    prefix: that all prompts begin with, to run it once for several calls.
    session: whose KV cache the one prompt continues, and which keeps it for the next call. It decides the cache's size.
    context: tokens of a row that the model was made for; a longer row is an error. None does not check it.
    cache_size: slots of a row in the KV cache. None makes it large enough, rounded up; calls with the same size and the
      same number of rows share programs.
    cache_dtype: of the cached keys and values; None takes the model's default.
    interval: upper limit of the tokens of a row in a piece, from 1 to 32. The first piece has one.

  Returns:
    An iterator over pieces. Nothing runs before the first is asked for.

  Raises:
    CacheError: if `cache_size` is too small.
    ConfigError: if the model is no language model, a number is outside its range, or prompts are none or empty, hold an
      id outside the vocabulary, are too long for the context, or do not begin with the prefix; or if a session comes with
      several rows, a prefix or a size.
  """
  placed = Placed.of(model) if session is None else session.placed
  for name, value, least, most in (
    ("max_new_tokens", max_new_tokens, 0, math.inf),
    ("num_samples", num_samples, 1, math.inf),
    ("interval", interval, 1, LONGEST),
  ):
    if not least <= operator.index(value) <= most:
      bound = "or more" if most == math.inf else f"to {most}"
      raise ConfigError(f"{name} is {value}, expected {least} {bound}")
  rows = check_prompts(prompts, num_embed=placed.num_embed, context=context, new_tokens=max_new_tokens)
  # The last new token is never fed back.
  new_slots = max(max_new_tokens - 1, 0)
  if session is None:
    beginning: Beginning | Continued = Beginning(model, rows, prefix)
  elif len(rows) * num_samples > 1 or prefix is not None or cache_size is not None:
    raise ConfigError(
      "a session holds one row: give one prompt, and neither num_samples, prefix nor cache_size"
    )
  else:
    beginning = Continued(session, rows[0], new_slots)
  needed = beginning.slots + new_slots
  if session is not None:
    cache_size = session.size_for(needed)
  elif cache_size is None:
    cache_size = -(-needed // _CACHE_STEP) * _CACHE_STEP
  elif cache_size < needed:
    raise CacheError(
      f"prompts of up to {max(map(len, rows)):,} tokens, filled up to {beginning.slots:,}, and {max_new_tokens:,} new ones "
      f"need {needed:,} slots, but cache_size is {cache_size:,}"
    )
  return Stream(
    _Request(
      placed,
      beginning,
      prompts=np.repeat(np.arange(len(rows), dtype=np.int32), num_samples),
      lengths=np.array([len(row) for row in rows], np.int32),
      seen=_seen(rows, placed.num_embed) if sampling.repetition_penalty != 1 else None,
      seeds=_row_seeds(seeds, len(rows) * num_samples),
      cache_size=cache_size,
      cache_dtype=cache_dtype,
      max_new_tokens=max_new_tokens,
      interval=interval,
      sampling=sampling,
      stop=stop,
    )
  )


@dataclasses.dataclass(frozen=True)
class _Request:
  """What a call asks for, checked.

  Attributes:
    placed: the model.
    beginning: the prompts, divided into what they share and the rest; or the one prompt of a session.
    prompts: int32 [rows], which of them each row continues.
    lengths: int32 [prompts].
    seen: bool [prompts, V], tokens of each prompt; None if repetitions are not penalised.
    seeds: uint32 [rows].
    cache_size: slots of a row.
    cache_dtype: of keys and values, or None.
    max_new_tokens: of each row.
    interval: tokens of a row in a piece, at most.
    sampling: how tokens are chosen.
    stop: what ends a row.
  """

  placed: Placed
  beginning: Beginning | Continued
  prompts: np.ndarray
  lengths: np.ndarray
  seen: np.ndarray | None
  seeds: np.ndarray
  cache_size: int
  cache_dtype: Any
  max_new_tokens: int
  interval: int
  sampling: Sampling
  stop: Stop


def _row_seeds(seeds: int | Sequence[int], rows: int) -> np.ndarray:
  """A seed for each row: uint32 [rows]."""
  if isinstance(seeds, (int, np.integer)):
    seeds = [int(seeds) + row for row in range(rows)]
  if len(seeds) != rows:
    raise ConfigError(f"there are {len(seeds)} seeds for {rows} rows: give one for each row, or one number")
  return np.array([int(seed) & 0xFFFFFFFF for seed in seeds], np.uint32)


def _seen(rows: Sequence[np.ndarray], num_embed: int) -> np.ndarray:
  """The tokens that each prompt holds: bool [prompts, V]."""
  seen = np.zeros((len(rows), num_embed), bool)
  for marks, row in zip(seen, rows, strict=True):
    marks[row] = True
  return seen


# Programs of `decode_program` that were compiled, and for what: `Stream._size`.
_compiled: weakref.WeakKeyDictionary[Any, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()
# Those that a thread compiles. A stream that needs one waits for it, instead of compiling it a second time.
_under_way: dict[tuple[Any, tuple[Any, ...]], threading.Event] = {}


class Stream(Iterator[Piece]):
  """Pieces of new tokens; `stream` makes it."""

  def __init__(self, request: _Request):
    """Takes a checked request."""
    self._request = request
    self._steps = steps_of(request.sampling)
    self._settings = (numbers_of(request.sampling), ends_of(request.stop))
    kinds = frozenset(leaf.dtype for leaf in request.placed.leaves)
    # What the program of the loop is compiled for, besides what it is made of.
    self._size = (len(request.prompts), request.cache_size, request.cache_dtype, request.placed.mesh, kinds)
    self._loop: Any = None
    # Tokens of a row that have not been dispatched.
    self._left = request.max_new_tokens
    # Rows that the caller ended.
    self._ended = np.zeros(len(request.prompts), bool)
    self._rows: Rows | None = None
    self._cache: Cache | None = None
    self._running: Drawn | None = None
    # What the session holds since the latest piece, and the tokens of its row that have been read.
    self._held: Held | None = None
    self._read: list[np.ndarray] = []

  def end(self, row: int) -> None:
    """Ends a row from outside, such as at a stop string. A piece that is being computed may still hold tokens of it."""
    self._ended[row] = True

  def compile(self, on_first: Callable[[], Any] = lambda: None) -> None:
    """Compiles what all pieces run, for a model that has a `jax.ShapeDtypeStruct` in the place of each array.

    A stream of the loaded model with the same options then compiles nothing. This one cannot be iterated over.

    Args:
      on_first: is called when what the first piece runs is compiled. A stream of the loaded model may begin then: it
        waits for the rest where it comes to it.
    """
    if self._left:
      self._begin()
    if not self._left:
      on_first()
      return
    done = threading.Event()
    is_alone = _under_way.setdefault((self._loop, self._size), done) is done
    try:
      on_first()
      # Only from the second time on, the rows come from the loop itself.
      for _ in range(2):
        if self._left:
          self._decode()
      _compiled.setdefault(self._loop, set()).add(self._size)
    finally:
      if is_alone:
        del _under_way[self._loop, self._size]
        done.set()

  def __next__(self) -> Piece:
    """The next piece.

    Raises:
      ConfigError: if another stream has continued the same session.
      StopIteration: after the last.
    """
    beginning = self._request.beginning
    under_way = self._held is not None and (self._left or self._running is not None)
    if under_way and isinstance(beginning, Continued) and beginning.session.held is not self._held:
      raise ConfigError(
        "another stream has continued the session of this one: end a stream before the next begins"
      )
    try:
      return self._next()
    except BaseException:
      # At the end, or what was under way is lost, and nothing that follows it would be right.
      self._rows, self._cache, self._running, self._left = None, None, None, 0
      raise

  def _next(self) -> Piece:
    beginning = self._request.beginning
    may_dispatch = True
    if self._rows is None and self._left:
      self._running = self._begin()
      # The first token does not wait for the compiler.
      may_dispatch = self._size in _compiled.get(self._loop, ())
    elif self._running is None and self._left and not self._ended.all():
      self._running = self._dispatch()
    current, self._running = self._running, None
    if current is None:
      raise StopIteration
    # Dispatched before the current piece is read, so that the device never waits for the host.
    if may_dispatch and self._left and not self._ended.all():
      self._running = self._dispatch()
    tokens, log_probs, ended = (np.asarray(current[name]) for name in ("tokens", "log_probs", "ended"))
    if ended.all():
      self._running, self._left = None, 0
    counts = (tokens != NO_TOKEN).sum(axis=1)
    if isinstance(beginning, Continued):
      self._read.append(tokens[0, : counts[0]])
      self._keep(beginning)
    return Piece(
      [row[:n] for row, n in zip(tokens, counts, strict=True)],
      [row[:n] for row, n in zip(log_probs, counts, strict=True)],
      ended,
    )

  def _begin(self) -> Drawn:
    """Runs the prompts, and chooses the first tokens."""
    request = self._request
    placed, structure = request.placed, request.placed.structure
    hidden, cache = request.beginning.run(placed, request.cache_size, request.cache_dtype)
    if len(request.prompts) > len(request.lengths):
      program = repeat_program(structure, request.cache_size, request.cache_dtype)
      cache = placed.run(program, cache, request.prompts)
    seen = None if request.seen is None else request.seen[request.prompts]
    rows = (request.prompts, request.lengths[request.prompts], request.seeds, seen)
    begin = begin_program(structure, self._steps)
    self._rows, drawn = placed.run(begin, hidden, *rows, *self._settings)
    self._cache = cache
    self._loop = decode_program(structure, self._steps, Places.of(cache))
    self._left -= 1
    return drawn

  def _keep(self, beginning: Continued) -> None:
    """Leaves the cache to the session, with the tokens that are known to be in it."""
    assert self._cache is not None
    request = self._request
    read = np.concatenate(self._read)
    # The newest token is not fed yet. A loop that runs has fed it, and more, up to the tokens that it was asked for.
    is_exact = self._running is None
    new = len(read) if is_exact else request.max_new_tokens - self._left
    self._held = Held(
      self._cache,
      np.concatenate([beginning.ids, read[:-1]]),
      beginning.used + new - 1,
      is_exact,
      (request.cache_size, request.cache_dtype),
    )
    beginning.session.held = self._held

  def _dispatch(self) -> Drawn:
    """Lets the loop run, when it is compiled."""
    if (compiling := _under_way.get((self._loop, self._size))) is not None:
      compiling.wait()
    if isinstance(beginning := self._request.beginning, Continued):
      # The loop overwrites the cache.
      beginning.session.held = None
    drawn = self._decode()
    _compiled.setdefault(self._loop, set()).add(self._size)
    return drawn

  def _decode(self) -> Drawn:
    """Lets the loop run."""
    assert self._cache is not None
    request = self._request
    count = min(self._left, request.interval)
    ended, numbers = self._ended.copy(), (np.int32(count), *self._settings)
    self._cache, self._rows, drawn = request.placed.run(self._loop, self._cache, self._rows, ended, *numbers)
    self._left -= count
    return drawn
