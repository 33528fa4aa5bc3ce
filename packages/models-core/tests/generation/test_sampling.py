"""The distribution that tokens are drawn from, by numbers."""

import jax
import numpy as np
import pytest

from models_core.generation import Sampling
from models_core.generation.sampling import choose, distribution, numbers_of, steps_of

B, V, DRAWS = 3, 40, 20_000
LOGITS = np.random.default_rng(0).normal(size=(B, V)).astype(np.float32) * 2
CASES = {
  "plain": Sampling(temperature=1.0),
  "temperature": Sampling(temperature=0.6),
  "top-k": Sampling(temperature=1.3, top_k=5),
  "top-p": Sampling(temperature=1.0, top_p=0.7),
  "min-p": Sampling(temperature=1.5, min_p=0.2),
  "all": Sampling(temperature=1.5, top_k=12, top_p=0.8, min_p=0.1),
}


def expected(sampling):
  """Probabilities [B, V], by sorting."""
  result = np.zeros((B, V))
  for row, logits in zip(result, LOGITS.astype(np.float64), strict=True):
    order = np.argsort(-logits)
    weights = np.exp((logits / sampling.temperature)[order])
    weights[sampling.top_k or V :] = 0
    p = weights / weights.sum()
    weights[np.cumsum(p) - p >= sampling.top_p] = 0
    weights[weights < sampling.min_p * weights[0]] = 0
    row[order] = weights / weights.sum()
  return result


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES)
def test_distribution(sampling):
  scores, ids = jax.jit(distribution, static_argnums=1)(LOGITS, steps_of(sampling), numbers_of(sampling))
  found = np.zeros((B, V))
  ids = np.broadcast_to(np.arange(V), (B, V)) if ids is None else np.asarray(ids)
  np.put_along_axis(found, ids, np.asarray(jax.nn.softmax(scores, axis=-1)), 1)
  np.testing.assert_allclose(found, expected(sampling), atol=1e-6)


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES)
def test_draws_follow_the_distribution(sampling):
  draw = jax.jit(choose, static_argnums=3)
  logits = np.repeat(LOGITS[:1], DRAWS, 0)
  keys = jax.vmap(jax.random.key)(np.arange(DRAWS))
  tokens, log_probs = draw(logits, keys, None, steps_of(sampling), numbers_of(sampling))
  counts, p = np.bincount(tokens, minlength=V), expected(sampling)[0]
  assert not counts[p == 0].any()
  # Rare tokens together, since a chi-square test needs counts of five and more.
  rare = p * DRAWS < 5
  counts, p = (np.append(x[~rare], x[rare].sum()) for x in (counts, p))
  statistic = (((counts - p * DRAWS) ** 2)[p > 0] / (p * DRAWS)[p > 0]).sum()
  freedom = (p > 0).sum() - 1
  # Four standard deviations above the mean; the draws are the same in each run.
  assert statistic < freedom + 4 * np.sqrt(2 * freedom)
  raw = LOGITS[0] - np.log(np.exp(LOGITS[0]).sum())
  np.testing.assert_allclose(log_probs, raw[np.asarray(tokens)], atol=1e-5)


def test_the_whole_distribution_stays_with_a_probability_that_sums_to_less_than_one():
  flat = np.zeros((1, 1000), np.float32)
  sampling = Sampling(temperature=1.0, top_p=1 - 2**-24)
  scores, _ = distribution(flat, steps_of(sampling), numbers_of(sampling))
  assert np.isfinite(np.asarray(scores)).all()
