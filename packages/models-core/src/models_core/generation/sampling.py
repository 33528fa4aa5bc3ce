"""How the next token is chosen from logits: the likeliest, or one of a distribution that filters cut down."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models_core.errors import ConfigError
from models_core.layers import log_probs, top_k


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen. The steps apply in this order, as in transformers.

  Attributes:
    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the prompt or the answer
      holds (arXiv:1909.05858); 1 changes nothing.
    temperature: divides the logits; 0 takes the likeliest token, and then no filter matters.
    top_k: samples from this many likeliest tokens; 0 means all.
    top_p: samples from the fewest likeliest tokens that together have this probability (arXiv:1904.09751), in (0, 1].
      Tokens that are as likely as the last of them stay, too.
    min_p: samples from tokens with at least this part of the probability of the likeliest (arXiv:2407.01082), in [0, 1].

  Raises:
    ConfigError: if a number is outside its range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self) -> None:
    for name, (holds, expected) in _RANGES.items():
      value = getattr(self, name)
      numeric = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
      if not (numeric and math.isfinite(value) and holds(value)):
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


_RANGES = {
  "temperature": (lambda x: x >= 0, "0 (the likeliest token) or a positive number"),
  "top_k": (lambda x: x >= 0 and x == int(x), "a whole number, where 0 means all tokens"),
  "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
  "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
  "repetition_penalty": (lambda x: x > 0, "a positive number, where 1 changes nothing"),
}
GREEDY = Sampling()


class Steps(NamedTuple):
  """Which steps of a Sampling do something. They are part of the compiled program; their numbers are not.

  Attributes:
    samples: whether a token is drawn; otherwise the likeliest is taken.
    top_k: the size of the distribution, or 0.
    top_p: whether it is cut down by probability.
    min_p: whether it is cut down by the probability of the likeliest token.
    penalises: whether repetitions are penalised.
  """

  samples: bool
  top_k: int
  top_p: bool
  min_p: bool
  penalises: bool


class Numbers(TypedDict):
  """The numbers of a Sampling, float32 scalars."""

  temperature: np.float32
  top_p: np.float32
  min_p: np.float32
  repetition_penalty: np.float32


def steps_of(sampling: Sampling) -> Steps:
  """The steps that do something."""
  samples = sampling.temperature > 0
  return Steps(
    samples,
    int(sampling.top_k) if samples else 0,
    samples and sampling.top_p < 1,
    samples and sampling.min_p > 0,
    sampling.repetition_penalty != 1,
  )


def numbers_of(sampling: Sampling) -> Numbers:
  """The numbers as arguments of a compiled program."""
  return {
    "temperature": np.float32(sampling.temperature),
    "top_p": np.float32(sampling.top_p),
    "min_p": np.float32(sampling.min_p),
    "repetition_penalty": np.float32(sampling.repetition_penalty),
  }


def choose(
  logits: jax.Array, keys: jax.Array, seen: jax.Array | None, steps: Steps, numbers: Numbers
) -> tuple[jax.Array, jax.Array]:
  """Chooses a token for each row.

  Args:
    logits: float32 [B, V] of the model.
    keys: a random key for each row [B].
    seen: bool [B, V], tokens that a row holds; None if repetitions are not penalised.
    steps: which steps apply.
    numbers: their numbers.

  Returns:
    Token ids int32 [B], and their log-probabilities float32 [B] by the logits of the model, before all steps.
  """
  scores = logits if seen is None else penalise(logits, seen, numbers["repetition_penalty"])
  if not steps.samples:
    tokens = jnp.argmax(scores, axis=-1)
  else:
    scores, ids = distribution(scores, steps, numbers)
    tokens = jax.vmap(jax.random.categorical)(keys, scores)
    if ids is not None:
      tokens = jnp.take_along_axis(ids, tokens[:, None], axis=1)[:, 0]
  tokens = tokens.astype(jnp.int32)
  return tokens, log_probs(logits, tokens)


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array | np.float32) -> jax.Array:
  """Makes tokens that were seen less likely: [B, V], where seen is bool [B, V]."""
  return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def distribution(logits: jax.Array, steps: Steps, numbers: Numbers) -> tuple[jax.Array, jax.Array | None]:
  """The distribution that a token is drawn from.

  Returns:
    Its unnormalised logarithm [B, C], -inf for tokens that were cut off, and their ids [B, C], or None if C is V.
  """
  scores, ids = logits / numbers["temperature"], None
  if 0 < steps.top_k < logits.shape[-1]:
    scores, ids = top_k(scores, steps.top_k)
  if steps.top_p:
    scores = _keep_probable(scores, numbers["top_p"])
  if steps.min_p:
    least = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(numbers["min_p"])
    scores = jnp.where(scores < least, -jnp.inf, scores)
  return scores, ids


def _keep_probable(scores: jax.Array, top_p: jax.Array | np.float32) -> jax.Array:
  """Cuts off tokens that are less likely than the fewest that together have the probability top_p.

  The score of the last that stays is found bit by bit, which is several times faster than to sort a vocabulary.
  """
  probabilities = jax.nn.softmax(scores, axis=-1)
  bits = lax.bitcast_convert_type(scores, jnp.uint32)
  # As unsigned numbers, these bits have the order of the scores.
  ordered = jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)

  def next_bit(i: jax.Array, least: jax.Array) -> jax.Array:
    larger = least | jnp.uint32(1 << 31) >> i.astype(jnp.uint32)
    mass = jnp.sum(jnp.where(ordered >= larger, probabilities, 0), axis=-1, keepdims=True)
    return jnp.where(mass >= top_p, larger, least)

  least = lax.fori_loop(0, 32, next_bit, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
  return jnp.where(ordered < least, -jnp.inf, scores)
