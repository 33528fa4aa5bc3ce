"""Qwen 3 checkpoints, dense or with experts: the tables of their weights, and their config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from models_core.adapters import save_lora_merged
from models_core.config import SIZES, ConfigKeys, read_sizes, write_rope, write_sizes
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.rollout import SGLANG_EXPERTS, backend_mappings
from models_core.safetensors_loader import load_and_create_model
from models_core.weights import Form, Ignored, Tied, WeightTable, gguf_table, maxtext_table, tunix_table
from models_qwen import windows
from models_qwen.qwen3.model import ModelConfig, Qwen3

L, M = "layers.{i}", "model.layers.{i}"
X = f"{M}.mlp.experts"
# MLX' name of all experts of a layer.
MLX = f"{M}.mlp.switch_mlp"

HUGGINGFACE = WeightTable(
  # ours                               checkpoint                                layout: checkpoint -> ours
  ("embedder.input_embedding",         "model.embed_tokens.weight",              "v d"),
  (f"{L}.input_layernorm.w",           f"{M}.input_layernorm.weight",            "d"),
  (f"{L}.attn.q_proj.w",               f"{M}.self_attn.q_proj.weight",           "(n h) d"),
  (f"{L}.attn.k_proj.w",               f"{M}.self_attn.k_proj.weight",           "(k h) d"),
  (f"{L}.attn.v_proj.w",               f"{M}.self_attn.v_proj.weight",           "(k h) d"),
  (f"{L}.attn.o_proj.w",               f"{M}.self_attn.o_proj.weight",           "d (n h)"),
  (f"{L}.attn.q_norm.w",               f"{M}.self_attn.q_norm.weight",           "h"),
  (f"{L}.attn.k_norm.w",               f"{M}.self_attn.k_norm.weight",           "h"),
  (f"{L}.post_attention_layernorm.w",  f"{M}.post_attention_layernorm.weight",   "d"),
  (f"{L}.mlp.gate_proj.w",             f"{M}.mlp.gate_proj.weight",              "f d"),
  (f"{L}.mlp.up_proj.w",               f"{M}.mlp.up_proj.weight",                "f d"),
  (f"{L}.mlp.down_proj.w",             f"{M}.mlp.down_proj.weight",              "d f"),
  (f"{L}.mlp.router.w",                f"{M}.mlp.gate.weight",                   "e d"),
  (f"{L}.mlp.experts.gate_proj",       [Form(f"{X}.{{e}}.gate_proj.weight",      "f d -> e f d"),
                                        Form(f"{X}.gate_up_proj",                "e (0/2 f) d -> e f d"),
                                        Form(f"{MLX}.gate_proj.weight",          "e f d")]),
  (f"{L}.mlp.experts.up_proj",         [Form(f"{X}.{{e}}.up_proj.weight",        "f d -> e f d"),
                                        Form(f"{X}.gate_up_proj",                "e (1/2 f) d -> e f d"),
                                        Form(f"{MLX}.up_proj.weight",            "e f d")]),
  (f"{L}.mlp.experts.down_proj",       [Form(f"{X}.{{e}}.down_proj.weight",      "d f -> e d f"),
                                        Form(f"{X}.down_proj",                   "e d f"),
                                        Form(f"{MLX}.down_proj.weight",          "e d f")]),
  ("final_norm.w",                     "model.norm.weight",                      "d"),
  ("lm_head.w",                        "lm_head.weight",                         "v d"),
  ignored=[Ignored(f"{M}.self_attn.rotary_emb.inv_freq", "the RoPE frequencies follow from the configuration")],
  tied=[Tied("lm_head.weight", "model.embed_tokens.weight")],
)  # fmt: skip

GGUF = gguf_table(
  HUGGINGFACE,
  (f"{L}.mlp.experts.gate_proj", [Form("blk.{i}.ffn_gate_exps.weight",    "e f d"),
                                  Form("blk.{i}.ffn_gate_up_exps.weight", "e (0/2 f) d -> e f d")]),
  (f"{L}.mlp.experts.up_proj",   [Form("blk.{i}.ffn_up_exps.weight",      "e f d"),
                                  Form("blk.{i}.ffn_gate_up_exps.weight", "e (1/2 f) d -> e f d")]),
  (f"{L}.mlp.experts.down_proj", "blk.{i}.ffn_down_exps.weight", "e d f"),
)  # fmt: skip

TUNIX = tunix_table(HUGGINGFACE)

MAXTEXT = maxtext_table(HUGGINGFACE)

# The auxiliary loss of the router matters only for training.
HARMLESS = ("router_aux_loss_coef", "output_router_logits", *windows.KEYS)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
  """Reads a config.json whose `model_type` is "qwen3" or "qwen3_moe".

  Raises:
    ConfigError: if a key is missing, contradicts another one, has an unsupported value or is unknown.
  """
  keys = ConfigKeys(raw)
  sparse = raw.get("model_type") == "qwen3_moe"
  heads, hidden, layers = (
    keys.integer(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers")
  )
  keys.expect("hidden_act", "silu", "swish")
  for bias in ("attention_bias", "qkv_bias"):
    keys.expect(bias, False)
  keys.expect("use_qk_norm", True)
  keys.expect("shared_expert_intermediate_size", 0)
  theta, scaling = keys.rope(10_000.0)
  if sparse:
    sliding_window, max_window_layers = windows.read_common_window(keys, layers), 0
  else:
    sliding_window, max_window_layers = windows.read_window(keys, layers)
  # Only where it says null; no default is right where it says nothing.
  null = {"num_kv_heads": heads} if keys.is_null("num_key_value_heads") else {}
  config = ModelConfig(
    **read_sizes(keys, SIZES, head_dim=hidden // heads if sparse else 128, **null),
    rope_theta=theta,
    rope_scaling=scaling,
    use_tied_embedding=keys.boolean("tie_word_embeddings", False),
    sliding_window=sliding_window,
    max_window_layers=max_window_layers,
    **(_read_experts(keys, raw) if sparse else {}),
  )
  keys.done(HARMLESS)
  return config


def _read_experts(keys: ConfigKeys, raw: Mapping[str, Any]) -> dict[str, Any]:
  stated = {keys.integer(k) for k in ("num_experts", "num_local_experts") if raw.get(k) is not None}
  if len(stated) > 1:
    raise ConfigError(
      f"config.json: num_experts and num_local_experts differ ({' and '.join(map(str, sorted(stated)))}): remove one"
    )
  return {
    "num_experts": stated.pop() if stated else keys.integer("num_experts"),
    "num_experts_per_tok": keys.integer("num_experts_per_tok"),
    "moe_hidden_dim": keys.integer("moe_intermediate_size"),
    "norm_topk_prob": keys.boolean("norm_topk_prob", False),
    "decoder_sparse_step": keys.integer("decoder_sparse_step", 1),
    "mlp_only_layers": keys.integers("mlp_only_layers", ()),
  }


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Writes a configuration as config.json, in the spellings of transformers 4 and 5.

  Raises:
    ConfigError: for a model with experts in which only some layers slide, which transformers cannot express.
  """
  sparse = config.num_experts is not None
  if sparse and config.sliding_window is not None and config.max_window_layers:
    raise ConfigError(
      f"max_window_layers={config.max_window_layers}, but config.json can only state that all layers of a model with "
      "experts slide: set max_window_layers=0"
    )
  experts = {
    "num_experts": config.num_experts,
    "num_local_experts": config.num_experts,
    "num_experts_per_tok": config.num_experts_per_tok,
    "moe_intermediate_size": config.moe_hidden_dim,
    "norm_topk_prob": config.norm_topk_prob,
    "decoder_sparse_step": config.decoder_sparse_step,
    "mlp_only_layers": list(config.mlp_only_layers),
  }
  return {
    "architectures": ["Qwen3MoeForCausalLM" if sparse else "Qwen3ForCausalLM"],
    "model_type": "qwen3_moe" if sparse else "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    **write_sizes(config),
    **write_rope(config.rope_theta, config.rope_scaling),
    "tie_word_embeddings": config.use_tied_embedding,
    **windows.write_window(config.sliding_window, config.max_window_layers, config.num_layers),
    **(experts if sparse else {}),
  }


