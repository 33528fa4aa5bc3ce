"""Llama checkpoints: the tables of their weights, and their config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from models_core.adapters import save_lora_merged
from models_core.config import ConfigKeys, read_sizes, write_rope, write_sizes
from models_core.family import Family
from models_core.rollout import VLLM_FLAX, backend_mappings
from models_core.safetensors_loader import load_and_create_model
from models_core.weights import (
  Ignored,
  Tied,
  WeightTable,
  divided_by_root_of_head_dim,
  gguf_table,
  maxtext_table,
  tunix_table,
)
from models_llama.llama3.model import Llama3, ModelConfig

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
  (f"{L}.attn.o_proj.b",               f"{M}.self_attn.o_proj.bias",             "d"),
  (f"{L}.post_attention_layernorm.w",  f"{M}.post_attention_layernorm.weight",   "d"),
  (f"{L}.mlp.gate_proj.w",             f"{M}.mlp.gate_proj.weight",              "f d"),
  (f"{L}.mlp.gate_proj.b",             f"{M}.mlp.gate_proj.bias",                "f"),
  (f"{L}.mlp.up_proj.w",               f"{M}.mlp.up_proj.weight",                "f d"),
  (f"{L}.mlp.up_proj.b",               f"{M}.mlp.up_proj.bias",                  "f"),
  (f"{L}.mlp.down_proj.w",             f"{M}.mlp.down_proj.weight",              "d f"),
  (f"{L}.mlp.down_proj.b",             f"{M}.mlp.down_proj.bias",                "d"),
  ("final_norm.w",                     "model.norm.weight",                      "d"),
  ("lm_head.w",                        "lm_head.weight",                         "v d"),
  ignored=[Ignored(f"{M}.self_attn.rotary_emb.inv_freq", "the RoPE frequencies follow from the configuration")],
  tied=[Tied("lm_head.weight", "model.embed_tokens.weight")],
)  # fmt: skip

# For RoPE, GGUF files pair neighbouring rows of q and k; the model pairs the two halves of a head.
GGUF = gguf_table(
  HUGGINGFACE,
  (f"{L}.attn.q_proj.w", "blk.{i}.attn_q.weight", "(n p 2) d -> (n 2 p) d"),
  (f"{L}.attn.k_proj.w", "blk.{i}.attn_k.weight", "(k p 2) d -> (k 2 p) d"),
  (f"{L}.attn.q_proj.b", "blk.{i}.attn_q.bias", "(n p 2) -> (n 2 p)"),
  (f"{L}.attn.k_proj.b", "blk.{i}.attn_k.bias", "(k p 2) -> (k 2 p)"),
  ignored=[Ignored("rope_freqs.weight", "the configuration holds these RoPE factors")],
)

TUNIX = tunix_table(HUGGINGFACE)

# Under the names llama3.1, MaxText pairs neighbouring numbers of a head for RoPE, as GGUF files do. It always scales
# queries beforehand.
_MAXTEXT_LAYOUTS = {
  f"{L}.attn.{part}_proj.{kind}": [
    (f"{into}{heads} h -> ({heads} h){rest}", lambda config: config.rope_scaling is None),
    (f"{into}{heads} (p 2) -> ({heads} 2 p){rest}", lambda config: config.rope_scaling is not None),
  ]
  for part, heads in (("q", "n"), ("k", "k"))
  for kind, into, rest in (("w", "d ", " d"), ("b", "", ""))
}
MAXTEXT = maxtext_table(
  HUGGINGFACE,
  layouts=_MAXTEXT_LAYOUTS,
  conversions={f"{L}.attn.q_proj.{kind}": divided_by_root_of_head_dim for kind in "wb"},
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
  """Reads a config.json whose `model_type` is "llama".

  Raises:
    ConfigError: if a key is missing, contradicts another one, has an unsupported value or is unknown.
  """
  keys = ConfigKeys(raw)
  heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
  keys.expect("hidden_act", "silu", "swish")
  theta, scaling = keys.rope(10_000.0)
  config = ModelConfig(
    **read_sizes(keys, head_dim=hidden // heads, num_kv_heads=heads),
    rope_theta=theta,
    rope_scaling=scaling,
    weight_tying=keys.boolean("tie_word_embeddings", False),
    attention_bias=keys.boolean("attention_bias", False),
    mlp_bias=keys.boolean("mlp_bias", False),
  )
  keys.done()
  return config


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Writes a configuration as config.json, in the spellings of transformers 4 and 5."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
    **write_sizes(config),
    **write_rope(config.rope_theta, config.rope_scaling),
    "tie_word_embeddings": config.weight_tying,
  }


FAMILY = Family(
  name="llama3",
  model_types=("llama",),
  model_class=Llama3,
  config_class=ModelConfig,
  read_config=read_config,
  write_config=write_config,
  weights={"huggingface": HUGGINGFACE, "gguf": GGUF, "tunix": TUNIX, "maxtext": MAXTEXT},
)

# What tunix' samplers need to take the weights.
Llama3.BACKEND_MAPPINGS = BACKEND_MAPPINGS = backend_mappings(HUGGINGFACE, vllm_jax=VLLM_FLAX)


def create_model_from_safe_tensors(
  file_dir: str | os.PathLike, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> Llama3:
  """Loads a directory of safetensors files with Hugging Face's names, by `load_and_create_model`."""
  return load_and_create_model(file_dir, Llama3, config, HUGGINGFACE, mesh, dtype=dtype)


def save_lora_merged_model_as_safetensors(
  local_model_path: str | os.PathLike,
  output_dir: str | os.PathLike,
  lora_model: nnx.Module,
  rank: int,
  alpha: float,
) -> None:
  """Writes a copy of a checkpoint with a LoRA model's factors merged into its weights, by `save_lora_merged`."""
  save_lora_merged(lora_model, FAMILY, local_model_path, output_dir, rank=rank, alpha=alpha)
