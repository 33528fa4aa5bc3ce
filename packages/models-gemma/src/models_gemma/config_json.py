"""What config.json says alike of all Gemmas."""

from __future__ import annotations

from typing import Any

from models_core.config_keys import ConfigKeys
from models_core.errors import ConfigError
from models_gemma.attention_types import AttentionType, every

GELU_TANH = "gelu_pytorch_tanh"

# Our field -> config.json's key.
_SIZES = {
  "num_layers": "num_hidden_layers",
  "num_embed": "vocab_size",
  "embed_dim": "hidden_size",
  "hidden_dim": "intermediate_size",
  "num_heads": "num_attention_heads",
  "head_dim": "head_dim",
  "num_kv_heads": "num_key_value_heads",
}
# What no Gemma is: each key's only value.
_FIXED = {"attention_bias": False, "use_bidirectional_attention": False, "tie_word_embeddings": True}


def read_common(keys: ConfigKeys) -> dict[str, Any]:
  """Fields that all configurations have. Refuses what no Gemma does."""
  for key, value in _FIXED.items():
    keys.expect(key, value)
  keys.expect("hidden_activation", GELU_TANH)
  keys.get("cache_implementation")  # says nothing about the numbers
  sizes = {field: keys.integer(key) for field, key in _SIZES.items()}
  return sizes | {"norm_eps": keys.number("rms_norm_eps")}


def write_common(config: Any) -> dict[str, Any]:
  """The inverse of `read_common`."""
  sizes = {key: getattr(config, field) for field, key in _SIZES.items()}
  return sizes | {
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": GELU_TANH,
    "rms_norm_eps": config.norm_eps,
  }


def read_types(keys: ConfigKeys, num_layers: int, pattern: int, *spellings: str) -> tuple[AttentionType, ...]:
  """The types that config.json states.

  Args:
    keys: of config.json.
    num_layers: of the model.
    pattern: one global layer in so many, where config.json says nothing.
    *spellings: keys that state such a pattern.

  Raises:
    ConfigError: for unknown types, a wrong number of them, or where the spellings differ.
  """
  stated = {key: every(keys.integer(key), num_layers) for key in spellings if keys.get(key) is not None}
  if (names := keys.get("layer_types", list)) is not None:
    known = {kind.value: kind for kind in AttentionType}
    if len(names) != num_layers or any(name not in list(known) for name in names):
      raise ConfigError(f"layer_types is {names}, expected {num_layers} of {' and '.join(known)}")
    stated["layer_types"] = tuple(known[name] for name in names)
  if len(set(stated.values())) > 1:
    raise ConfigError(f"{' and '.join(stated)} say different things about which layers slide; remove one")
  return next(iter(stated.values()), every(pattern, num_layers))