FAMILY = Family(
  name="qwen3",
  model_types=("qwen3", "qwen3_moe"),
  model_class=Qwen3,
  config_class=ModelConfig,
  read_config=read_config,
  write_config=write_config,
  weights={"huggingface": HUGGINGFACE, "gguf": GGUF, "tunix": TUNIX, "maxtext": MAXTEXT},
)

# What tunix' samplers need to take the weights.
Qwen3.BACKEND_MAPPINGS = BACKEND_MAPPINGS = backend_mappings(HUGGINGFACE, sglang_jax=SGLANG_EXPERTS)


def create_model_from_safe_tensors(
  file_dir: str | os.PathLike, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> Qwen3:
  """Loads a directory of safetensors files with Hugging Face's names, by `load_and_create_model`."""
  return load_and_create_model(file_dir, Qwen3, config, HUGGINGFACE, mesh, dtype=dtype)


def save_lora_merged_model_as_safetensors(
  local_model_path: str | os.PathLike,
  output_dir: str | os.PathLike,
  lora_model: nnx.Module,
  rank: int,
  alpha: float,
) -> None:
  """Writes a copy of a checkpoint with a LoRA model's factors merged into its weights, by `save_lora_merged`."""
  save_lora_merged(lora_model, FAMILY, local_model_path, output_dir, rank=rank, alpha=alpha)
