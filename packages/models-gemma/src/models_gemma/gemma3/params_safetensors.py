"""Gemma 3 checkpoints of Hugging Face and GGUF: the tables of their weights, and their config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from models_core.adapters import save_lora_merged
from models_core.config import ConfigKeys, write_scaling
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.rollout import SGLANG_GEMMA, backend_mappings
from models_core.rope_scaling import RopeScaling
from models_core.safetensors_loader import load_and_create_model
from models_core.weights import Form, Tied, WeightTable, gguf_table, tunix_table
from models_gemma import vision_tower
from models_gemma.attention_types import AttentionType, every
from models_gemma.config_json import read_common, read_types, write_common
from models_gemma.gemma3.model import Gemma3, ModelConfig
from models_gemma.gemma3.params import ORBAX
from models_gemma.gguf_values import FACTOR
from models_gemma.orbax_rows import fit_config
from models_gemma.tunix_rows import COMMON

L, M = "layers.{i}", "layers.{i}"

# Prefixes of tensors: of a language model alone, and beside a vision tower in older and newer files.
PREFIXES = ("model.", "language_model.model.", "model.language_model.")
# The name of the head in the same files.
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "lm_head.weight")

HUGGINGFACE = WeightTable(
  *((ours, [Form(prefix + name, layout) for prefix in PREFIXES]) for ours, name, layout in (
    # ours                          checkpoint                                layout: checkpoint -> ours
    ("embedder.input_embedding",    "embed_tokens.weight",                    "v d"),
    (f"{L}.input_layernorm.w",      f"{M}.input_layernorm.weight",            "d"),
    (f"{L}.attn.q_proj.w",          f"{M}.self_attn.q_proj.weight",           "(n h) d"),
    (f"{L}.attn.k_proj.w",          f"{M}.self_attn.k_proj.weight",           "(k h) d"),
    (f"{L}.attn.v_proj.w",          f"{M}.self_attn.v_proj.weight",           "(k h) d"),
    (f"{L}.attn.o_proj.w",          f"{M}.self_attn.o_proj.weight",           "d (n h)"),
    (f"{L}.attn.q_norm.w",          f"{M}.self_attn.q_norm.weight",           "h"),
    (f"{L}.attn.k_norm.w",          f"{M}.self_attn.k_norm.weight",           "h"),
    (f"{L}.post_attn_norm.w",       f"{M}.post_attention_layernorm.weight",   "d"),
    (f"{L}.pre_ffw_norm.w",         f"{M}.pre_feedforward_layernorm.weight",  "d"),
    (f"{L}.mlp.gate_proj.w",        f"{M}.mlp.gate_proj.weight",              "f d"),
    (f"{L}.mlp.up_proj.w",          f"{M}.mlp.up_proj.weight",                "f d"),
    (f"{L}.mlp.down_proj.w",        f"{M}.mlp.down_proj.weight",              "d f"),
    (f"{L}.post_ffw_norm.w",        f"{M}.post_feedforward_layernorm.weight", "d"),
    ("final_norm.w",                "norm.weight",                            "d"),
  )),
  ("lm_head.w", [Form(name, "v d") for name in HEADS]),
  ignored=vision_tower.HUGGINGFACE,
  tied=[Tied(head, f"{prefix}embed_tokens.weight") for head, prefix in zip(HEADS, PREFIXES, strict=True)],
)  # fmt: skip

GGUF = gguf_table(HUGGINGFACE, norms=FACTOR)

TUNIX = tunix_table(
  HUGGINGFACE,
  *COMMON,
  (f"{L}.attn.q_norm.w", [(f"{L}.attn._query_norm.scale", "h")]),
  (f"{L}.attn.k_norm.w", [(f"{L}.attn._key_norm.scale", "h")]),
  (f"{L}.post_attn_norm.w", [(f"{L}.post_attention_norm.scale", "d")]),
  ignored=vision_tower.ORBAX,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
  """Reads a config.json whose `model_type` is "gemma3_text", or "gemma3" with a `text_config`.

  Raises:
    ConfigError: if a key is missing, contradicts another one, has an unsupported value or is unknown.
  """
  keys = vision_tower.text_keys(raw)
  common = read_common(keys)
  keys.expect("attn_logit_softcapping", None)
  keys.get("hidden_act")  # without effect: hidden_activation decides
  theta, scaling = _rope(keys, AttentionType.GLOBAL, "rope_theta", 1_000_000.0)
  local_theta, local_scaling = _rope(keys, AttentionType.LOCAL_SLIDING, "rope_local_base_freq", 10_000.0)
  if local_scaling is not None:
    raise ConfigError(f"config.json: RoPE scaling {local_scaling} of sliding layers is not implemented")
  keys.get("_sliding_window_pattern")  # written by transformers, and never read
  config = ModelConfig(
    **common,
    attention_types=read_types(keys, common["num_layers"], 6, "sliding_window_pattern"),
    rope_theta=theta,
    local_rope_theta=local_theta,
    query_pre_attn_scalar=keys.integer("query_pre_attn_scalar"),
    sliding_window_size=None if keys.get("sliding_window") is None else keys.integer("sliding_window"),
    rope_scaling=scaling,
    final_logit_softcap=None if keys.get(cap := "final_logit_softcapping") is None else keys.number(cap),
  )
  keys.done()
  return config


def _rope(
  keys: ConfigKeys, kind: AttentionType, theta: str, default_theta: float
) -> tuple[float, RopeScaling | None]:
  """Reads RoPE's theta and scaling for one kind of layer, from the older flat keys, the newer nested ones, or both."""
  own = ConfigKeys(
    {
      "rope_theta": keys.get(theta),
      "rope_scaling": _of_kind(keys, "rope_scaling", kind),
      "rope_parameters": _of_kind(keys, "rope_parameters", kind),
      "max_position_embeddings": keys.get("max_position_embeddings"),
    },
    f"config.json, {kind.value} ({theta})",
  )
  found = own.rope(default_theta)
  own.done()
  return found


