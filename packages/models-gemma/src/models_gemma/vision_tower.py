"""Checkpoints of models that also see images: what the language model alone leaves out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models_core.config import ConfigKeys
from models_core.weights import Ignored

REASON = "the vision tower; the language model is loaded alone"

HUGGINGFACE = [
  Ignored(f"{prefix}{part}.**", REASON)
  for prefix in ("", "model.")
  for part in ("vision_tower", "multi_modal_projector")
]
ORBAX = [
  Ignored("SigLiPFromPatches_0/**", REASON),
  Ignored("transformer/embedder/mm_input_projection.**", REASON),
  Ignored("transformer/embedder/mm_soft_embedding_norm.**", REASON),
  Ignored("vision_encoder.**", REASON),
  Ignored("embedder.mm_input_projection.**", REASON),
  Ignored("embedder.mm_soft_embedding_norm.**", REASON),
]

# What Gemma 3's text_config leaves out.
DEFAULTS = {
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "vocab_size": 262208,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-6,
  "sliding_window": 4096,
}
THETAS = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}

# Of the tower and of how images stand among tokens.
IMAGE_KEYS = """
  vision_config mm_tokens_per_image image_token_index image_token_id boi_token_index boi_token_id eoi_token_index
  eoi_token_id
"""


def text_keys(raw: Mapping[str, Any]) -> ConfigKeys:
  """The language model's keys of a config.json: its `text_config`, or, where there is none, all of them.

  Raises:
    ConfigError: on an unknown key beside `text_config`.
  """
  outer = ConfigKeys(raw)
  if (text := outer.get("text_config", Mapping)) is None:
    return outer
  for key in IMAGE_KEYS.split():
    outer.get(key)
  outer.expect("tie_word_embeddings", True)
  outer.done()
  stated = {key: value for key, value in text.items() if value is not None}
  defaults = DEFAULTS if "rope_parameters" in stated else DEFAULTS | THETAS
  return ConfigKeys(defaults | stated, "config.json: text_config")
