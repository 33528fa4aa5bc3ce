"""Folders that hold more, or other names, than one checkpoint: what transformers loads of them is loaded."""

import json

import pytest
import safetensors.torch
import torch
import transformers

from models_automodel import AutoModel

ONE = pytest.mark.parametrize("placement", ["one-eager"], indirect=True)
INDEX = "model.safetensors.index.json"


def _write(path, state, name="model.safetensors"):
  safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path / name, {"format": "pt"})


def _index(path, name=INDEX, **places):
  (path / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def _sharded(path, state, edit=lambda places: places, index=INDEX):
  """Two shards and their index."""
  names = sorted(state)
  files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
  for file, held in files.items():
    _write(path, {name: state[name] for name in held}, file)
  (path / "model.safetensors").unlink()
  _index(path, index, **edit({name: file for file, held in files.items() for name in held}))


def _beside_a_stale_index(path, state):
  _sharded(path, {name: 1.5 * tensor for name, tensor in state.items()})
  _write(path, state)


def _beside_an_index_without_files(path, state):
  _index(path, **dict.fromkeys(state, "model-00001-of-00001.safetensors"))


def _in_another_file_than_the_index_says(path, state):
  _sharded(path, state, lambda places: places | dict.fromkeys(sorted(state)[:3], "model-2.safetensors"))


def _named_in_no_index(path, state):
  _sharded(path, state, lambda places: {name: file for name, file in places.items() if "k_proj" not in name})


def _without_the_prefix(path, state):
  _write(path, {name.removeprefix("model."): tensor for name, tensor in state.items()})


def _with_the_prefix_twice(path, state):
  _write(path, {f"model.{name}": tensor for name, tensor in state.items()})


def _named_by_config_json(path, state):
  _write(path, state, "mine.safetensors")
  _write(path, {name: 1.5 * tensor for name, tensor in state.items()})
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))


FOLDERS = (
  _beside_a_stale_index,
  _beside_an_index_without_files,
  _in_another_file_than_the_index_says,
  _named_in_no_index,
  _without_the_prefix,
  _with_the_prefix_twice,
  _named_by_config_json,
)


@ONE
@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("variant", ["untied", "tied"], indirect=True)
def test_what_transformers_loads(edit, variant, change, placement, tokens, assert_parity):
  source = edit(variant)
  expected = source.logits(tokens)
  change(source.path, safetensors.torch.load_file(source.path / "model.safetensors"))
  reference = source.fresh_reference().eval()
  with torch.no_grad():
    assert torch.equal(reference(torch.tensor(tokens, dtype=torch.long)).logits, torch.tensor(expected))
  assert_parity(placement.logits(source.fresh_model(placement), tokens), expected)


@ONE
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_variant(edit, is_sharded, placement, tokens, assert_parity):
  source = edit("untied")
  state = safetensors.torch.load_file(source.path / "model.safetensors")
  expected = source.logits(tokens)
  if is_sharded:
    _sharded(source.path, state, index="model.safetensors.index.fp16.json")
  else:
    _write(source.path, state, "model.fp16.safetensors")
  _write(source.path, {name: 1.5 * tensor for name, tensor in state.items()})
  reference = transformers.AutoModelForCausalLM.from_pretrained(source.path, variant="fp16").eval()
  with torch.no_grad():
    assert torch.equal(reference(torch.tensor(tokens, dtype=torch.long)).logits, torch.tensor(expected))
  model, _ = AutoModel.from_pretrained(source.path, variant="fp16", dtype="float32", progress=False)
  assert_parity(placement.logits(model, tokens), expected)


@ONE
def test_a_base_model_of_a_tied_one(edit, placement, tokens, assert_parity):
  source = edit("tied")
  expected = source.logits(tokens)
  source.fresh_reference().model.save_pretrained(source.path)
  assert_parity(placement.logits(source.fresh_model(placement), tokens), expected)
