"""Gemma 1 and 2 checkpoints of Hugging Face and GGUF: the tables of their weights, and their config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from models_core.adapters import save_lora_merged
from models_core.config import ConfigKeys, write_rope
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.rollout import SGLANG_GEMMA, backend_mappings
from models_core.safetensors_loader import load_and_create_model
from models_core.weights import Tied, WeightTable, gguf_table, tunix_table
from models_gemma.attention_types import every
from models_gemma.config_json import GELU_TANH, read_common, read_types, write_common
from models_gemma.gemma.model import Gemma, ModelConfig
from models_gemma.gemma.params import ORBAX
from models_gemma.gguf_values import FACTOR
from models_gemma.orbax_rows import fit_config
from models_gemma.tunix_rows import COMMON

L, M = "layers.{i}", "model.layers.{i}"

# post_attention_layernorm is the norm before the feed-forward block in Gemma 1, and the one after attention in Gemma 2.
HUGGINGFACE = WeightTable(
  # ours                               checkpoint                                layout: checkpoint -> ours
  ("embedder.input_embedding",         "model.embed_tokens.weight",              "v d"),
  (f"{L}.input_layernorm.w",           f"{M}.input_layernorm.weight",            "d"),
  (f"{L}.attn.q_proj.w",               f"{M}.self_attn.q_proj.weight",           "(n h) d"),
  (f"{L}.attn.k_proj.w",               f"{M}.self_attn.k_proj.weight",           "(k h) d"),
  (f"{L}.attn.v_proj.w",               f"{M}.self_attn.v_proj.weight",           "(k h) d"),
  (f"{L}.attn.o_proj.w",               f"{M}.self_attn.o_proj.weight",           "d (n h)"),
  (f"{L}.post_attn_norm.w",            f"{M}.post_attention_layernorm.weight",   "d"),
  (f"{L}.post_attention_layernorm.w",  f"{M}.post_attention_layernorm.weight",   "d"),
  (f"{L}.pre_ffw_norm.w",              f"{M}.pre_feedforward_layernorm.weight",  "d"),
  (f"{L}.mlp.gate_proj.w",             f"{M}.mlp.gate_proj.weight",              "f d"),
  (f"{L}.mlp.up_proj.w",               f"{M}.mlp.up_proj.weight",                "f d"),
  (f"{L}.mlp.down_proj.w",             f"{M}.mlp.down_proj.weight",              "d f"),
  (f"{L}.post_ffw_norm.w",             f"{M}.post_feedforward_layernorm.weight", "d"),
  ("final_norm.w",                     "model.norm.weight",                      "d"),
  ("lm_head.w",                        "lm_head.weight",                         "v d"),
  tied=[Tied("lm_head.weight", "model.embed_tokens.weight")],
)  # fmt: skip

GGUF = gguf_table(HUGGINGFACE, norms=FACTOR)

TUNIX = tunix_table(
  HUGGINGFACE,
  *COMMON,
  (f"{L}.post_attn_norm.w", [(f"{L}.post_attn_norm.scale", "d")]),
  (f"{L}.post_attention_layernorm.w", [(f"{L}.pre_ffw_norm.scale", "d")]),
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
  """Reads a config.json whose `model_type` is "gemma" or "gemma2".

  Raises:
    ConfigError: if a key is missing, contradicts another one, has an unsupported value or is unknown.
  """
  keys = ConfigKeys(raw)
  if raw.get("model_type") == "gemma":
    # The first Gemma files say "gelu" and mean its tanh approximation.
    keys.expect("hidden_act", GELU_TANH, "gelu")
  else:
    keys.get("hidden_act")  # without effect: hidden_activation decides
  common = read_common(keys)
  theta, scaling = keys.rope(10_000.0)
  if scaling is not None:
    raise ConfigError(f"config.json: RoPE scaling {scaling} is not implemented for Gemma 1 and 2")
  if raw.get("model_type") == "gemma":
    own = _gemma1(common["num_layers"], common["head_dim"])
  else:
    own = _gemma2(keys, common["num_layers"])
  keys.done()
  return ModelConfig(**common, **own, rope_theta=theta)


def _gemma1(num_layers: int, head_dim: int) -> dict[str, Any]:
  """Values in Gemma 1 of the fields that Gemma 2 reads from config.json."""
  return {
    "final_logit_softcap": None,
    "attn_logits_soft_cap": None,
    "sliding_window_size": None,
    "use_post_attn_norm": False,
    "use_post_ffw_norm": False,
    "attention_types": every(1, num_layers),
    "query_pre_attn_scalar": head_dim,
  }


def _gemma2(keys: ConfigKeys, num_layers: int) -> dict[str, Any]:
  keys.get("sliding_window_size")  # the first files repeat "sliding_window" under this name
  return {
    "final_logit_softcap": keys.number_or_null("final_logit_softcapping"),
    "attn_logits_soft_cap": keys.number_or_null("attn_logit_softcapping"),
    "sliding_window_size": None if keys.get("sliding_window") is None else keys.integer("sliding_window"),
    "use_post_attn_norm": keys.boolean("use_post_attn_norm", True),
    "use_post_ffw_norm": keys.boolean("use_post_ffw_norm", True),
    "attention_types": read_types(keys, num_layers, 2),
    "query_pre_attn_scalar": keys.integer("query_pre_attn_scalar"),
  }


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Writes a configuration as config.json, in the spellings of transformers 4 and 5.

  A configuration with only some of Gemma 2's norms becomes a "gemma2" with two keys that transformers does not know.
  """
  raw = write_common(config) | {"hidden_act": GELU_TANH, **write_rope(config.rope_theta)}
  if all(
    getattr(config, field) == value for field, value in _gemma1(config.num_layers, config.head_dim).items()
  ):
    return raw | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
  raw |= {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "final_logit_softcapping": config.final_logit_softcap,
    "attn_logit_softcapping": config.attn_logits_soft_cap,
    "sliding_window": config.sliding_window_size,
    "layer_types": [kind.value for kind in config.attention_types],
    "query_pre_attn_scalar": config.query_pre_attn_scalar,
  }
  if not (config.use_post_attn_norm and config.use_post_ffw_norm):
    raw |= {"use_post_attn_norm": config.use_post_attn_norm, "use_post_ffw_norm": config.use_post_ffw_norm}
  return raw


FAMILY = Family(
  name="gemma",
  model_types=("gemma", "gemma2"),
  model_class=Gemma,
  config_class=ModelConfig,
  read_config=read_config,
  write_config=write_config,
  weights={"huggingface": HUGGINGFACE, "gguf": GGUF, "orbax": ORBAX, "tunix": TUNIX},
  fit_config=fit_config,
)

# What tunix' samplers need to take the weights.
Gemma.BACKEND_MAPPINGS = BACKEND_MAPPINGS = backend_mappings(HUGGINGFACE, sglang_jax=SGLANG_GEMMA)


def create_model_from_safe_tensors(
  file_dir: str | os.PathLike, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> Gemma:
  """Loads a directory of safetensors files with Hugging Face's names, by `load_and_create_model`."""
  return load_and_create_model(file_dir, Gemma, config, HUGGINGFACE, mesh, dtype=dtype)


def save_lora_merged_model_as_safetensors(
  local_model_path: str | os.PathLike,
  output_dir: str | os.PathLike,
  lora_model: nnx.Module,
  rank: int,
  alpha: float,
) -> None:
  """Writes a copy of a checkpoint with a LoRA model's factors merged into its weights, by `save_lora_merged`."""
  save_lora_merged(lora_model, FAMILY, local_model_path, output_dir, rank=rank, alpha=alpha)
