"""config.json in the spellings of five versions of transformers and of trainers: read, with the reference's logits.

A file is that of a version of transformers (`tests/transformers_configs` of the packages), with changes; `...` removes a
key. The first part of a name says who writes the keys so.
"""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from models_automodel import AutoModel
from models_automodel.families import family_of_model_type
from models_core.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1] / "packages"
PACKAGES = {"llama": "llama", "qwen2": "qwen", "qwen3": "qwen", "qwen3_moe": "qwen"}
MODEL_TYPES = (*PACKAGES, "gemma", "gemma2", "gemma3_text", "gemma3")
WRITTEN: dict[str, dict[str, dict[str, Any]]] = {
  name: json.loads(
    (ROOT / f"models-{PACKAGES.get(name, 'gemma')}/tests/transformers_configs/{name}.json").read_text()
  )
  for name in MODEL_TYPES
}

LINEAR = {"factor": 2.0, "type": "linear"}
LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1, "problem_type": None}
LLAVA = {
  "freeze_mm_mlp_adapter": False,
  "image_aspect_ratio": "pad",
  "mm_hidden_size": 1024,
  "mm_patch_merge_type": "flat",
  "mm_projector_type": "mlp2x_gelu",
  "mm_use_im_start_end": False,
  "mm_vision_select_layer": -2,
  "mm_vision_tower": "openai/clip-vit-large-patch14-336",
  "tokenizer_model_max_length": 2048,
  "tokenizer_padding_side": "right",
  "tune_mm_mlp_adapter": False,
  "use_mm_proj": True,
}
UNSLOTH = {
  "unsloth_fixed": True,
  "unsloth_version": "2025.3.19",
  "pad_token_id": 3,
  "torch_dtype": "bfloat16",
}
VERL = {"_attn_implementation_autoset": True, "attn_implementation": "flash_attention_2", "use_cache": False}
SWIFT = {"keys_to_ignore_at_inference": ["past_key_values"], "task_type": "causal_lm", "max_model_len": 4096}
PADDLE = {
  "alibi": False,
  "fuse_attention_ffn": False,
  "fuse_attention_qkv": False,
  "lm_shift_labels": True,
  "long_sequence_strategy_name": None,
  "recompute": False,
  "rope_scaling_factor": 1.0,
  "rope_scaling_type": None,
  "seq_length": 2048,
  "tensor_parallel_degree": 1,
  "use_flash_attention": True,
}
DEEPSPEED = {"dropout": 0.0, "end_token_id": 2, "hidden_dropout_prob": 0.0}
BITSANDBYTES = {"_load_in_4bit": False, "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
OPENRLHF = {"mean": 0.25, "normalize_reward": True, "std": 1.5, "value_head_prefix": "score"}

# name -> (model_type, version, changes).
TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
  "meta, converted early": ("llama", "4.36.2", {"rope_theta": ..., "rope_scaling": ..., "max_sequence_length": 2048}),
  "meta, converted before groups": ("llama", "4.36.2", {"num_key_value_heads": ..., "rope_theta": ..., "attention_bias": ...}),
  "meta, 3.1": ("llama", "4.46.3", {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}),
  "meta, 3.1 on its first day": ("llama", "4.46.3", {"rope_scaling": LLAMA3 | {"type": "llama3"}, "mlp_bias": ...}),
  "FastChat": ("llama", "4.36.2", {"_flash_attn_2_enabled": True, "max_sequence_length": 2048, "rope_scaling": LINEAR}),
  "FastChat, null": ("llama", "4.46.3", {"num_key_value_heads": None, "head_dim": None}),
  "LLaVA": ("llama", "4.36.2", LLAVA),
  "LongLoRA": ("llama", "4.36.2", {"group_size_ratio": 0.25, "rope_scaling": LINEAR | {"finetuned": True}}),
  "Yarn-Llama": ("llama", "4.46.3", {"rope_scaling": YARN | {"type": "yarn", "finetuned": True}}),
  "axolotl": ("llama", "4.46.3", {"use_cache": False, "_name_or_path": "./out", "gradient_checkpointing": True}),
  "axolotl, linear": ("llama", "4.51.3", {"rope_scaling": LINEAR | {"original_max_position_embeddings": 64}}),
  "LLaMA-Factory": ("llama", "4.51.3", {"rope_scaling": LINEAR | {"rope_type": "linear"}, "use_cache": False}),
  "unsloth": ("llama", "4.51.3", UNSLOTH),
  "unsloth, newest": ("llama", "5.24.0", UNSLOTH),
  "TRL, reward": ("llama", "4.51.3", LABELS | {"classifier_dropout": 0.1, "summary_dropout_prob": 0.1}),
  "verl": ("llama", "4.51.3", VERL),
  "mergekit": ("llama", "4.46.3", {"quantization_config": {}, "_model_name_or_path": "a/b"}),
  "ms-swift": ("llama", "4.57.1", SWIFT),
  "OpenRLHF": ("llama", "4.57.1", OPENRLHF),
  "DeepSpeed-Chat": ("llama", "4.36.2", DEEPSPEED),
  "PaddleNLP": ("llama", "4.46.3", PADDLE),
  "bitsandbytes": ("llama", "4.46.3", BITSANDBYTES),
  "nanotron": ("llama", "4.46.3", {"is_llama_config": True, "rope_interleaved": False}),
  "InternLM, as Llama": ("llama", "4.36.2", {"bias": False, "rotary": {"base": 10000, "type": "dynamic"}}),
  "a tokenizer's keys": ("llama", "4.46.3", {"unk_token_id": 0, "cls_token_id": 1, "padding_side": "left"}),
  "by hand": ("llama", "5.24.0", {"rope_parameters": ..., "rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 999.0}),
  "Qwen, 2.5": ("qwen2", "4.46.3", {"max_window_layers": 28, "sliding_window": 131072, "use_mrope": False}),
  "Qwen, 1M": ("qwen2", "4.46.3", {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}}),
  "Qwen, window off by null": ("qwen2", "4.51.3", {"use_sliding_window": True, "sliding_window": None}),
  "Qwen, window": ("qwen2", "4.51.3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
  "Qwen, from a vision model": ("qwen2", "4.57.1", {
    "image_token_id": 99, "vision_token_id": 98, "vision_start_token_id": 97,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]},
  }),
  "LLaMA-Factory, Qwen": ("qwen2", "4.46.3", {"rope_scaling": YARN | {"type": "yarn", "attn_factor": 0.9}}),
  "verl, Qwen": ("qwen2", "4.51.3", VERL | {"num_key_value_heads": None}),
  "TRL, Qwen": ("qwen2", "4.57.1", LABELS | {"qkv_bias": True, "attention_bias": True}),
  "unsloth, Qwen": ("qwen2", "5.24.0", UNSLOTH),
  "Qwen3, yarn": ("qwen3", "4.51.3", {"rope_scaling": YARN | {"rope_type": "yarn"}, "use_qk_norm": True}),
  "verl, Qwen3": ("qwen3", "4.57.1", VERL | {"max_window_layers": 70, "sliding_window": 4096}),
  "ms-swift, Qwen3": ("qwen3", "5.24.0", SWIFT),
  "LLaMA-Factory, Qwen3 with experts": ("qwen3_moe", "4.51.3", {"moe_aux_loss_coef": 0.1, "output_router_logits": True}),
  "verl, Qwen3 with experts": ("qwen3_moe", "4.57.1", VERL | {"mlp_only_layers": None, "shared_expert_intermediate_size": 0}),
  "Qwen3 with experts, twice": ("qwen3_moe", "5.24.0", {"num_local_experts": 8, "num_experts": 8, "norm_topk_prob": False}),
  "Google, Gemma": ("gemma", "4.46.3", {"hidden_act": "gelu", "hidden_activation": ..., "rope_theta": ...}),
  "Google, Gemma 1.1": ("gemma", "4.46.3", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}),
  "unsloth, Gemma": ("gemma", "4.51.3", UNSLOTH | {"hidden_activation": None}),
  "Google, Gemma 2": ("gemma2", "4.46.3", {"sliding_window_size": 5, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
  "axolotl, Gemma 2": ("gemma2", "4.51.3", {"use_cache": False, "gradient_checkpointing": True, "final_logit_softcapping": None}),
  "TRL, Gemma 2": ("gemma2", "4.57.1", LABELS | {"attn_logit_softcapping": None}),
  "Google, Gemma 3": ("gemma3_text", "4.51.3", {"cache_implementation": "hybrid", "num_hidden_layers": 3, "sliding_window_pattern": 2}),
  "Google, Gemma 3, linear": ("gemma3_text", "4.57.1", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "layer_types": ["sliding_attention", "full_attention"]}),
  "unsloth, Gemma 3": ("gemma3_text", "4.57.1", UNSLOTH | {"rope_local_base_freq": ..., "rope_theta": ...}),
  "verl, Gemma 3": ("gemma3_text", "5.24.0", VERL | {"layer_types": ["full_attention", "sliding_attention"]}),
  "unsloth, Gemma 3 with a tower": ("gemma3", "4.51.3", UNSLOTH | {"_attn_implementation_autoset": True}),
  "DeepSpeed, Gemma 3 with a tower": ("gemma3", "4.57.1", {"hidden_size": 48, "vocab_size": 101, "num_hidden_layers": 2}),
}  # fmt: skip


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
  """A copy with other values; `...` removes a key."""
  return {key: value for key, value in (raw | changes).items() if value is not ...}


