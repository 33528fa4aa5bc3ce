"""Text generation: one sequence, streamed token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models_core.errors import CacheError, ConfigError
from models_core.score_model import ScoreModel

# Cache sizes are multiples of this, so that prompts of similar lengths share a compiled step.
_CACHE_STEP = 256
# (float32 logits [V], key, temperature, top_p) -> token id.
_Pick = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# (key, temperature, top_p).
_Sampling = tuple[jax.Array, jax.Array, jax.Array]


def generate(
  model: Any,
  prompt_ids: Sequence[int],
  *,
  max_new_tokens: int,
  stop_ids: Set[int] = frozenset(),
  temperature: float = 0.0,
  top_p: float = 1.0,
  seed: int = 0,
  cache_size: int | None = None,
  cache_dtype: Any = None,
) -> Iterator[int]:
  """Continues a prompt, one token at a time.

  One pass over the prompt gives the first token; it is compiled for each prompt length. Each further token takes a step
  over one token, which is compiled once for each cache size. The device computes the next token while the caller
  handles the current one.

  Args:
    model: a `models_core.layers.CausalLM`, on any mesh.
    prompt_ids: at least one token id.
    max_new_tokens: upper limit of the number of new tokens.
    stop_ids: token ids that end the sequence; the one that ends it is returned as the last.
    temperature: divides the logits before sampling; 0 always takes the most likely token.
    top_p: samples from the fewest most likely tokens that together have this probability, in (0, 1].
    seed: of the sampling. The same seed and prompt give the same tokens.
    cache_size: length of the KV cache in tokens; None makes it large enough for prompt and new tokens.
    cache_dtype: dtype of the cached keys and values; None takes the model's default.

  Returns:
    An iterator over the new token ids.

  Raises:
    ConfigError: if the prompt is empty or holds an id outside the vocabulary, a number is outside its range, or the
      model is a ScoreModel.
    CacheError: if `cache_size` is too small.
  """
  if isinstance(model, ScoreModel):
    raise ConfigError("a ScoreModel gives scores, not logits: load a language model to generate text")
  prompt = _check_prompt(model, prompt_ids)
  if max_new_tokens < 0:
    raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
  if not 0 <= temperature < float("inf"):
    raise ConfigError(f"temperature is {temperature}, expected 0 (the likeliest token) or a positive number")
  if not 0 < top_p <= 1:
    raise ConfigError(f"top_p is {top_p}, expected more than 0 and at most 1")
  # The last new token is never fed back.
  needed = len(prompt) + max(max_new_tokens - 1, 0)
  if cache_size is None:
    cache_size = -(-needed // _CACHE_STEP) * _CACHE_STEP
  elif cache_size < needed:
    raise CacheError(
      f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones need a KV cache of {needed}, "
      f"but cache_size is {cache_size}"
    )
  pick = _likeliest if temperature == 0 else _sample if top_p == 1 else _sample_nucleus
  sampling = (jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))
  make_cache = functools.partial(model.init_cache, 1, cache_size, cache_dtype)
  return _stream(model, prompt, max_new_tokens, stop_ids, pick, sampling, make_cache)


def _check_prompt(model: Any, prompt_ids: Sequence[int]) -> np.ndarray:
  prompt = np.asarray(prompt_ids)
  if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in "iu":
    raise ConfigError(
      f"the prompt must be one sequence of at least one token id, found {prompt.dtype} {prompt.shape}"
    )
  # A gather would clamp such an id silently.
  if outside := prompt[(prompt < 0) | (prompt >= model.num_embed)].tolist():
    raise ConfigError(
      f"the prompt holds {outside[0]}, which is outside the model's vocabulary of {model.num_embed}"
    )
  return prompt.astype(np.int32)


def _stream(
  model: Any,
  prompt: np.ndarray,
  count: int,
  stop_ids: Set[int],
  pick: _Pick,
  sampling: _Sampling,
  make_cache: Callable[[], Any],
) -> Iterator[int]:
  if not count:
    return
  leaves, structure = jax.tree.flatten(model)
  step = _compile(structure, pick)
  cache = make_cache()
  positions = np.arange(len(prompt) + count, dtype=np.int32)[None]
  token, cache = step(leaves, prompt[None], positions[:, : len(prompt)], cache, sampling)
  for place in range(len(prompt), len(prompt) + count):
    current = token
    if place + 1 < len(prompt) + count:
      # Dispatched before the current token is read, so that the device never idles.
      token, cache = step(leaves, token, positions[:, place : place + 1], cache, sampling)
    value = int(current[0, 0])
    yield value
    if value in stop_ids:
      return


@functools.lru_cache(maxsize=16)
def _compile(structure: Any, pick: _Pick) -> Callable[..., tuple[jax.Array, Any]]:
  """Compiles the step from tokens [1, T], their positions [1, T] and a cache to the next token [1, 1] and the cache.

  The step takes the model as a list of arrays: flattening the module at each step would cost more than a small model.
  """

  def step(
    leaves: list[jax.Array], tokens: jax.Array, positions: jax.Array, cache: Any, sampling: _Sampling
  ) -> tuple[jax.Array, Any]:
    model = jax.tree.unflatten(structure, leaves)
    hidden, cache = model(tokens, positions, cache, None, skip_lm_head=True)
    # Logits are computed for the last position only.
    logits = model.compute_final_logits(hidden[:, -1:])[0, -1]
    key, temperature, top_p = sampling
    token = pick(logits, jax.random.fold_in(key, positions[0, -1]), temperature, top_p)
    return token.astype(jnp.int32)[None, None], cache

  return jax.jit(step, donate_argnames=("cache",))


def _likeliest(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
  return jnp.argmax(logits)


def _sample(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
  return jax.random.categorical(key, logits / temperature)


def _sample_nucleus(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
  """Nucleus sampling (arXiv:1904.09751)."""
  logits = logits / temperature
  ordered = jnp.sort(logits, descending=True)
  probabilities = jax.nn.softmax(ordered)
  # A token is in the nucleus if the tokens before it do not reach top_p, so the first one always is.
  inside = jnp.cumsum(probabilities) - probabilities < top_p
  least = jnp.min(jnp.where(inside, ordered, jnp.inf))
  return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf))
