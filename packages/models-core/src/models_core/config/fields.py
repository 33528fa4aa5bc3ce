"""The fields that every architecture's configuration has, read from config.json and written to it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from models_core.config.keys import ConfigKeys, write_scaling
from models_core.errors import ConfigError
from models_core.rope_scaling import RopeScaling

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


# Fields that are positive numbers.
_NUMBERS = ("rope_theta", "local_rope_theta", "norm_eps")


def check_decoder(config: Any) -> None:
  """Refuses a configuration that no decoder could have, whoever made it.

  Raises:
    ConfigError: for a size that is no positive whole number, heads that don't share the KV heads evenly, heads of an
      odd dimension, which RoPE cannot turn, or a RoPE base or epsilon that is no positive number.
  """
  for field in (*SIZES, "num_embed"):
    size = getattr(config, field, 1)
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
      raise ConfigError(f"{field} is {size!r}, expected a positive whole number")
  for field in _NUMBERS:
    number = getattr(config, field, 1.0)
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not float(number) > 0:
      raise ConfigError(f"{field} is {number!r}, expected a positive number")
  if config.num_heads % config.num_kv_heads:
    raise ConfigError(
      f"num_heads={config.num_heads} is no multiple of num_kv_heads={config.num_kv_heads}: "
      "each KV head serves as many query heads"
    )
  if config.head_dim % 2:
    raise ConfigError(f"head_dim={config.head_dim} is odd: RoPE turns pairs")


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
