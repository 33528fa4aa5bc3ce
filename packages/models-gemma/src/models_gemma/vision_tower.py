"""Checkpoints of models that also take images: tensors and keys that the language model does not need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models_core.config import ConfigKeys
from models_core.errors import ConfigError
from models_core.weights import Ignored

REASON = "the vision tower; only the language model is loaded"

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

# Values of keys that Gemma 3's text_config leaves out.
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

# Keys of the vision tower, and of the place of images among tokens.
IMAGE_KEYS = """
  vision_config mm_tokens_per_image image_token_index image_token_id boi_token_index boi_token_id eoi_token_index
  eoi_token_id
"""


def text_keys(raw: Mapping[str, Any]) -> ConfigKeys:
  """Returns the keys of the language model: those of `text_config`, or all keys of a config.json without one.

  Raises:
    ConfigError: if a key beside `text_config` is unknown.
  """
  outer = ConfigKeys(raw)
  if (text := outer.get("text_config", Mapping)) is None:
    return outer
  defaults = DEFAULTS if text.get("rope_parameters") is not None else DEFAULTS | THETAS
  inner = {**defaults, **text}
  for key in IMAGE_KEYS.split():
    outer.get(key)
  ties = {
    where: value
    for where, value in (
      ("tie_word_embeddings", outer.get("tie_word_embeddings")),
      ("text_config.tie_word_embeddings", text.get("tie_word_embeddings")),
    )
    if value is not None
  }
  if len(set(map(repr, ties.values()))) > 1:
    # transformers 4 takes one of them, transformers 5 the other.
    raise ConfigError(
      f"config.json states twice whether the head is the embedding, and differs: "
      f"{', '.join(f'{where}={value}' for where, value in ties.items())}; correct one of them"
    )
  if ties:
    inner["tie_word_embeddings"] = next(iter(ties.values()))
  # Some trainers repeat keys of the language model, of which those in text_config count.
  outer.done([key for key in raw if key in inner and raw[key] == inner[key]])
  return ConfigKeys(inner, "config.json: text_config")
