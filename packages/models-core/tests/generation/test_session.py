"""Conversations whose KV cache is kept, against rows that run anew."""

import jax
import numpy as np
import pytest

from models_core.errors import ConfigError
from models_core.generation import Prefix, Session, Stop, generate, prompts, stream

from ..layers.tiny_lm import Config, V, make
from .test_decoding import MESHES, _noted

RNG = np.random.default_rng(1)
# Whether layers have rings: those with a window of 6.
MODELS = {"whole": Config(windows=(None, None)), "rings": Config(windows=(None, 6))}


def tokens(count):
  return RNG.integers(0, V, count).tolist()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
  return make(None, MODELS[request.param])


@pytest.fixture
def ran(monkeypatch):
  """Numbers of tokens that ran through the model, padding included, for each chunk."""
  found = []
  monkeypatch.setattr("models_core.generation.prefixes.chunks", lambda *a: _noted(found, prompts.chunks(*a)))
  return found


def turn(model, session, prompt, count=9, **options):
  """The answer with the session, which must be that without it."""
  out = generate(model, [prompt], max_new_tokens=count, session=session, **options)
  alone = generate(model, [prompt], max_new_tokens=count, cache_size=1024, **options)
  assert out.tokens[0].tolist() == alone.tokens[0].tolist()
  np.testing.assert_allclose(out.log_probs[0], alone.log_probs[0], atol=1e-5)
  return out.tokens[0].tolist()


def test_turns_of_a_conversation_run_once(model, ran):
  session = Session(model)
  row = tokens(40)
  for i, said in enumerate((tokens(5), tokens(20), tokens(33))):
    before = len(row)
    row += said
    ran.clear()
    answer = turn(model, session, row)
    # All but the newest token of the answer before was fed.
    assert session.reused == (before - 1 if i else 0)
    (mine, _), *_ = ran
    assert mine[1] == prompts.slots_of(len(row) - session.reused)
    row += answer


def test_an_answer_that_ended_is_continued(model):
  session = Session(model)
  row = tokens(30)
  answer = turn(model, session, row)
  session = Session(model)
  stop = Stop(ids=[answer[4]])
  cut = turn(model, session, row, count=30, stop=stop)
  assert cut == answer[: answer.index(answer[4]) + 1]
  turn(model, session, [*row, *cut, *tokens(3)])
  assert session.reused == len(row) + len(cut) - 1


def test_what_a_template_leaves_out_is_forgotten(model):
  session = Session(model)
  row = tokens(30)
  answer = turn(model, session, row)
  # As templates do that drop reasoning from the history.
  without = [*row, (answer[0] + 1) % V, *tokens(3)]
  turn(model, session, without)
  is_ring = model.config.windows[1] is not None
  assert session.reused == (0 if is_ring else 30)
  turn(model, session, [(row[0] + 1) % V, *row[1:]])
  assert session.reused == 0
  turn(model, session, row[:2])
  assert session.reused == 0


def test_a_stream_that_is_left_early(model):
  session = Session(model)
  row = tokens(30)
  running = stream(model, [row], max_new_tokens=40, session=session, interval=4)
  answer = [*next(running).tokens[0], *next(running).tokens[0]]
  turn(model, session, [*row, *answer, *tokens(3)])
  # The loop has gone on behind what was read, which a ring cannot forget.
  assert session.reused == (0 if model.config.windows[1] is not None else 30 + 4)
  with pytest.raises(ConfigError, match="another stream has continued the session"):
    next(running)


def test_a_full_cache_starts_anew(monkeypatch):
  monkeypatch.setattr("models_core.generation.session._LEAST", 64)
  model = make(None, MODELS["whole"])
  session, row, sizes, reused = Session(model), [], [], []
  for _ in range(6):
    row += tokens(10)
    row += turn(model, session, row)
    sizes.append(session.held.kind[0])
    reused.append(session.reused)
  # A turn that is continued takes 16 slots for the prompt's rest and 8 for the answer; 48 and 24 are too many for 64.
  assert sizes == [64, 64, 64, 128, 128, 256]
  assert reused == [0, 18, 0, 0, 75, 0]


def test_another_dtype_starts_anew():
  model = make(None, MODELS["whole"])
  session, row = Session(model), tokens(30)
  row += turn(model, session, row)
  turn(model, session, [*row, 1], cache_dtype="bfloat16")
  assert session.reused == 0


@pytest.mark.parametrize("kind", MESHES)
def test_meshes(kind):
  alone = make(None, MODELS["whole"])
  model = make(MESHES[kind](), MODELS["whole"])
  session, row = Session(model), tokens(30)
  for _ in range(2):
    row += tokens(5)
    found = generate(model, [row], max_new_tokens=9, session=session).tokens[0].tolist()
    assert found == generate(alone, [row], max_new_tokens=9).tokens[0].tolist()
    row += [*found[:3], (found[3] + 1) % V]
  assert session.reused == 35 + 3


def test_turns_share_programs(model, compilations):
  jax.clear_caches()  # of the tests before
  session, row = Session(model), tokens(20)
  counts = []
  for _ in range(3):
    row += tokens(5)
    row += generate(model, [row], max_new_tokens=9, session=session).tokens[0].tolist()
    counts.append(len(compilations))
  assert 0 < counts[0] <= counts[1] == counts[2]


REFUSED = {
  "rows": {"prompts": [[1], [2]]},
  "samples": {"num_samples": 2},
  "prefix": {"prefix": True},
  "size": {"cache_size": 2048},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_a_session_holds_one_row(model, options):
  options = dict(options)
  if "prefix" in options:
    options["prefix"] = Prefix(model, [1])
  rows = options.pop("prompts", [[1, 2]])
  with pytest.raises(ConfigError, match="a session holds one row"):
    stream(model, rows, max_new_tokens=2, session=Session(model), **options)
