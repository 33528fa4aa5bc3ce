"""Texts and conversations in, texts out, by a tiny model and a tokenizer of words."""

import collections
import json
import logging
import shutil

import jax
import pytest

from models_automodel import load_text_model
from models_automodel.text.stop_strings import until
from models_core.errors import CheckpointError, ConfigError
from models_core.generation import GREEDY, Sampling, generate

WORDS = [*(f"w{i}" for i in range(60)), "<unk>", "<end>", "user:", "tool:"]
TEMPLATE = "{% for t in tools or [] %}tool: {{ t.name }} {% endfor %}{% for m in messages %}user: {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def directory(checkpoint, tmp_path_factory):
  tokenizers = pytest.importorskip("tokenizers")
  source, _ = checkpoint
  path = tmp_path_factory.mktemp("text-model")
  shutil.copy(source / "model.safetensors", path)
  config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 100}
  (path / "config.json").write_text(json.dumps(config))
  engine = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
  )
  engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  engine.add_special_tokens(["<end>"])
  engine.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(
    json.dumps({"unk_token": "<unk>", "eos_token": "<end>", "chat_template": TEMPLATE})
  )
  return path


@pytest.fixture(scope="module")
def model(directory):
  return load_text_model(directory, progress=False)


def expected(model, ids, count):
  (tokens,) = generate(model.model, [ids], max_new_tokens=count).tokens
  return model.tokenizer.decode(tokens.tolist())


def test_texts_and_conversations(model):
  tokenizer = model.tokenizer
  answer = model.generate("w1 w2", max_new_tokens=20)
  assert answer.split() == expected(model, [1, 2], 20).split()
  assert len(answer.split()) > 5
  messages = [{"role": "user", "content": "w3"}]
  assert model.generate(messages, max_new_tokens=5) == expected(model, tokenizer.encode("user: w3"), 5)
  tools = [{"name": "w7"}]
  ids = tokenizer.encode("tool: w7 user: w3")
  assert model.generate(messages, tools=tools, max_new_tokens=5) == expected(model, ids, 5)
  pieces = list(model.stream("w1 w2", max_new_tokens=20))
  assert "".join(pieces) == answer
  assert len(pieces) > 3
  prompts = ["w1 w2", messages, [9, 8, 7, 6]]
  assert model.generate_batch(prompts, max_new_tokens=20) == [
    model.generate(prompt, max_new_tokens=20) for prompt in prompts
  ]


def test_turns_of_a_conversation_share_a_cache(model):
  session, messages, rows = model.session(), [], []
  for said in ("w3", "w4", "w5"):
    messages = [*messages, {"role": "user", "content": f" {said} "}]
    rows.append(model.tokenizer.chat(messages))
    answer = model.generate(messages, max_new_tokens=6, session=session)
    assert answer == model.generate(messages, max_new_tokens=6)
    messages = [*messages, {"role": "assistant", "content": f" {answer} "}]
  # The template frames the answers anew, but all that was asked before is there.
  assert rows[2][: len(rows[1])] == rows[1]
  assert session.reused == len(rows[1])


def test_stop_strings(model):
  answer = model.generate("w1 w2", max_new_tokens=60)
  words = answer.split()
  stop = " ".join(words[9:11])
  cut = answer[: answer.index(stop)]
  assert model.generate("w1 w2", max_new_tokens=60, stop=[stop, "nowhere w"][:1]) == cut
  batch = model.generate_batch(["w1 w2", "w5"], max_new_tokens=60, stop=[stop])
  assert batch[0] == cut
  with pytest.raises(ConfigError, match="a stop string is empty"):
    model.stream("w1", stop=[""])
  with pytest.raises(
    ConfigError, match=r"'w1 <end>' can appear in no answer, because the special token <end>"
  ):
    model.stream("w1", stop=["w1 <end>"])
  with pytest.raises(ConfigError, match="characters that the tokenizer has no tokens for"):
    model.stream("w1", stop="☃")
  list(model.stream("w1", stop=["<end>"], max_new_tokens=1))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_string_across_pieces(size):
  text = "aab abab abac rest"
  pieces = [text[i : i + size] for i in range(0, len(text), size)]
  assert "".join(until(pieces, ["abac", "never"])) == "aab abab "
  assert "".join(until(pieces, ["restless"])) == text
  assert "".join(until(pieces, [])) == text


def test_prompts_that_cannot_be(model):
  for prompt in ("", []):
    with pytest.raises(ConfigError, match="the prompt is empty"):
      model.stream(prompt)
  with pytest.raises(ConfigError, match="has 90 tokens and 20 new ones, but the model's context is 100"):
    model.stream("w1 " * 90, max_new_tokens=20)
  with pytest.raises(ConfigError, match=r"has 100 tokens and 1 new one, .* shorten"):
    model.stream("w1 " * 100)
  assert len(model.generate("w1 " * 90).split()) <= 10
  for prompt in ("w1", [{"role": "user", "content": "w1"}]):
    with pytest.raises(
      ConfigError, match=r"temperature, top_k: a part of the sampling: give sampling=Sampling\(t"
    ):
      model.generate(prompt, top_k=5, temperature=0.7)
  with pytest.raises(
    ConfigError, match="tools: variables of a chat template, but the prompt is no conversation"
  ):
    model.stream("w1", tools=[])


