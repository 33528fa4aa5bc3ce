import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_automodel.text import generate, generation
from models_core.errors import CacheError, ConfigError, ModelsError

V, D = 23, 8


class Toy(nnx.Module):
  """Sums what it has seen, each token weighted by its position; counts how often it is traced."""

  def __init__(self, rngs):
    self.embedding = nnx.Param(jax.random.normal(rngs.params(), (V, D)))
    self.head = nnx.Param(jax.random.normal(rngs.params(), (V, D)))
    self.num_embed = V

  def init_cache(self, batch_size, cache_size, dtype=None):
    place = self.embedding[...].sharding
    k = jnp.zeros((batch_size, cache_size, D), dtype or jnp.float32, device=place)
    return {"layer_0": {"k": k, "end_index": jnp.zeros(batch_size, jnp.int32, device=place)}}

  def __call__(self, tokens, positions, cache, attention_mask, *, skip_lm_head=False):
    TRACES.append((tokens.shape, cache["layer_0"]["k"].shape))
    assert tokens.dtype == positions.dtype == jnp.int32
    assert attention_mask is None
    assert skip_lm_head
    layer = cache["layer_0"]
    end, count = layer["end_index"][0], tokens.shape[1]
    x = self.embedding[...][tokens] * jnp.cos(positions.astype(jnp.float32))[..., None]
    k = jax.lax.dynamic_update_slice(layer["k"], x.astype(layer["k"].dtype), (0, end, 0))
    seen = jnp.arange(k.shape[1]) <= end + jnp.arange(count)[:, None]
    hidden = jnp.tanh(jnp.einsum("ts,bsd->btd", seen.astype(k.dtype), k))
    return hidden, {"layer_0": {"k": k, "end_index": layer["end_index"] + count}}

  def compute_final_logits(self, hidden):
    assert hidden.shape == (1, 1, D)
    return 3 * jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), self.head[...])


TRACES: list = []
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def model():
  TRACES.clear()
  return Toy(nnx.Rngs(0))


def reference_logits(model, ids):
  embedding, head = np.asarray(model.embedding[...]), np.asarray(model.head[...])
  hidden = np.tanh(sum(embedding[t] * np.cos(i) for i, t in enumerate(ids)))
  return 3 * head @ hidden


def greedy(model, prompt, count):
  ids = list(prompt)
  for _ in range(count):
    ids.append(int(np.argmax(reference_logits(model, ids))))
  return ids[len(prompt) :]


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_likeliest_tokens(model, count):
  assert list(generate(model, PROMPT, max_new_tokens=count)) == greedy(model, PROMPT, count)


def test_a_prompt_of_one_token(model):
  assert list(generate(model, np.array([2]), max_new_tokens=5)) == greedy(model, [2], 5)


def test_steps_are_compiled_once(model):
  generation._compile.cache_clear()
  list(generate(model, PROMPT, max_new_tokens=20, cache_size=99))
  assert TRACES == [((1, 5), (1, 99, D)), ((1, 1), (1, 99, D))]
  list(generate(model, PROMPT, max_new_tokens=40, cache_size=99))
  list(generate(Toy(nnx.Rngs(1)), PROMPT, max_new_tokens=40, cache_size=99))
  assert len(TRACES) == 2
  # The weights are arguments: another model of this shape gives its own answer.
  other = Toy(nnx.Rngs(1))
  assert list(generate(other, PROMPT, max_new_tokens=9, cache_size=99)) == greedy(other, PROMPT, 9)


def test_default_cache_sizes_are_shared(model):
  list(generate(model, PROMPT, max_new_tokens=3))
  known = len(TRACES)
  list(generate(model, PROMPT, max_new_tokens=4))
  assert len(TRACES) == known


def test_a_full_cache(model):
  ids = list(generate(model, PROMPT, max_new_tokens=95, cache_size=99))
  assert ids == greedy(model, PROMPT, 95)
  with pytest.raises(CacheError, match="need a KV cache of 100, but cache_size is 99"):
    generate(model, PROMPT, max_new_tokens=96, cache_size=99)


def test_a_stop_id_comes_last(model):
  expected = greedy(model, PROMPT, 30)
  stop = expected[7]
  cut = expected[: expected.index(stop) + 1]
  assert list(generate(model, PROMPT, max_new_tokens=30, stop_ids={stop, 10**6})) == cut


def test_tokens_stream(model):
  stream = generate(model, PROMPT, max_new_tokens=200)
  assert list(itertools.islice(stream, 3)) == greedy(model, PROMPT, 3)


def test_seeds(model):
  def sample(seed):
    return list(generate(model, PROMPT, max_new_tokens=20, temperature=1.0, seed=seed))

  assert sample(0) == sample(0)
  assert sample(0) != sample(1)


def test_low_temperature_and_small_nucleus_are_the_likeliest(model):
  expected = greedy(model, PROMPT, 10)
  assert list(generate(model, PROMPT, max_new_tokens=10, temperature=1e-6)) == expected
  assert list(generate(model, PROMPT, max_new_tokens=10, temperature=1.0, top_p=1e-6)) == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (2.0, 0.7)])
def test_samples_follow_the_distribution(model, temperature, top_p):
  logits = reference_logits(model, PROMPT) / temperature
  probabilities = np.exp(logits - logits.max())
  probabilities /= probabilities.sum()
  order = np.argsort(-probabilities)
  inside = order[np.cumsum(probabilities[order]) - probabilities[order] < top_p]
  expected = np.zeros(V)
  expected[inside] = probabilities[inside] / probabilities[inside].sum()
  options = {"max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
  count = 400
  drawn = [next(generate(model, PROMPT, seed=seed, **options)) for seed in range(count)]
  assert set(drawn) <= set(inside.tolist())
  frequencies = np.bincount(drawn, minlength=V) / count
  # Four standard deviations.
  assert np.all(np.abs(frequencies - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9)


def test_cache_dtype(model):
  list(generate(model, PROMPT, max_new_tokens=2, cache_dtype=jnp.bfloat16))
  assert len(TRACES) == 2


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_on_a_mesh(model, kind):
  mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
  expected = greedy(model, PROMPT, 9)
  placed = jax.device_put(model, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  assert list(generate(placed, PROMPT, max_new_tokens=9)) == expected


WRONG = {
  "empty": ([], {}, "at least one token id"),
  "two rows": ([[1, 2]], {}, "one sequence"),
  "text": ("hello", {}, "one sequence"),
  "floats": ([1.0], {}, "float64"),
  "negative id": ([1, -1], {}, "holds -1, which is outside the model's vocabulary of 23"),
  "large id": ([23], {}, "holds 23, which is outside"),
  "count": ([1], {"max_new_tokens": -1}, "max_new_tokens is -1"),
  "temperature": ([1], {"temperature": -0.5}, "temperature is -0.5"),
  "nan": ([1], {"temperature": float("nan")}, "temperature is nan"),
  "top_p": ([1], {"top_p": 0.0}, "top_p is 0.0"),
  "large top_p": ([1], {"top_p": 1.5}, "top_p is 1.5"),
}


@pytest.mark.parametrize(("prompt", "options", "message"), WRONG.values(), ids=WRONG)
def test_refusals_come_with_the_call(model, prompt, options, message):
  with pytest.raises(ConfigError, match=message) as caught:
    generate(model, prompt, **{"max_new_tokens": 5, **options})
  assert isinstance(caught.value, ModelsError)
  assert not TRACES
