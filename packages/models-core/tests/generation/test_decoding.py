"""Batches of prompts, on any mesh, against a model that runs whole rows anew for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from models_core.errors import CacheError, ConfigError
from models_core.generation import GREEDY, Prefix, Sampling, Stop, generate, programs, prompts, score, stream
from models_core.generation.placement import Placed
from models_core.generation.sampling import steps_of

from ..layers.tiny_lm import Config, V, make

CONFIG = Config(windows=(None, 6))
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (1, 30, 7, 19)]
NEW, LONGEST = 12, 200
MESHES = {
  "auto": lambda: Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp")),
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2),
}


@pytest.fixture(scope="module")
def model():
  return make(None, CONFIG)


@pytest.fixture(scope="module")
def logits_of(model):
  """Logits [T, V] of a row, in a pass without a cache."""

  @jax.jit
  def run(tokens):
    return model(tokens)[0][0]

  def logits(row):
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(run(padded))[: len(row)]

  return logits


@pytest.fixture(scope="module")
def greedy(logits_of):
  def continue_(prompt, count, penalty=1.0):
    row = list(prompt)
    for _ in range(count):
      logits = logits_of(row)[-1].copy()
      seen = sorted(set(row))
      logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
      row.append(int(np.argmax(logits)))
    return row[len(prompt) :]

  return continue_


def lists(rows):
  return [row.tolist() for row in rows]


def log_softmax(logits):
  return np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))


def test_unequal_prompts_in_a_batch(model, greedy, logits_of):
  out = generate(model, PROMPTS, max_new_tokens=NEW)
  assert lists(out.tokens) == [greedy(prompt, NEW) for prompt in PROMPTS]
  assert not out.stopped.any()
  for prompt, tokens, found in zip(PROMPTS, lists(out.tokens), out.log_probs, strict=True):
    expected = log_softmax(logits_of(prompt + tokens))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(found, expected[np.arange(NEW), tokens], atol=1e-5)


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("inside", [False, True])
def test_meshes(model, kind, inside):
  mesh = MESHES[kind]()
  options = {
    "max_new_tokens": NEW,
    "num_samples": 2,
    "sampling": Sampling(temperature=1.0, top_k=9, top_p=0.9),
  }
  expected = generate(model, PROMPTS, **options)
  placed = make(mesh, CONFIG)
  with jax.set_mesh(mesh) if inside else jax.set_mesh(jax.sharding.get_mesh()):
    out = generate(placed, PROMPTS, **options)
    scored = score(placed, PROMPTS, [row[:3] for row in out.tokens[::2]])
  assert lists(out.tokens) == lists(expected.tokens)
  for found, wanted in zip(out.log_probs, expected.log_probs, strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-5)
  for found, wanted in zip(scored, out.log_probs[::2], strict=True):
    np.testing.assert_allclose(found.log_probs, wanted[:3], atol=1e-5)


def test_a_prompt_in_chunks_is_the_prompt_at_once(model, greedy, monkeypatch):
  long = RNG.integers(0, V, 150).tolist()
  expected = greedy(long, 5)
  assert generate(model, [long], max_new_tokens=5).tokens[0].tolist() == expected
  monkeypatch.setattr(prompts, "CHUNK", 64)
  monkeypatch.setattr(prompts, "_LENGTHS", (16, 32, 64))
  assert prompts.lengths_of_chunks(150) == [32, 64, 64]
  assert generate(model, [long, PROMPTS[1]], max_new_tokens=5).tokens[0].tolist() == expected


def test_what_prompts_share_runs_once(model, greedy, monkeypatch):
  shared = RNG.integers(0, V, 100).tolist()
  rows = [shared + prompt for prompt in PROMPTS]
  ran = []
  monkeypatch.setattr("models_core.generation.prefixes.chunks", lambda *a: _noted(ran, prompts.chunks(*a)))
  out = generate(model, rows, max_new_tokens=NEW)
  assert [shape for shape, _ in ran] == [(1, 96), (4, 48)]
  expected = [greedy(row, NEW) for row in rows]
  assert lists(out.tokens) == expected
  ran.clear()
  prefix = Prefix(model, shared)
  for row, wanted in zip(rows, expected, strict=True):
    found = generate(model, [row], max_new_tokens=NEW, prefix=prefix, cache_size=256)
    assert lists(found.tokens) == [wanted]
  assert [shape for shape, _ in ran] == [(1, 128), (1, 16), (1, 32), (1, 16), (1, 32)]
  with pytest.raises(ConfigError, match="prompt 1 does not begin with the 100 tokens of the prefix"):
    generate(model, [rows[0], PROMPTS[0]], max_new_tokens=1, prefix=prefix)


def _noted(ran, found):
  for tokens, positions in found:
    ran.append((tokens.shape, positions))
    yield tokens, positions


def test_samples_of_a_prompt_have_seeds_of_their_own(model):
  sampling = Sampling(temperature=1.0)
  options = {"max_new_tokens": NEW, "sampling": sampling}
  rows = lists(generate(model, PROMPTS[:2], num_samples=3, seeds=5, **options).tokens)
  assert len({tuple(row) for row in rows}) == 6
  again = generate(model, PROMPTS[1:2], seeds=[9], **options)
  assert lists(again.tokens) == rows[4:5]
  with pytest.raises(ConfigError, match="2 seeds for 1 rows"):
    generate(model, PROMPTS[:1], seeds=[1, 2], **options)


def test_ends(model, greedy):
  expected = [greedy(prompt, 40) for prompt in PROMPTS]
  stop = {expected[0][3], expected[2][1]}
  cut = lambda row: row[: next((i + 1 for i, t in enumerate(row) if t in stop), 40)]
  out = generate(model, PROMPTS, max_new_tokens=40, stop=Stop(ids=stop), interval=5)
  assert lists(out.tokens) == [cut(row) for row in expected]
  assert out.stopped.tolist() == [not stop.isdisjoint(row) for row in expected]
  assert [len(row) for row in out.log_probs] == [len(row) for row in out.tokens]


def test_stop_sequences(model, greedy):
  row = greedy(PROMPTS[1], 40)
  sequence = row[5:8]
  end = next(i for i in range(40) if row[i - 2 : i + 1] == sequence)
  # The prompt's own tokens are no part of a stop sequence.
  stop = Stop(sequences=[sequence, [PROMPTS[1][-1], row[0]]])
  out = generate(model, PROMPTS[1:2], max_new_tokens=40, stop=stop)
  assert lists(out.tokens) == [row[: end + 1]]
  assert out.stopped.all()


def test_a_repetition_penalty_counts_the_prompt(model, greedy):
  out = generate(model, PROMPTS, max_new_tokens=NEW, sampling=Sampling(repetition_penalty=1.7))
  assert lists(out.tokens) == [greedy(prompt, NEW, 1.7) for prompt in PROMPTS]


def test_pieces(model, greedy):
  rows, sizes = [[], []], []
  for piece in stream(model, PROMPTS[:2], max_new_tokens=10, interval=4):
    sizes.append(len(piece.tokens[0]))
    for row, new in zip(rows, piece.tokens, strict=True):
      row += new.tolist()
  assert sizes == [1, 4, 4, 1]
  assert rows == [greedy(prompt, 10) for prompt in PROMPTS[:2]]
  assert list(stream(model, PROMPTS, max_new_tokens=0)) == []


def test_a_row_is_ended_from_outside(model):
  pieces = stream(model, PROMPTS[:2], max_new_tokens=40, interval=4)
  next(pieces)
  pieces.end(0)
  counts = [[len(row) for row in piece.tokens] for piece in pieces]
  assert sum(a for a, _ in counts) <= 8
  assert next(pieces, None) is None
  assert sum(b for _, b in counts) == 39


@pytest.mark.parametrize("kind", ["one", *MESHES])
def test_programs_are_compiled_once(kind):
  for cached in (programs.prefill_program, programs.begin_program, programs.decode_program):
    cached.cache_clear()
  mesh = MESHES[kind]() if kind in MESHES else None
  models = [make(mesh, CONFIG), make(mesh, CONFIG)]
  for seed, (temperature, top_p, new, length) in enumerate(
    ((0.5, 0.3, 9, 3), (0.7, 0.4, 80, 4), (1.5, 0.9, 25, 30))
  ):
    for model in models:
      generate(
        model,
        [PROMPTS[1][:length]] * 2,
        max_new_tokens=new,
        sampling=Sampling(temperature=temperature, top_p=top_p),
        seeds=seed,
        stop=Stop(ids=range(seed)),
      )
  placed, steps = Placed.of(model), steps_of(Sampling(temperature=1.0, top_p=0.5))
  structure = placed.structure
  places = programs.Places.of(placed.run(programs.cache_program(structure, 2, 256, None)))
  assert programs.prefill_program(structure, places)._cache_size() == 2  # up to 16 tokens, and up to 32
  assert programs.begin_program(structure, steps)._cache_size() == 1
  assert programs.decode_program(structure, steps, places)._cache_size() == 1


WRONG = {
  "none": ([], {}, "there is no prompt"),
  "empty": ([[]], {}, "prompt 0 is empty"),
  "text": (["hello"], {}, "prompt 0 is a text"),
  "one row": ([1, 2], {}, "prompt 0 is a number"),
  "floats": ([[1.0]], {}, "float64"),
  "negative id": ([[1, -1]], {}, "holds -1, which is outside the model's vocabulary of 16"),
  "large id": ([[1], [16]], {}, "prompt 1 holds 16, which is outside"),
  "count": ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
  "interval": ([[1]], {"interval": 33}, "interval is 33, expected 1 to 32"),
  "samples": ([[1]], {"num_samples": 0}, "num_samples is 0"),
  "context": (
    [[1] * 9],
    {"context": 8},
    "prompt 0 has 9 tokens and 5 new ones, but the model's context is 8: shorten",
  ),
  "context of new": ([[1] * 6], {"context": 8}, "ask for at most 2 new tokens"),
}


@pytest.mark.parametrize(("rows", "options", "message"), WRONG.values(), ids=WRONG)
def test_refusals_come_with_the_call(model, rows, options, message):
  with pytest.raises(ConfigError, match=message):
    stream(model, rows, **{"max_new_tokens": 5, **options})


def test_a_small_cache(model):
  with pytest.raises(
    CacheError, match="filled up to 16, and 50 new ones need 65 slots, but cache_size is 64"
  ):
    stream(model, [[1]], max_new_tokens=50, cache_size=64)
  assert len(generate(model, [[1]], max_new_tokens=49, cache_size=64).tokens[0]) == 49


WRONG_NUMBERS = [
  ("temperature", -0.5),
  ("temperature", float("nan")),
  ("top_p", 0.0),
  ("top_p", 1.5),
  ("top_k", -1),
  ("top_k", 1.5),
  ("min_p", 2.0),
  ("repetition_penalty", 0.0),
]


@pytest.mark.parametrize(("field", "value"), WRONG_NUMBERS)
def test_numbers_outside_their_range(field, value):
  with pytest.raises(ConfigError, match=f"{field} is {value}"):
    Sampling(**{field: value})


def test_stops_that_cannot_be():
  with pytest.raises(ConfigError, match="a stop sequence is empty"):
    Stop(sequences=[[]])
  with pytest.raises(ConfigError, match="-3 is negative"):
    Stop(ids=[-3])
  assert Sampling() == GREEDY