def test_a_wrong_prompt_reads_no_weights(directory, tmp_path):
  shutil.copytree(directory, tmp_path / "broken")
  weights = tmp_path / "broken" / "model.safetensors"
  found = []

  def check(plan, settings):
    found.append((plan.num_parameters, settings.context))
    weights.unlink()
    settings.check([settings.encode("w1 " * 90)], 20, ())

  with pytest.raises(ConfigError, match="context is 100"):
    load_text_model(tmp_path / "broken", before_weights=check, progress=False)
  assert found == [(5968, 100)]


def test_a_wrong_prompt_fetches_no_weights(directory, hub):
  hub.add("org/name", {path.name: path.read_bytes() for path in directory.iterdir()})

  def check(plan, settings):
    assert settings.context == 100
    raise ConfigError("wrong")

  with pytest.raises(ConfigError, match="wrong"):
    load_text_model("org/name", before_weights=check, progress=False)
  nbytes = sum(request.sent for request in hub.requests if "model.safetensors" in request.line)
  assert nbytes < (directory / "model.safetensors").stat().st_size
  assert load_text_model("org/name", progress=False).generate("w1", max_new_tokens=2)


def test_scores_are_those_of_the_tokens(model):
  (found,) = model.score(["w1 w2"], ["w3 w4 w5"])
  assert found.log_probs.shape == (3,)
  assert (found.log_probs < 0).all()


GENERATION = {
  "none": ({}, GREEDY),
  "greedy": ({"temperature": 0.7, "do_sample": False}, GREEDY),
  "sampled": ({"do_sample": True}, Sampling(temperature=1.0, top_k=50)),
  "numbers": (
    {
      "do_sample": True,
      "temperature": 0.6,
      "top_k": 20,
      "top_p": 0.95,
      "min_p": 0.1,
      "repetition_penalty": 1.05,
    },
    Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.05),
  ),
}


@pytest.mark.parametrize(("raw", "sampling"), GENERATION.values(), ids=GENERATION)
def test_generation_config(directory, tmp_path, raw, sampling):
  shutil.copytree(directory, tmp_path / "copy")
  (tmp_path / "copy" / "generation_config.json").write_text(json.dumps(raw))
  assert load_text_model(tmp_path / "copy", progress=False).settings.sampling == sampling


def test_what_is_not_implemented_is_noted_and_what_is_wrong_refused(directory, tmp_path, caplog):
  shutil.copytree(directory, tmp_path / "copy")
  file = tmp_path / "copy" / "generation_config.json"
  file.write_text(json.dumps({"num_beams": 4, "no_repeat_ngram_size": 0, "typical_p": 1.0}))
  with caplog.at_level(logging.WARNING):
    load_text_model(tmp_path / "copy", progress=False)
  assert "generation_config.json: num_beams: not implemented, and not applied" in caplog.text
  file.write_text(json.dumps({"do_sample": True, "top_p": 3}))
  with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 3, expected more than 0"):
    load_text_model(tmp_path / "copy", progress=False)


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_a_first_call_is_compiled_while_weights_are_read(shape, directory, compilations):
  mesh = None if shape is None else jax.make_mesh(shape, ("fsdp", "tp"))
  call = {"prompt": [{"role": "user", "content": "w3"}], "max_new_tokens": 11, "stop": ["w9"]}
  options = {"dtype": "bfloat16", "progress": False}
  jax.clear_caches()  # other tests run the same programs
  del compilations[:]
  model = load_text_model(directory, mesh, first_call=lambda settings: call, **options)
  assert {"jit(prefill)", "jit(begin)"} <= {each["fun_name"] for each in compilations}
  prompt = call.pop("prompt")
  text = model.generate(prompt, **call)
  # The program of all other tokens may still have been under way: the call waited for it.
  names = collections.Counter(each["fun_name"] for each in compilations)
  assert [names[f"jit({name})"] for name in ("prefill", "begin", "decode")] == [1, 1, 1]
  assert text == load_text_model(directory, mesh, **options).generate(prompt, **call)


def test_the_first_call_of_a_session_is_compiled_too(directory, compilations):
  call = {"prompt": [{"role": "user", "content": "w3"}], "max_new_tokens": 11, "in_session": True}
  jax.clear_caches()  # other tests run the same programs
  del compilations[:]
  model = load_text_model(directory, first_call=lambda settings: call, progress=False)
  session = model.session()
  assert list(model.stream(call["prompt"], max_new_tokens=11, session=session))
  names = collections.Counter(each["fun_name"] for each in compilations)
  assert [names[f"jit({name})"] for name in ("prefill", "begin", "decode")] == [1, 1, 1]


def test_a_first_call_that_fails_fails_when_it_is_made(directory):
  call = {"prompt": "w1 " * 200}
  model = load_text_model(directory, first_call=lambda settings: call, progress=False)
  with pytest.raises(ConfigError, match="the model's context is 100"):
    model.generate(**call)
