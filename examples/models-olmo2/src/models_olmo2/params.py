"""OLMo 2 checkpoints: the table of their weights, their config.json, and the family of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models_core.config import ConfigKeys, read_sizes, write_rope, write_sizes
from models_core.family import Family
from models_core.weights import Tied, WeightTable
from models_olmo2.model import ModelConfig, Olmo2

L, M = "layers.{i}", "model.layers.{i}"

HUGGINGFACE = WeightTable(
  # ours                         checkpoint                                  layout: checkpoint -> ours
  ("embedder.input_embedding",   "model.embed_tokens.weight",                "v d"),
  (f"{L}.attn.q_proj.w",         f"{M}.self_attn.q_proj.weight",             "(n h) d"),
  (f"{L}.attn.k_proj.w",         f"{M}.self_attn.k_proj.weight",             "(k h) d"),
  (f"{L}.attn.v_proj.w",         f"{M}.self_attn.v_proj.weight",             "(k h) d"),
  (f"{L}.attn.o_proj.w",         f"{M}.self_attn.o_proj.weight",             "d (n h)"),
  (f"{L}.attn.q_norm.w",         f"{M}.self_attn.q_norm.weight",             "(n h)"),
  (f"{L}.attn.k_norm.w",         f"{M}.self_attn.k_norm.weight",             "(k h)"),
  (f"{L}.post_attn_norm.w",      f"{M}.post_attention_layernorm.weight",     "d"),
  (f"{L}.mlp.gate_proj.w",       f"{M}.mlp.gate_proj.weight",                "f d"),
  (f"{L}.mlp.up_proj.w",         f"{M}.mlp.up_proj.weight",                  "f d"),
  (f"{L}.mlp.down_proj.w",       f"{M}.mlp.down_proj.weight",                "d f"),
  (f"{L}.post_ffw_norm.w",       f"{M}.post_feedforward_layernorm.weight",   "d"),
  ("final_norm.w",               "model.norm.weight",                        "d"),
  ("lm_head.w",                  "lm_head.weight",                           "v d"),
  tied=[Tied("lm_head.weight", "model.embed_tokens.weight")],
)  # fmt: skip


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
  """Reads a config.json whose `model_type` is "olmo2".

  Raises:
    ConfigError: if a key is missing, contradicts another one, has an unsupported value or is unknown.
  """
  keys = ConfigKeys(raw)
  heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
  keys.expect("hidden_act", "silu", "swish")
  keys.expect("attention_bias", False)
  theta, scaling = keys.rope(10_000.0)
  config = ModelConfig(
    **read_sizes(keys, head_dim=hidden // heads, num_kv_heads=heads),
    rope_theta=theta,
    rope_scaling=scaling,
    weight_tying=keys.boolean("tie_word_embeddings", False),
  )
  keys.done()
  return config


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Writes a configuration as config.json, in the spellings of transformers 4 and 5."""
  return {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "hidden_act": "silu",
    "attention_bias": False,
    **write_sizes(config),
    **write_rope(config.rope_theta, config.rope_scaling),
    "tie_word_embeddings": config.weight_tying,
  }


FAMILY = Family(
  name="olmo2",
  model_types=("olmo2",),
  model_class=Olmo2,
  config_class=ModelConfig,
  read_config=read_config,
  write_config=write_config,
  weights={"huggingface": HUGGINGFACE},
)
