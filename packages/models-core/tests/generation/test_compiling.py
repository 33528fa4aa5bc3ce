"""What a stream runs is compiled before its model has numbers."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from models_core.generation import GREEDY, Sampling, Session, Stop, generate, stream
from models_core.loading import abstract_model

from ..layers.tiny_lm import Config, Model, make

MESHES = {
  "one device": lambda: None,
  "auto": lambda: Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp")),
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2),
}
CASES = {
  "greedy": ([1, 2, 3], {"max_new_tokens": 20, "interval": 4}),
  "in chunks": (list(range(16)) * 40, {"max_new_tokens": 20, "interval": 4}),
  "one token": ([1, 2, 3], {"max_new_tokens": 1}),
  "sampled": (
    [1, 2, 3],
    {
      "max_new_tokens": 40,
      "sampling": Sampling(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.1),
      "stop": Stop(ids=[9]),
    },
  ),
}


def without_numbers(config, mesh=None):
  """The model with a shape in the place of each array."""
  structure = abstract_model(Model, config, mesh)
  return structure.fill(
    {
      name: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=p.sharding)
      for name, p in structure.parameters.items()
    }
  )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_call_after_it_compiles_nothing(mesh, case, compilations):
  # A configuration that no other test has, as programs are kept for all models of one configuration.
  number = 10 * list(CASES).index(case) + list(MESHES).index(mesh)
  config, mesh = Config(windows=(None, 100 + number)), MESHES[mesh]()
  prompt, options = CASES[case]
  shapes = without_numbers(config, mesh)
  model = make(mesh, config)
  del compilations[:]
  stream(shapes, [prompt], **options).compile()
  assert len(compilations) >= 3
  del compilations[:]
  found = generate(model, [prompt], **options)
  assert compilations == []
  assert 1 <= len(found.tokens[0]) <= options["max_new_tokens"]


def test_other_options_are_not_compiled_for(compilations):
  config = Config(windows=(None, 99))
  shapes = without_numbers(config)
  stream(shapes, [[1, 2]], max_new_tokens=4, sampling=GREEDY).compile()
  model = make(None, config)
  del compilations[:]
  generate(model, [[1, 2]], max_new_tokens=4, sampling=Sampling(temperature=1.0))
  assert compilations != []


def test_the_first_token_does_not_wait_for_the_program_of_the_others(compilations):
  model = make(None, Config(windows=(None, 98)))
  expected = None
  for late in (True, False):
    del compilations[:]
    pieces = stream(model, [[1, 2, 3]], max_new_tokens=9, interval=4)
    found = [next(pieces)]
    names = [each["fun_name"] for each in compilations]
    assert "jit(decode)" not in names
    assert ("jit(begin)" in names) == late
    found += list(pieces)
    assert ("jit(decode)" in [each["fun_name"] for each in compilations]) == late
    tokens = [piece.tokens[0].tolist() for piece in found]
    assert list(map(len, tokens)) == [1, 4, 4]
    assert expected in (None, tokens)
    expected = tokens


@pytest.mark.parametrize("others", ["follow", "are left to another stream"])
def test_a_session_is_whole_after_its_first_token(others):
  config = Config(windows=(None, 97 if others == "follow" else 96))
  model = make(None, config)
  whole = generate(model, [[1, 2, 3]], max_new_tokens=9).tokens[0].tolist()
  session = Session(model)
  pieces = stream(model, [[1, 2, 3]], max_new_tokens=9, interval=4, session=session)
  first = next(pieces).tokens[0].tolist()
  assert first == whole[:1]
  if others == "follow":
    rest = [token for piece in pieces for token in piece.tokens[0].tolist()]
  else:
    more = generate(model, [[1, 2, 3, *first]], max_new_tokens=8, session=session)
    rest = more.tokens[0].tolist()
    assert session.reused == 3
  assert first + rest == whole


def test_a_stream_waits_for_a_program_that_is_being_compiled(compilations, monkeypatch):
  config = Config(windows=(None, 95))
  shapes = without_numbers(config)
  model = make(None, config)
  first, go_on = threading.Event(), threading.Event()
  planned = stream(shapes, [[1, 2, 3]], max_new_tokens=9, interval=4)
  decode = planned._decode

  def later():
    go_on.wait(10)
    return decode()

  monkeypatch.setattr(planned, "_decode", later)
  thread = threading.Thread(target=planned.compile, args=(first.set,))
  del compilations[:]
  thread.start()
  assert first.wait(30)
  pieces = stream(model, [[1, 2, 3]], max_new_tokens=9, interval=4)
  # The first token comes while the other program is not compiled.
  assert len(next(pieces).tokens[0]) == 1
  threading.Timer(0.1, go_on.set).start()
  assert sum(len(piece.tokens[0]) for piece in pieces) == 8
  thread.join()
  names = [each["fun_name"] for each in compilations]
  assert [names.count(f"jit({name})") for name in ("prefill", "begin", "decode")] == [1, 1, 1]


def test_a_program_that_cannot_be_compiled_keeps_nobody_waiting(monkeypatch):
  config = Config(windows=(None, 94))
  shapes = without_numbers(config)
  planned = stream(shapes, [[1, 2, 3]], max_new_tokens=9)

  def fails():
    raise MemoryError("no room")

  monkeypatch.setattr(planned, "_decode", fails)
  with pytest.raises(MemoryError):
    planned.compile()
  found = generate(make(None, config), [[1, 2, 3]], max_new_tokens=9)
  assert len(found.tokens[0]) == 9


def test_a_loaded_model_is_compiled_for_without_waiting_for_itself():
  stream(make(None, Config(windows=(None, 93))), [[1, 2, 3]], max_new_tokens=9).compile()


@pytest.mark.parametrize("at", range(4))
def test_a_stream_that_was_interrupted_is_at_its_end_and_leaves_nothing_wrong_to_its_session(at, monkeypatch):
  model = make(None, Config(windows=(None, None)))
  whole = generate(model, [[1, 2, 3]], max_new_tokens=12).tokens[0].tolist()
  session = Session(model)
  pieces = stream(model, [[1, 2, 3]], max_new_tokens=12, interval=3, session=session)
  decode, calls = pieces._decode, []

  def interrupted():
    calls.append(None)
    if len(calls) == at + 1:
      raise KeyboardInterrupt
    return decode()

  monkeypatch.setattr(pieces, "_decode", interrupted)
  found = []

  def read():
    for piece in pieces:
      found.extend(piece.tokens[0].tolist())

  with pytest.raises(KeyboardInterrupt):
    read()
  assert list(pieces) == []
  assert found == whole[: len(found)]
  again = generate(model, [[1, 2, 3, *found]], max_new_tokens=12 - len(found), session=session)
  assert found + again.tokens[0].tolist() == whole
