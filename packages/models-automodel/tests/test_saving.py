"""AutoModel.save_pretrained: a directory that comes back as it was."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models_automodel import AutoModel, ConfigError, ModelsError, SaveError
from models_core.adapters import Adapter, save_merged
from models_core.testing import to_tensors
from models_llama.llama3 import FAMILY


@pytest.fixture
def base(checkpoint, tmp_path):
  """The tiny model as a repository has it: with a tokenizer, and fields of config.json that no model reads."""
  source, tensors = checkpoint
  directory = tmp_path / "base"
  directory.mkdir()
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  raw = json.loads((source / "config.json").read_text())
  raw |= {"eos_token_id": [7, 9], "max_position_embeddings": 77, "_name_or_path": "mine"}
  (directory / "config.json").write_text(json.dumps(raw))
  for name in (
    "tokenizer.json",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE.txt",
    "README.md",
    "optimizer.pt",
    "trainer_state.json",
    "pytorch_model.bin",
  ):
    (directory / name).write_text(f"{{}} of {name}")
  return directory


def load(path, mesh=None, **options):
  return AutoModel.from_pretrained(str(path), mesh, progress=False, **options)


def bytes_of(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same_tensors(directory, expected):
  found = {}
  for file in directory.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(file)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), name


@pytest.mark.parametrize("size", ["5GB", "4KB"])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_untouched_model_is_the_same_checkpoint(base, checkpoint, sharded, size, tmp_path):
  model, path = load(base, jax.make_mesh((2, 2), ("fsdp", "tp")) if sharded else None)
  AutoModel.save_pretrained(model, tmp_path / "out", base=path, max_shard_size=size)
  assert_same_tensors(tmp_path / "out", checkpoint[1])
  first, again = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
  assert again == first | {"torch_dtype": "float32", "dtype": "float32"}
  copied = {"tokenizer.json", "generation_config.json", "preprocessor_config.json", "LICENSE.txt"}
  out = bytes_of(tmp_path / "out")
  assert {name for name in out if "safetensors" not in name} == copied | {"config.json"}
  assert all(out[name] == bytes_of(base)[name] for name in copied)
  assert_same_tensors(tmp_path / "out", to_tensors(load(tmp_path / "out")[0], FAMILY.weights["huggingface"]))


def test_without_a_base_there_are_weights_and_config_json(base, checkpoint, tmp_path):
  model, _ = load(base)
  AutoModel.save_pretrained(model, tmp_path / "out")
  assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
  assert_same_tensors(tmp_path / "out", checkpoint[1])
  assert load(tmp_path / "out")[0].config == model.config


def test_saving_onto_the_base_keeps_the_model_and_the_user_s_files(base, checkpoint, tmp_path):
  model, path = load(base)
  with pytest.raises(SaveError, match="overwrite=True"):
    AutoModel.save_pretrained(model, path, base=path)
  model.final_norm.w.set_value(model.final_norm.w.get_value() + 1)
  AutoModel.save_pretrained(model, path, base=path, overwrite=True)
  name = "model.norm.weight"
  changed = checkpoint[1] | {name: checkpoint[1][name] + 1}
  # The model's arrays may be the old file's mapped pages.
  assert_same_tensors(base, changed)
  for key, tensor in to_tensors(model, FAMILY.weights["huggingface"]).items():
    np.testing.assert_array_equal(tensor, changed[key])
  assert (base / "README.md").read_text() == "{} of README.md"
  AutoModel.save_pretrained(load(base)[0], path, base=path, max_shard_size="4KB", overwrite=True)
  assert not (base / "model.safetensors").exists()
  assert_same_tensors(base, changed)
  AutoModel.save_pretrained(load(base)[0], path, base=path, overwrite=True)
  assert [file.name for file in base.glob("*safetensors*")] == ["model.safetensors"]


def test_a_dtype_goes_into_the_files_and_config_json(base, checkpoint, tmp_path):
  model, path = load(base)
  AutoModel.save_pretrained(model, tmp_path / "out", base=path, dtype=jnp.bfloat16)
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
  assert_same_tensors(tmp_path / "out", {n: t.astype(jnp.bfloat16) for n, t in checkpoint[1].items()})
  with pytest.raises(TypeError, match="dtype='bf17' is not a data type"):
    AutoModel.save_pretrained(model, tmp_path / "other", dtype="bf17")


def test_overridden_fields_are_written(base, tmp_path):
  model, path = load(base, norm_eps=1e-3)
  AutoModel.save_pretrained(model, tmp_path / "out", base=path)
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (raw["rms_norm_eps"], raw["max_position_embeddings"]) == (1e-3, 77)


def test_a_model_of_no_family_is_an_error(tmp_path):
  with pytest.raises(ModelsError, match="has no attribute config"):
    AutoModel.save_pretrained(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tmp_path / "out")


def test_a_broken_config_of_the_base_is_an_error(base, tmp_path):
  model, path = load(base)
  (base / "config.json").write_text("{")
  with pytest.raises(ConfigError, match="is not valid"):
    AutoModel.save_pretrained(model, tmp_path / "out", base=path)
  assert not (tmp_path / "out").exists()


def test_a_directory_between_two_renames_is_found(base, tmp_path):
  base.rename(tmp_path / ".base.complete-0123456789abcdef")
  model, _ = load(base)
  assert model.config.num_layers == 2
  assert sorted(os.listdir(tmp_path)) == ["base"]


def test_a_merged_adapter_is_saved_with_the_same_files(base, tmp_path):
  model, path = load(base)
  AutoModel.save_pretrained(model, tmp_path / "saved", base=path, progress=False)
  save_merged(path, tmp_path / "merged", Adapter({}, alpha=1.0, rank=1), FAMILY, model.config)
  assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "saved")