# Files that load: name -> config.json.
LOADED: dict[str, dict[str, Any]] = {
  f"transformers {version}, {model_type}": raw
  for model_type, versions in WRITTEN.items()
  for version, raw in versions.items()
  if "to_dict" not in version
} | {
  name: changed(WRITTEN[model_type][version], changes)
  for name, (model_type, version, changes) in TRAINED.items()
}

# Keys over which transformers stumbles.
UNREADABLE = ("quantization_config",)


def test_there_are_enough():
  assert len(LOADED) >= 60
  assert {raw["model_type"] for raw in LOADED.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize("name", LOADED)
def test_a_file_is_read_as_transformers_reads_it(name, checkpoint_of, tokens, assert_parity):
  checkpoint = checkpoint_of(LOADED[name], UNREADABLE)
  model, _ = AutoModel.from_pretrained(checkpoint.path, progress=False, dtype="float32")
  tokens = tokens[:2, :24]
  positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
  assert_parity(model(tokens, positions)[0], checkpoint.logits(tokens), what=name)


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 321.5}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 321.5}
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 3}
# What code of transformers reads on the way to these models' logits, and nothing here implements: (model_type, changes).
COMPUTED_OTHERWISE = {
  "a causal mask is left out": ("llama", {"is_causal": False}),
  "Llama, activation": ("llama", {"hidden_act": "gelu"}),
  "Llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
  "Llama, proportional": ("llama", {"rope_parameters": PROPORTIONAL}),
  "Llama, a part of each head": ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": LINEAR}),
  "Qwen2, activation": ("qwen2", {"hidden_act": "relu"}),
  "Qwen2, first layers slide": ("qwen2", WINDOW | {"layer_types": [SLIDING, FULL]}),
  "Qwen3, first layers slide": ("qwen3", WINDOW | {"layer_types": [SLIDING, FULL]}),
  "Qwen3, biases": ("qwen3", {"attention_bias": True}),
  "Qwen3 with experts, biases": ("qwen3_moe", {"attention_bias": True}),
  "Gemma, both directions": ("gemma", {"use_bidirectional_attention": True}),
  "Gemma, activation": ("gemma", {"hidden_act": "silu"}),
  "Gemma, scaling": ("gemma", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 321.5}}),
  "Gemma 2, activation": ("gemma2", {"hidden_activation": "silu"}),
  "Gemma 3, both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
  "Gemma 3, activation": ("gemma3_text", {"hidden_activation": "silu"}),
  "Gemma 3, scaling of sliding layers": ("gemma3_text", {
    "rope_parameters": {
      FULL: {"rope_type": "default", "rope_theta": 321.5},
      SLIDING: {"rope_type": "linear", "factor": 4.0, "rope_theta": 33.0},
    }
  }),
}  # fmt: skip


def _reference(raw: dict, path: pathlib.Path) -> torch.nn.Module:
  (path / "config.json").write_text(json.dumps(raw))
  config = transformers.AutoConfig.from_pretrained(path, dtype=torch.float32)
  return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", COMPUTED_OTHERWISE)
def test_what_is_refused_changes_the_reference_s_logits(name, tokens, tmp_path):
  model_type, changes = COMPUTED_OTHERWISE[name]
  base = WRITTEN[model_type]["5.24.0"]
  with pytest.raises(ConfigError):
    family_of_model_type(model_type, name).read_config(changed(base, changes))
  model = _reference(base, tmp_path)
  torch.manual_seed(0)
  for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.3)
  other = _reference(changed(base, changes), tmp_path)
  with torch.no_grad():
    for weight in other.parameters():  # those that the model does not have
      weight.fill_(0.3)
  other.load_state_dict(model.state_dict(), strict=False)
  ids = torch.tensor(tokens[:, :24], dtype=torch.long)
  with torch.no_grad():
    expected = model(ids).logits
    try:
      found = other(ids).logits
    except RuntimeError:
      return  # it cannot compute them at all
  assert (found - expected).abs().max() > 1e-4 * expected.abs().max()
