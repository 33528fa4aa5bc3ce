"""Adapters of peft: loaded onto the base that they name, from a directory or the hub, and for a model at hand."""

import json
import logging

import jax
import numpy as np
import pytest
import safetensors.numpy

from models_automodel import (
  AutoModel,
  CheckpointError,
  ConfigError,
  SourceFilesError,
  load_adapter,
  merge_adapter,
)
from models_automodel.convert import convert
from models_core.errors import AdapterError

MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
A, B = (np.random.default_rng(0).normal(size=size).astype(np.float32) for size in ((2, 16), (16, 2)))


@pytest.fixture
def adapter(tmp_path, checkpoint):
  """`adapter(**keys)`: directory of an adapter of the checkpoint."""

  def write(tensors=None, **keys):
    tensors = tensors or {}
    for module in MODULES:
      tensors |= {
        f"base_model.model.{module}.lora_A.weight": A,
        f"base_model.model.{module}.lora_B.weight": B,
      }
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": str(checkpoint[0])}
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))
    return folder

  return write


def files(directory, *names):
  return {name: (directory / name).read_bytes() for name in names}


def check_merged(model, checkpoint):
  expected = checkpoint[1][f"{MODULES[0]}.weight"] + 2 * B @ A
  np.testing.assert_allclose(model.layers[0].attn.q_proj.w[...], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
    model.layers[0].attn.k_proj.w[...], checkpoint[1]["model.layers.0.self_attn.k_proj.weight"]
  )


def test_it_is_merged_into_the_base_that_it_names(adapter, checkpoint, caplog):
  folder = adapter()
  model, path = AutoModel.from_pretrained(folder, progress=False)
  check_merged(model, checkpoint)
  assert path == str(checkpoint[0])
  notes = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
  assert notes == [f"{folder}: a LoRA adapter, merged into its base {path}"]


def test_it_is_merged_in_the_dtype_and_on_the_mesh_of_the_call(adapter):
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tp"))
  model, _ = AutoModel.from_pretrained(adapter(), mesh, dtype="bfloat16", progress=False)
  w = model.layers[0].attn.q_proj.w[...]
  assert (w.dtype, w.sharding.mesh) == ("bfloat16", mesh)


def test_a_grown_vocabulary_is_saved_with_its_size(adapter, checkpoint, tmp_path):
  whole = np.random.default_rng(1).normal(size=(2, 70, 16)).astype(np.float32)
  names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
  model, path = AutoModel.from_pretrained(adapter(dict(zip(names, whole, strict=True))), progress=False)
  assert model.config.vocab_size == 70
  AutoModel.save_pretrained(model, tmp_path / "out", base=path, progress=False)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 70
  again, _ = AutoModel.from_pretrained(tmp_path / "out", progress=False)
  np.testing.assert_array_equal(again.lm_head.w[...], whole[1])


def test_it_is_kept_merged(adapter, checkpoint, tmp_path):
  folder = adapter()
  load = lambda: AutoModel.from_pretrained(folder, intermediate_ckpt_dir=tmp_path / "kept", progress=False)[0]
  check_merged(load(), checkpoint)
  check_merged(load(), checkpoint)


def test_one_for_a_model_at_hand(adapter, checkpoint):
  folder = adapter(base_model_name_or_path=None)
  model, _ = AutoModel.from_pretrained(checkpoint[0], progress=False)
  check_merged(merge_adapter(model, load_adapter(folder, model)), checkpoint)
  with pytest.raises(SourceFilesError, match="nowhere"):
    load_adapter("any/name", model, model_path="nowhere")


@pytest.mark.parametrize("task", ["plan", "convert"])
def test_what_takes_a_model_alone_says_how_an_adapter_is_loaded(task, adapter, tmp_path):
  folder = adapter(base_model_name_or_path="org/base")
  with pytest.raises(
    CheckpointError, match=r"a LoRA adapter of org/base, not a model: AutoModel\.from_pretrained merges"
  ):
    AutoModel.plan(folder) if task == "plan" else convert(folder, tmp_path / "out", progress=False)


def test_a_base_that_is_not_stated(adapter):
  with pytest.raises(CheckpointError, match=r"does not say of which model .*models_automodel\.load_adapter"):
    AutoModel.from_pretrained(adapter(base_model_name_or_path=None), progress=False)


@pytest.mark.parametrize("base", ["/nowhere/base", "./nowhere"])
def test_a_base_that_is_not_here(base, adapter):
  with pytest.raises(CheckpointError) as caught:
    AutoModel.from_pretrained(adapter(base_model_name_or_path=base), progress=False)
  (problem,) = caught.value.problems
  assert problem.startswith(f"it is a LoRA adapter of {base}, which cannot be loaded (")
  assert "models_automodel.load_adapter" in problem


def test_some_layers_alone(adapter):
  with pytest.raises(ConfigError, match=r"is a LoRA adapter: layers= is for models"):
    AutoModel.from_pretrained(adapter(), layers=range(1), progress=False)


def test_an_adapter_that_does_not_fit_is_refused_before_the_weights_of_its_base_are_fetched(
  adapter, checkpoint, hub
):
  folder = adapter(base_model_name_or_path="some/llama", r=3)
  hub.add("some/llama", files(checkpoint[0], "config.json", "model.safetensors"))
  hub.add("some/adapter", files(folder, "adapter_config.json", "adapter_model.safetensors"))
  with pytest.raises(
    AdapterError, match=r"lora_A\.weight has shape \(2, 16\), but the model needs \(3, 16\)"
  ):
    AutoModel.from_pretrained("some/adapter", progress=False)
  weights = [r for r in hub.requests if r.host == "storage" and r.method == "GET" and not r.range]
  assert len(weights) <= 1  # the adapter's own


def test_an_adapter_in_a_folder_of_a_repository(adapter, checkpoint, hub):
  held = files(adapter(), "adapter_config.json", "adapter_model.safetensors")
  hub.add("some/llama", files(checkpoint[0], "config.json", "model.safetensors"))
  hub.add("some/run", {f"step-5/{name}": data for name, data in held.items()})
  model, _ = AutoModel.from_pretrained(checkpoint[0], progress=False)
  for found in (load_adapter("some/run", model, subfolder="step-5"), load_adapter("some/run/step-5", model)):
    check_merged(merge_adapter(model, found), checkpoint)


def test_adapter_and_base_on_the_hub(adapter, checkpoint, hub):
  folder = adapter(base_model_name_or_path="some/llama", revision="main")
  hub.add("some/llama", files(checkpoint[0], "config.json", "model.safetensors"))
  hub.add("some/adapter", files(folder, "adapter_config.json", "adapter_model.safetensors"))
  model, path = AutoModel.from_pretrained("some/adapter", progress=False)
  check_merged(model, checkpoint)
  assert "some--llama" in path
  plain, _ = AutoModel.from_pretrained("some/llama", progress=False)
  found = load_adapter("some/adapter", plain, progress=False)
  assert sorted(found.factors) == [f"layers.{i}.attn.q_proj.w" for i in range(2)]