def _of_kind(keys: ConfigKeys, name: str, kind: AttentionType) -> Any:
  """An object of RoPE for one kind of layer. A flat `rope_scaling` is that of the global layers.

  Raises:
    ConfigError: if the object is neither nested nor a flat `rope_scaling`.
  """
  value, kinds = keys.get(name, Mapping) or {}, {one.value for one in AttentionType}
  flat = sorted(value.keys() - kinds)
  if flat and (name == "rope_parameters" or len(flat) < len(value)):
    raise ConfigError(
      f"config.json: {name} has {', '.join(flat)}; expected an object for each kind of layer: "
      + " and ".join(one.value for one in AttentionType)
    )
  if flat:
    return value if kind is AttentionType.GLOBAL else None
  return value.get(kind.value)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Writes a configuration as config.json of a language model alone, in the spellings of transformers 4 and 5."""
  scaling = write_scaling(config.rope_scaling)
  pattern = [
    p for p in range(1, config.num_layers + 2) if every(p, config.num_layers) == config.attention_types
  ]
  raw = write_common(config) | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": config.query_pre_attn_scalar,
    "sliding_window": config.sliding_window_size,
    "layer_types": [kind.value for kind in config.attention_types],
    "rope_theta": config.rope_theta,
    "rope_local_base_freq": config.local_rope_theta,
    "rope_scaling": scaling or None,
    "rope_parameters": {
      "full_attention": {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
      "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta},
    },
    "final_logit_softcapping": config.final_logit_softcap,
  }
  # Older versions of transformers do not read layer_types.
  return raw | {"sliding_window_pattern": pattern[0]} if pattern else raw


FAMILY = Family(
  name="gemma3",
  model_types=("gemma3", "gemma3_text"),
  model_class=Gemma3,
  config_class=ModelConfig,
  read_config=read_config,
  write_config=write_config,
  weights={"huggingface": HUGGINGFACE, "gguf": GGUF, "orbax": ORBAX, "tunix": TUNIX},
  fit_config=fit_config,
)

# What tunix' samplers need to take the weights.
Gemma3.BACKEND_MAPPINGS = BACKEND_MAPPINGS = backend_mappings(HUGGINGFACE, sglang_jax=SGLANG_GEMMA)


def create_model_from_safe_tensors(
  file_dir: str | os.PathLike, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> Gemma3:
  """Loads a directory of safetensors files with Hugging Face's names, by `load_and_create_model`."""
  return load_and_create_model(file_dir, Gemma3, config, HUGGINGFACE, mesh, dtype=dtype)


def save_lora_merged_model_as_safetensors(
  local_model_path: str | os.PathLike,
  output_dir: str | os.PathLike,
  lora_model: nnx.Module,
  rank: int,
  alpha: float,
) -> None:
  """Writes a copy of a checkpoint with a LoRA model's factors merged into its weights, by `save_lora_merged`."""
  save_lora_merged(lora_model, FAMILY, local_model_path, output_dir, rank=rank, alpha=alpha)
