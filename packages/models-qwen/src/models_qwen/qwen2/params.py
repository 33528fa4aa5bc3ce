"""Qwen 2.5 checkpoints: the tables of their weights, and their config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from models_core.adapters import save_lora_merged
from models_core.config import SIZES, ConfigKeys, read_sizes, write_rope, write_sizes
from models_core.family import Family
from models_core.rollout import backend_mappings
from models_core.safetensors_loader import load_and_create_model
from models_core.weights import Ignored, Tied, WeightTable, gguf_table, maxtext_table, tunix_table
from models_qwen import windows
from models_qwen.qwen2.model import ModelConfig, Qwen2

L, M = "layers.{i}", "model.layers.{i}"

HUGGINGFACE = WeightTable(
  # ours                               checkpoint                                layout: checkpoint -> ours
  ("embedder.input_embedding",         "model.embed_tokens.weight",              "v d"),
  (f"{L}.input_layernorm.w",           f"{M}.input_layernorm.weight",            "d"),
  (f"{L}.attn.q_proj.w",               f"{M}.self_attn.q_proj.weight",           "(n h) d"),
  (f"{L}.attn.q_proj.b",               f"{M}.self_attn.q_proj.bias",             "(n h)"),
  (f"{L}.attn.k_proj.w",               f"{M}.self_attn.k_proj.weight",           "(k h) d"),
  (f"{L}.attn.k_proj.b",               f"{M}.self_attn.k_proj.bias",             "(k h)"),
  (f"{L}.attn.v_proj.w",               f"{M}.self_attn.v_proj.weight",           "(k h) d"),
  (f"{L}.attn.v_proj.b",               f"{M}.self_attn.v_proj.bias",             "(k h)"),
  (f"{L}.attn.o_proj.w",               f"{M}.self_attn.o_proj.weight",           "d (n h)"),
  (f"{L}.post_attention_layernorm.w",  f"{M}.post_attention_layernorm.weight",   "d"),
  (f"{L}.mlp.gate_proj.w",             f"{M}.mlp.gate_proj.weight",              "f d"),
  (f"{L}.mlp.up_proj.w",               f"{M}.mlp.up_proj.weight",                "f d"),
  (f"{L}.mlp.down_proj.w",             f"{M}.mlp.down_proj.weight",              "d f"),
  ("final_norm.w",                     "model.norm.weight",                      "d"),
  ("lm_head.w",                        "lm_head.weight",                         "v d"),
  ignored=[Ignored(f"{M}.self_attn.rotary_emb.inv_freq", "the RoPE frequencies follow from the configuration")],
  tied=[Tied("lm_head.weight", "model.embed_tokens.weight")],
)  # fmt: skip

GGUF = gguf_table(HUGGINGFACE)

TUNIX = tunix_table(HUGGINGFACE)

MAXTEXT = maxtext_table(HUGGINGFACE)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
  """Reads a config.json whose `model_type` is "qwen2".

  Raises:
    ConfigError: if a key is missing, contradicts another one, has an unsupported value or is unknown.
  """
  keys = ConfigKeys(raw)
  heads, hidden, layers = (
    keys.integer(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers")
  )
  keys.expect("hidden_act", "silu", "swish")
  # The projections have biases, whatever these keys say: the tensors tell.
  for bias in ("attention_bias", "qkv_bias"):
    keys.expect(bias, True, False)
  theta, scaling = keys.rope(10_000.0)
  sliding_window, max_window_layers = windows.read_window(keys, layers)
  # Only where it says null; no default is right where it says nothing.
  null = {"num_kv_heads": heads} if keys.is_null("num_key_value_heads") else {}
  config = ModelConfig(
    **read_sizes(keys, SIZES, head_dim=hidden // heads, **null),
    rope_theta=theta,
    rope_scaling=scaling,
    use_tied_embedding=keys.boolean("tie_word_embeddings", False),
    sliding_window=sliding_window,
    max_window_layers=max_window_layers,
  )
  keys.done(windows.KEYS)
  return config


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Writes a configuration as config.json, in the spellings of transformers 4 and 5."""
  return {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    **write_sizes(config),
    **write_rope(config.rope_theta, config.rope_scaling),
    "tie_word_embeddings": config.use_tied_embedding,
    **windows.write_window(config.sliding_window, config.max_window_layers, config.num_layers),
  }


FAMILY = Family(
  name="qwen2",
  model_types=("qwen2",),
  model_class=Qwen2,
  config_class=ModelConfig,
  read_config=read_config,
  write_config=write_config,
  weights={"huggingface": HUGGINGFACE, "gguf": GGUF, "tunix": TUNIX, "maxtext": MAXTEXT},
)

# What tunix' samplers need to take the weights.
Qwen2.BACKEND_MAPPINGS = BACKEND_MAPPINGS = backend_mappings(HUGGINGFACE)


def create_model_from_safe_tensors(
  file_dir: str | os.PathLike, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> Qwen2:
  """Loads a directory of safetensors files with Hugging Face's names, by `load_and_create_model`."""
  return load_and_create_model(file_dir, Qwen2, config, HUGGINGFACE, mesh, dtype=dtype)


def save_lora_merged_model_as_safetensors(
  local_model_path: str | os.PathLike,
  output_dir: str | os.PathLike,
  lora_model: nnx.Module,
  rank: int,
  alpha: float,
) -> None:
  """Writes a copy of a checkpoint with a LoRA model's factors merged into its weights, by `save_lora_merged`."""
  save_lora_merged(lora_model, FAMILY, local_model_path, output_dir, rank=rank, alpha=alpha)
