"""GGUF files of each architecture, written by the reference writer from the tables themselves."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from models_core.config import gguf_config
from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import CheckpointError
from models_core.formats import LocalFiles, read_gguf
from models_core.loading import abstract_model, load, plan_load
from models_core.rope_scaling import YarnScaling
from models_core.testing import to_tensors
from models_qwen import qwen2, qwen3
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen3.model import ModelConfig as Qwen3Config

FIELDS = (2, 67, 48, 64, 6, 16, 3, 700.0, 1e-3)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_hidden_dim": 32, "norm_topk_prob": True}
MODELS = {
  "qwen2": (qwen2.FAMILY, Qwen2Config(*FIELDS)),
  "qwen2, tied": (qwen2.FAMILY, Qwen2Config(*FIELDS, use_tied_embedding=True)),
  "qwen3, tied": (qwen3.FAMILY, Qwen3Config(*FIELDS, use_tied_embedding=True)),
  "qwen3, yarn": (qwen3.FAMILY, Qwen3Config(*FIELDS, YarnScaling(4.0, 32))),
  "qwen3moe": (qwen3.FAMILY, Qwen3Config(*FIELDS, **EXPERTS)),
}


def write(path, name, config, tensors):
  architecture = name.partition(",")[0]
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_context_length(128)
  writer.add_embedding_length(config.embed_dim)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.hidden_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_theta)
  if architecture == "qwen3moe":
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_hidden_dim)
  if config.rope_scaling:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(config.rope_scaling.original_max_position)
  for tensor, value in tensors.items():
    writer.add_tensor(tensor, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_read_bit_by_bit(name, tmp_path):
  family, config = MODELS[name]
  model = create_dummy_model(family.model_class, config)
  write(tmp_path / "model.gguf", name, config, to_tensors(model, family.weights["gguf"]))
  checkpoint = read_gguf(LocalFiles(str(tmp_path)))
  assert family.read_config(gguf_config(checkpoint)) == config
  loaded = load(plan_load(checkpoint, abstract_model(family.model_class, config), family.weights["gguf"]))
  for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_experts_may_be_fused(tmp_path):
  """As `convert_hf_to_gguf.py --fuse-gate-up-exps` writes them: the gate first."""
  family, config = MODELS["qwen3moe"]
  model = create_dummy_model(family.model_class, config)
  tensors = to_tensors(model, family.weights["gguf"])
  for layer in range(config.num_layers):
    parts = [tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
    tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
  write(tmp_path / "model.gguf", "qwen3moe", config, tensors)
  checkpoint = read_gguf(LocalFiles(str(tmp_path)))
  loaded = load(plan_load(checkpoint, abstract_model(family.model_class, config), family.weights["gguf"]))
  for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_whose_file_holds_a_head(same, tmp_path):
  family, config = MODELS["qwen3, tied"]
  tensors = to_tensors(create_dummy_model(family.model_class, config), family.weights["gguf"])
  tensors["output.weight"] = tensors["token_embd.weight"] + (0 if same else 1)
  write(tmp_path / "model.gguf", "qwen3", config, tensors)
  checkpoint = read_gguf(LocalFiles(str(tmp_path)))
  untied = family.read_config(gguf_config(checkpoint))
  assert untied == dataclasses.replace(config, use_tied_embedding=False)
  plan = plan_load(checkpoint, abstract_model(family.model_class, config), family.weights["gguf"])
  if same:
    load(plan)
  else:
    with pytest.raises(CheckpointError, match=r"output\.weight"):
      load(plan)
