"""config.json files with which transformers, or another architecture, computes other numbers: refused by name."""

import pytest

from models_automodel.families import family_of_model_type
from models_core.errors import ConfigError

SIZES = {
  "vocab_size": 64,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 4,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
WINDOW = {"query_pre_attn_scalar": 4, "sliding_window": 8}
GEMMA3 = SIZES | WINDOW | {"rope_local_base_freq": 1e4}
BASES = {
  "llama": SIZES,
  "qwen2": SIZES,
  "qwen3": SIZES,
  "qwen3_moe": SIZES | EXPERTS,
  "gemma": SIZES,
  "gemma2": SIZES | CAPS | WINDOW,
  "gemma3_text": GEMMA3,
  "gemma3": {"text_config": GEMMA3},
}
LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
SLIDING, FULL = "sliding_attention", "full_attention"

# (model_type, changes, what the message names).
REFUSED = [
  # Scalings of RoPE that would be dropped.
  ("llama", {"rope_scaling": {"factor": 8.0}}, "rope_scaling has factor=8.0, but rope_type is missing"),
  ("llama", {"rope_scaling": LLAMA3}, "low_freq_factor=1.0, but rope_type is missing"),
  ("llama", {"rope_scaling": LLAMA3 | {"rope_type": "default"}}, "its rope_type is 'default'"),
  ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, "rope_parameters has factor=8.0"),
  ("qwen2", {"rope_scaling": {"attention_factor": 1.2}}, "attention_factor=1.2"),
  ("qwen3", {"rope_scaling": {FULL: LLAMA3 | {"rope_type": "llama3"}}}, "full_attention"),
  ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters has factor"),
  ("gemma3_text", {"rope_scaling": {FULL: {"factor": 8.0}}}, "full_attention.*rope_type is missing"),
  ("gemma3_text", {"rope_scaling": {SLIDING: {"type": "linear", "factor": 8.0}}}, "of sliding layers"),
  # Scalings that are not implemented.
  ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not implemented"),
  ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "'longrope'"),
  ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}}, "'mrope'"),
  ("gemma", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "not implemented for Gemma 1 and 2"),
  ("gemma2", {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 9}}, "Gemma 1 and 2"),
  ("llama", {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "original_max_position_embeddings": 9}, "beside it"),
  ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
  ("qwen3", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
  # What transformers reads for these models.
  ("llama", {"is_causal": False}, "is_causal=False"),
  ("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
  ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
  ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "hidden_act is 'silu'"),
  ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
  ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
  ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
  ("qwen3", {"attention_bias": True}, "attention_bias is True"),
  ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": [SLIDING, FULL]}, "layer_types has 1"),
  ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "layer_types": [FULL, SLIDING]}, "layer_types differs"),
  ("gemma2", {"sliding_window": None}, "sliding_window_size is None"),
  # What other architectures read.
  ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
  ("llama", {"residual_multiplier": 0.22}, r"residual_multiplier=0\.22 \(a key of granite\)"),
  ("llama", {"attention_multiplier": 1.0}, "attention_multiplier=1.0"),
  ("llama", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}, "embedding_multiplier=12.0.*logits_scaling=8.0"),
  ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
  ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
  ("llama", {"num_local_experts": 8, "num_experts_per_tok": 2}, "num_experts_per_tok=2.*num_local_experts=8"),
  ("qwen2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
  ("qwen3", {"num_experts": 128}, "num_experts=128"),
  ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts=1"),
  ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
  ("gemma2", {"rope_local_base_freq": 1e4}, "rope_local_base_freq=10000.0"),
  ("gemma3_text", {"num_kv_shared_layers": 1}, "num_kv_shared_layers=1"),
  ("gemma3", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("model_type", "changes", "words"), REFUSED, ids=[f"{m}, {w}" for m, _, w in REFUSED]
)
def test_a_file_is_refused_by_name(model_type, changes, words):
  family, raw = family_of_model_type(model_type, model_type), {"model_type": model_type, **BASES[model_type]}
  family.read_config(raw)
  with pytest.raises(ConfigError, match=words) as caught:
    family.read_config(raw | changes)
  assert "\n" not in str(caught.value)


def test_there_are_enough():
  assert len(REFUSED) >= 30
  assert {model_type for model_type, _, _ in REFUSED} == BASES.keys()
