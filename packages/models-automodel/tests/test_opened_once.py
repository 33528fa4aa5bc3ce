"""How often files are opened and parsed: the headers once, the weights by one descriptor."""

import collections
import json
import os
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from models_automodel import AutoModel
from models_automodel.convert import convert
from models_core.adapters import Adapter, Factors, save_merged
from models_core.dummy_model_creator import create_dummy_model
from models_core.formats import LocalFiles, gguf, read_safetensors, safetensors
from models_llama.llama3 import FAMILY
from models_llama.llama3.model import Llama3, ModelConfig

CONFIG = ModelConfig(
  num_layers=2, vocab_size=64, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=4, num_kv_heads=2,
  rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip

COPIED = "model.layers.0.self_attn.rotary_emb.inv_freq"

_counting: list[tuple[str, collections.Counter]] = []


def _count_opens(event, arguments):
  if event == "open" and _counting and isinstance(arguments[0], str):
    folder, opens = _counting[-1]
    if os.path.dirname(arguments[0]) == folder:
      opens[os.path.basename(arguments[0])] += 1


sys.addaudithook(_count_opens)


@pytest.fixture
def count(monkeypatch):
  """Counts opens of the files of a folder, and headers that are parsed, while a function runs."""
  parsed = collections.Counter()
  for module in (safetensors, gguf):
    parse = module._parse

    def counted(*args, parse=parse):
      result = parse(*args)
      parsed["headers"] += 1
      return result

    monkeypatch.setattr(module, "_parse", counted)

  def run(folder, function):
    opens = collections.Counter()
    parsed.clear()
    _counting.append((str(folder), opens))
    try:
      function()
    finally:
      _counting.pop()
    return opens, parsed["headers"]

  return run


@pytest.fixture
def folder(tmp_path):
  """A checkpoint of several files, each of whose headers is longer than one first read."""
  model = create_dummy_model(Llama3, CONFIG)
  AutoModel.save_pretrained(model, tmp_path / "model", max_shard_size=8000, progress=False)
  files = sorted((tmp_path / "model").glob("*.safetensors"))
  assert len(files) > 2
  for file in files:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    if file == files[0]:
      # The model has no parameter for it: savers copy it.
      at = len(tensors)
      header[COPIED] = {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]}
      tensors += bytes(8)
    text = json.dumps(header).encode() + b" " * 300_000
    file.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
  (tmp_path / "model" / "tokenizer.json").write_text("{}")
  return tmp_path / "model"


def check(found, files, most=2):
  opens, parsed = found
  assert {name for name in opens if name.endswith(".safetensors")} == set(files)
  assert max(opens.values()) <= most, opens
  assert parsed == len(files)


def names_of(folder):
  return [file.name for file in folder.glob("*.safetensors")]


def test_from_pretrained(folder, count):
  check(
    count(folder, lambda: AutoModel.from_pretrained(folder, progress=False)), names_of(folder), most=3
  )  # once more by whoever reads the first bytes ahead


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_convert(folder, count, to, tmp_path):
  check(count(folder, lambda: convert(folder, tmp_path / "out", to=to, progress=False)), names_of(folder))


def test_saving_over_a_base_whose_tensors_are_copied(folder, count, tmp_path):
  model, _ = AutoModel.from_pretrained(folder, progress=False)
  save = lambda: AutoModel.save_pretrained(model, tmp_path / "out", base=folder, progress=False)
  check(count(folder, save), names_of(folder))
  assert COPIED in read_safetensors(LocalFiles(str(tmp_path / "out"))).tensors


def test_saving_a_merged_adapter(folder, count, tmp_path):
  rng = np.random.default_rng(0)
  factors = Factors(rng.normal(size=(16, 2)).astype("f4"), rng.normal(size=(2, 24)).astype("f4"))
  adapter = Adapter({"layers.0.mlp.up_proj.w": factors}, alpha=2.0, rank=2)
  save = lambda: save_merged(folder, tmp_path / "out", adapter, FAMILY, CONFIG)
  check(count(folder, save), names_of(folder))


def test_a_file_that_was_replaced_after_the_plan_is_refused(folder):
  plan = AutoModel.plan(folder)
  name = next(iter(plan.files))
  data = (folder / name).read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
  renamed = {f"{key}2": entry for key, entry in entries.items()}
  text = json.dumps(renamed).encode().ljust(length)
  (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
  with (
    plan.open() as opened,
    pytest.raises(ValueError, match=f"{name}: 1 problem\n.*has changed since its header was read"),
  ):
    opened.read(plan.parameters[0].parameter.name)


def test_an_opened_plan_reads_what_load_gives(folder):
  mesh = jax.make_mesh((2, 2), ("fsdp", "tp"))
  model, _ = AutoModel.from_pretrained(folder, mesh, dtype="bfloat16", progress=False)
  plan = AutoModel.plan(folder, mesh, dtype="bfloat16")
  expected = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
  with plan.open() as opened:
    for name in reversed(expected):
      array = opened.read(name)
      assert array.sharding == expected[name].sharding
      np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]))
