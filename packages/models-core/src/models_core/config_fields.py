"""The fields that every architecture's configuration has, read from config.json and written to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models_core.config_keys import ConfigKeys, write_scaling
from models_core.rope import RopeScaling

# Our field -> config.json's key.
SIZES = {
  "num_layers": "num_hidden_layers",
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "hidden_dim": "intermediate_size",
  "num_heads": "num_attention_heads",
  "head_dim": "head_dim",
  "num_kv_heads": "num_key_value_heads",
}


def read_sizes(keys: ConfigKeys, fields: Mapping[str, str] = SIZES, **defaults: int) -> dict[str, Any]:
  """Fields that are sizes, and `norm_eps`.

  Args:
    keys: of config.json.
    fields: key by field.
    **defaults: by field, of those that config.json may leave out.

  Raises:
    ConfigError: on a missing key, or one that is no positive whole number.
  """
  sizes: dict[str, Any] = {}
  for field, key in fields.items():
    sizes[field] = keys.integer(key, defaults[field]) if field in defaults else keys.integer(key)
  return sizes | {"norm_eps": keys.number("rms_norm_eps")}


def write_sizes(config: Any, fields: Mapping[str, str] = SIZES) -> dict[str, Any]:
  """The inverse of `read_sizes`."""
  return {key: getattr(config, field) for field, key in fields.items()} | {"rms_norm_eps": config.norm_eps}


def write_rope(theta: float, scaling: RopeScaling | None = None) -> dict[str, Any]:
  """RoPE's theta and scaling in the spellings of transformers 4 and 5, the inverse of `ConfigKeys.rope`."""
  written = write_scaling(scaling)
  return {
    "rope_theta": theta,
    "rope_scaling": written or None,
    "rope_parameters": {"rope_type": "default", **written, "rope_theta": theta},
  }
