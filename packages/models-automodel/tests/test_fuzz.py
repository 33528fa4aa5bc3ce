"""Mutated config.json files of every installed family: each is read, or refused by one clear error, in no time."""

import copy
import dataclasses
import json
import os
import random
import re
import resource
import time

import pytest

from models_automodel import AutoModel, ModelsError, call_model_config, families
from models_automodel.finding import find
from models_automodel.where import Where
from models_core.formats import read_json

# A run over many more is the session `fuzz`.
MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "400"))
PLANS = MUTANTS // 200
SECONDS, KIB = 2.0, 500 * 1024

# The smallest preset of each family, as its config.json says it.
SMALLEST = {
  "gemma": "gemma-2b",
  "gemma3": "gemma-3-270m",
  "llama3": "llama-3.2-1b",
  "qwen2": "qwen2.5-0.5b",
  "qwen3": "qwen3-0.6b",
}

NASTY = [
  None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**100, 0.5, 1.0, -0.0, 1e-320,
  1e308, 1.5e308, float("nan"), float("inf"), float("-inf"), "", "x", "7", "null", "silu", "yarn", "../x", "\0", "é" * 99,
  [], [[]], [None], [0], [1, 2], [1.5], ["x"], ["full_attention"] * 3, [True], {}, {"": 0}, {"rope_type": "yarn"},
  {"rope_type": []}, {"rope_type": "linear", "factor": "x"}, {"type": {}}, {"rope_theta": []}, {"quant_method": 1}, {"a": {"b": []}},
]  # fmt: skip


def config_of(category):
  return families.load_family(category, category).write_config(call_model_config(SMALLEST[category]))


def nodes(value):
  """All objects and lists of a document, the document first."""
  found = [value]
  for node in found:
    children = node.values() if isinstance(node, dict) else node
    found += [child for child in children if isinstance(child, (dict, list)) and child]
  return found


def mutate(raw, rnd):
  """One to three changes of a document, then now and then of its bytes."""
  raw = copy.deepcopy(raw)
  for _ in range(rnd.choice([1, 1, 1, 2, 3])):
    node = rnd.choice(nodes(raw)[: rnd.choice([1, 9])])
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
      continue
    key = rnd.choice(keys)
    match rnd.randrange(8):
      case 0:
        del node[key]
      case 1 if isinstance(node, dict):
        node[rnd.choice([key.upper(), key + "_", "text_config", "rope_scaling", "layer_types"])] = (
          copy.deepcopy(node[key])
        )
      case 2:
        node[key] = copy.deepcopy(node[rnd.choice(keys)])
      case 3:
        node[key] = {"x": node[key]} if rnd.random() < 0.5 else [node[key]] * rnd.choice([1, 2, 30])
      case _:
        node[key] = copy.deepcopy(rnd.choice(NASTY))
  text = bytearray(json.dumps(raw).encode())
  if rnd.random() < 0.2:
    at = rnd.randrange(len(text))
    match rnd.randrange(4):
      case 0:
        del text[at:]
      case 1:
        text[at] = rnd.randrange(256)
      case 2:
        text[at:at] = rnd.choice(
          [b"NaN", b"1e999", b"9" * 400, b"[" * 3000, b'"\\ud800"', b"\xff", b"-", b'{"a":']
        )
      case 3:
        start = rnd.randrange(len(text))
        text[at:at] = text[start : start + 30]
  return bytes(text)


def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(action, content):
  """Runs it within the bounds. True where it succeeded."""
  before, start, said = peak(), time.process_time(), None
  try:
    action()
  except ModelsError as error:
    said = str(error)
  except Exception as error:
    raise AssertionError(f"{type(error).__name__}: {error}: {content[:2000]!r}") from error
  assert time.process_time() - start < SECONDS, content[:2000]
  assert peak() - before < KIB, content[:2000]
  assert said is None or said.strip()
  return said is None


@dataclasses.dataclass
class Memory:
  """A directory that holds nothing but a config.json."""

  content: bytes
  path = "memory"

  def size(self, name):
    return len(self.content)

  def read(self, name, start, stop):
    return self.content[start:stop]


def read(content):
  raw = read_json(Memory(content), "config.json")
  model_type = raw.get("model_type")
  if isinstance(model_type, str):
    families.family_of_model_type(model_type, "memory").read_config(raw)


@pytest.fixture(params=sorted(SMALLEST.keys() & set(families.installed())))
def category(request):
  return request.param


def test_a_mutated_config_is_read_or_refused(category, tmp_path):
  raw, rnd = config_of(category), random.Random(category)
  contents = (mutate(raw, rnd) for _ in range(MUTANTS))
  accepted = [content for content in contents if check(lambda: read(content), content)]  # noqa: B023
  assert MUTANTS / 50 < len(accepted) < MUTANTS / 2
  # With some, the model's shapes are laid beside a checkpoint that has none of its tensors.
  (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
  for content in rnd.sample(accepted, min(PLANS, len(accepted))):
    (tmp_path / "config.json").write_bytes(content)
    assert not check(lambda: AutoModel.plan(str(tmp_path)), content)


def test_every_key_of_every_wrong_type_is_read_or_refused(category):
  raw = config_of(category)
  outcomes = [
    check(lambda: read(content), content)  # noqa: B023
    for key in raw
    for value in NASTY
    for content in [json.dumps(raw | {key: value}).encode()]
  ]
  assert 0 < sum(outcomes) < len(outcomes)


BAD_CONFIGS = {
  "empty": (b"", "not valid JSON"),
  "cut off": (b'{"model_type": "llama"', "not valid JSON"),
  "not UTF-8": (b'{"model_type": "ll\xffma"}', "not valid JSON"),
  "with a byte order mark": (b'\xef\xbb\xbf{"model_type": "llama"}', "not valid JSON"),
  "deeply nested": (b"[" * 100_000, "not valid JSON"),
  "a doubled key": (b'{"model_type": "llama", "model_type": "gemma"}', "the key 'model_type' occurs twice"),
  "a list": (b"[]", "type list, expected a JSON object"),
  "a number of 5000 digits": (b'{"hidden_size": ' + b"1" * 5000 + b"}", "not valid JSON"),
  "without a model_type": (b"{}", "no model_type"),
  "a model_type that is none": (b'{"model_type": 7}', "no model_type"),
  "an unknown model_type": (b'{"model_type": "nobody"}', "no installed family reads model_type 'nobody'"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_one_error_that_names_its_file(tmp_path, content, message):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(ModelsError, match=re.escape(message)) as caught:
    find(Where.of(str(tmp_path)))
  assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
  "value", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"1e-5"', "[]", "{}", "-1", "0"]
)
@pytest.mark.parametrize(
  "key", ["num_hidden_layers", "hidden_size", "rms_norm_eps", "rope_theta", "head_dim"]
)
def test_what_is_no_number_is_refused_by_its_key(checkpoint, edit_config, key, value):
  place = edit_config(rope_parameters=None)
  text = (place / "config.json").read_text()
  changed, count = re.subn(rf'"{key}": [^,}}]*', f'"{key}": {value}', text)
  assert count == 1
  (place / "config.json").write_text(changed)
  with pytest.raises(ModelsError, match=key):
    find(Where.of(str(place)))


def test_an_absurd_number_of_layers_is_refused_at_once(edit_config):
  start = time.process_time()
  with pytest.raises(
    ModelsError, match="num_hidden_layers is 10000000000, expected a positive whole number, 1000 at most"
  ):
    find(Where.of(str(edit_config(num_hidden_layers=10**10))))
  assert time.process_time() - start < SECONDS
