"""LoRA factors as qwix adds them, merged and saved, for every family."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import safetensors.numpy
from flax import nnx

from models_automodel import AutoModel
from models_core.adapters import (
  adapter_of,
  load_peft_adapter,
  lora_rules,
  merge_adapter,
  merge_into,
  merge_lora,
  save_peft_adapter,
  set_adapter,
)
from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import SaveError
from models_core.loading import abstract_model
from models_core.rollout import to_checkpoint
from models_core.testing import assert_close, write_checkpoint
from models_gemma.gemma import params_safetensors as gemma_params
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_gemma.gemma3 import params_safetensors as gemma3_params
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3 import params as llama3_params
from models_llama.llama3.model import ModelConfig as LlamaConfig
from models_qwen.qwen2 import params as qwen2_params
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen3 import params as qwen3_params
from models_qwen.qwen3.model import ModelConfig as Qwen3Config

TINY = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 8, "head_dim": 8, "num_kv_heads": 4}
RANK, ALPHA = 3, 5.0
FAMILIES = {
  "gemma": (gemma_params, dataclasses.replace(GemmaConfig.gemma2_2b(), **TINY, num_embed=64)),
  "gemma3": (gemma3_params, dataclasses.replace(Gemma3Config.gemma3_1b(), **TINY, num_embed=64)),
  "llama3": (llama3_params, dataclasses.replace(LlamaConfig.llama3p1_8b(), **TINY, vocab_size=64)),
  "qwen2": (qwen2_params, dataclasses.replace(Qwen2Config.qwen2p5_0p5b(), **TINY, vocab_size=64)),
  "qwen3": (qwen3_params, dataclasses.replace(Qwen3Config.qwen3_0p6b(), **TINY, vocab_size=64)),
}
FAMILIES["stacked llama3"] = (
  llama3_params,
  dataclasses.replace(FAMILIES["llama3"][1], num_layers=3, scan_layers=True),
)
# qwix uses older names of flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODULES = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 6), np.int32)
POSITIONS = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6)).copy()


@jax.jit
def logits(model):
  return model(TOKENS, POSITIONS)[0]


def with_lora(model):
  """As qwix adapts a model, whose b would be 0 and change nothing."""
  provider = qwix.LoraProvider(module_path=MODULES, rank=RANK, alpha=ALPHA)
  model = qwix.apply_lora_to_model(model, provider, TOKENS, POSITIONS, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
    value = variable.get_value()
    new = 0.1 * rng.normal(size=value.shape).astype(np.float32)
    variable.set_value(jax.device_put(jnp.asarray(new, value.dtype), value.sharding))
  return model


def nnx_value(model, name):
  (found,) = [v for path, v in nnx.to_flat_state(nnx.state(model)) if ".".join(map(str, path)) == name]
  return found.get_value()


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_give_the_logits_of_the_factors(family):
  params, config = FAMILIES[family]
  base = create_dummy_model(params.FAMILY.model_class, config, scale=0.3)
  before = np.asarray(logits(base))
  model = with_lora(base)
  assert len(adapter_of(model, alpha=ALPHA).factors) == 7 * config.num_layers
  expected = np.asarray(logits(model))
  assert np.abs(expected - before).max() > 0.1 * np.abs(before).max()
  merged = merge_lora(model, params.FAMILY, alpha=ALPHA, rank=RANK)
  assert type(merged) is params.FAMILY.model_class
  assert not nnx.to_flat_state(nnx.state(merged, nnx.LoRAParam))
  assert_close(logits(merged), expected)


def test_factors_and_weights_on_a_mesh():
  params, config = FAMILIES["llama3"]
  auto = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tp"))
  model = with_lora(create_dummy_model(params.FAMILY.model_class, config, auto, scale=0.3))
  expected = np.asarray(logits(model))
  assert_close(logits(merge_lora(model, params.FAMILY, alpha=ALPHA)), expected)
  adapter = adapter_of(model, alpha=ALPHA)
  for mesh in (auto, jax.make_mesh((4, 2), ("fsdp", "tp"))):
    abstract = abstract_model(params.FAMILY.model_class, config, mesh)
    base = create_dummy_model(params.FAMILY.model_class, config, mesh, scale=0.3)
    arrays = {name: nnx_value(base, name) for name in abstract.parameters}
    merged = merge_adapter(arrays, adapter, params.FAMILY.weights["huggingface"])
    assert all(merged[name].sharding == array.sharding for name, array in arrays.items())
    assert_close(logits(abstract.fill(merged)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_is_saved_under_the_same_names(family, tmp_path):
  params, config = FAMILIES[family]
  base, out = tmp_path / "base", tmp_path / "merged"
  base.mkdir()
  write_checkpoint(
    base, params.FAMILY, config, create_dummy_model(params.FAMILY.model_class, config, scale=0.3)
  )
  (base / "tokenizer.json").write_text("{}")
  model = with_lora(AutoModel.from_pretrained(str(base), scan_layers=config.scan_layers)[0])
  params.save_lora_merged_model_as_safetensors(
    local_model_path=str(base), output_dir=str(out), lora_model=model, rank=RANK, alpha=ALPHA
  )
  assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json"]
  assert_close(logits(AutoModel.from_pretrained(str(out))[0]), logits(model))
  with pytest.raises(SaveError):
    params.save_lora_merged_model_as_safetensors(base, out, model, RANK, ALPHA)


@pytest.mark.parametrize("scan", [False, True], ids=["list", "stacks"])
def test_a_trainer_goes_on_with_an_adapter_of_peft(tmp_path, scan):
  """Rules make qwix's factors, those of the adapter are set, and what was trained is written back."""
  params, config = FAMILIES["llama3"]
  config = dataclasses.replace(config, scan_layers=scan)
  rng, names = np.random.default_rng(2), [f"model.layers.{i}" for i in range(2)]
  sizes = {f"{n}.self_attn.q_proj": (2, 64, 32) for n in names} | {
    f"{n}.mlp.down_proj": (4, 32, 48) for n in names
  }
  tensors = {"model.norm.weight": rng.normal(size=32)}
  for module, (rank, out, into) in sizes.items():
    tensors[f"{module}.lora_A.weight"] = 0.3 * rng.normal(size=(rank, into))
    tensors[f"{module}.lora_B.weight"] = 0.3 * rng.normal(size=(out, rank))
  tensors = {f"base_model.model.{name}": data.astype(np.float32) for name, data in tensors.items()}
  safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
  keys = {"r": 2, "lora_alpha": 8, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"q_proj": 3}}
  keys |= {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["model.norm"]}
  (tmp_path / "adapter_config.json").write_text(json.dumps(keys))
  adapter = load_peft_adapter(tmp_path, params.FAMILY, config)
  plain = create_dummy_model(params.FAMILY.model_class, config, scale=0.3)
  expected = np.asarray(logits(merge_into(plain, adapter, params.FAMILY)))

  base = merge_into(plain, adapter.without_factors(), params.FAMILY)
  provider = qwix.LoraProvider([qwix.LoraRule(**rule) for rule in lora_rules(adapter, base)])
  model = qwix.apply_lora_to_model(base, provider, TOKENS, POSITIONS, rngs=nnx.Rngs(0))
  set_adapter(model, adapter.factors_alone())
  assert_close(logits(model), expected)
  trained = dataclasses.replace(adapter_of(model, alpha=adapter.alphas), whole=adapter.whole)
  save_peft_adapter(trained, tmp_path / "again", params.FAMILY, config)
  again = load_peft_adapter(tmp_path / "again", params.FAMILY, config)
  assert_close(logits(merge_into(plain, again, params.FAMILY)), expected)


def test_quantised_stacks_are_the_quantised_layers():
  params, config = FAMILIES["stacked llama3"]
  provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=MODULES, weight_qtype="int8")])
  found = []
  for scan in (False, True):
    model = create_dummy_model(
      params.FAMILY.model_class, dataclasses.replace(config, scan_layers=scan), scale=0.3
    )
    quantised = qwix.quantize_model(model, provider, TOKENS, POSITIONS)
    found.append((logits(quantised), to_checkpoint(quantised, params.FAMILY)))
  (expected, tensors), (ours, again) = found
  assert_close(ours, expected, 2e-6)
  assert list(again) == list(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(again[name], tensor)
