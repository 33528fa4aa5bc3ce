"""Reads and writes the fields that the configurations of all architectures share."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from models_core.config.keys import ConfigKeys
from models_core.config.rope import write_scaling
from models_core.errors import ConfigError
from models_core.layers import RematConfig, check_attention_implementation
from models_core.rope_scaling import RopeScaling
from models_core.sharding import ShardingConfig

# Field of a configuration -> key of config.json.
SIZES = {
  "num_layers": "num_hidden_layers",
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "hidden_dim": "intermediate_size",
  "num_heads": "num_attention_heads",
  "head_dim": "head_dim",
  "num_kv_heads": "num_key_value_heads",
}


# The names that a configuration's fields have, in one architecture or another: whether the head is the embedding, and
# the rows of the embedding.
TYING_FIELDS = ("weight_tying", "use_tied_embedding")
VOCABULARY_FIELDS = ("vocab_size", "num_embed")

# Fields that are positive numbers.
_NUMBERS = ("rope_theta", "local_rope_theta", "norm_eps")


def field_of(config: Any, names: Sequence[str]) -> str | None:
  """The one of some names that is a field of a configuration; None if none of them is."""
  return next((name for name in names if hasattr(config, name)), None)


def check_decoder(config: Any) -> None:
  """Checks that a decoder can have this configuration, whether it was read from a file or made in code.

  A `remat_config` that is a name or a number becomes the `RematConfig` that it stands for.

  Args:
    config: with the fields of `SIZES`, and any of `num_embed`, `rope_theta`, `local_rope_theta`, `norm_eps`,
      `rope_scaling`, `attn_implementation`, `shd_config`, `remat_config` and `scan_layers`.

  Raises:
    ConfigError: if a size is not a positive whole number, RoPE's theta or the epsilon is not a positive number, the
      number of heads is not a multiple of the number of KV heads, the heads have an odd dimension, or one of the last
      five fields is of another kind.
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
      f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}: "
      "every KV head must serve the same number of query heads"
    )
  if config.head_dim % 2:
    raise ConfigError(
      f"head_dim={config.head_dim} is odd, but RoPE rotates pairs of dimensions: it must be even"
    )
  scaling = getattr(config, "rope_scaling", None)
  if scaling is not None and (isinstance(scaling, type) or not callable(getattr(scaling, "scale", None))):
    raise ConfigError(
      f"rope_scaling is {scaling!r}, expected None or a scaling of models_core.rope_scaling: LinearScaling, "
      "Llama3Scaling, YarnScaling or FrequencyFactors"
    )
  if hasattr(config, "attn_implementation"):
    check_attention_implementation(config.attn_implementation)
  if hasattr(config, "shd_config") and not isinstance(config.shd_config, ShardingConfig):
    raise ConfigError(f"shd_config is {config.shd_config!r}, expected a models_core.sharding.ShardingConfig")
  if not isinstance(scan := getattr(config, "scan_layers", False), bool):
    raise ConfigError(f"scan_layers is {scan!r}, expected True or False")
  if hasattr(config, "remat_config"):
    # The dataclass is frozen for its users, but this is still its construction.
    object.__setattr__(config, "remat_config", _remat(config.remat_config))


def _remat(value: Any) -> RematConfig:
  try:
    return RematConfig(value)
  except ValueError:
    numbers = RematConfig.numbers()
    choices = ", ".join(f"{one.name} ({numbers[one]})" if one in numbers else one.name for one in RematConfig)
    raise ConfigError(f"remat_config is {value!r}, expected one of {choices}") from None


def read_sizes(keys: ConfigKeys, fields: Mapping[str, str] = SIZES, **defaults: int) -> dict[str, Any]:
  """Reads the sizes, and `norm_eps`, from config.json.

  Args:
    keys: of config.json.
    fields: field of the configuration -> key of config.json.
    **defaults: values, by field, for keys that config.json may leave out.

  Returns:
    The values, by field.

  Raises:
    ConfigError: if a key is missing without a default, a size is not a positive whole number, or `norm_eps` is not a
      positive number.
  """
  sizes: dict[str, Any] = {}
  for field, key in fields.items():
    sizes[field] = keys.integer(key, defaults[field]) if field in defaults else keys.integer(key)
  return sizes | {"norm_eps": keys.number("rms_norm_eps")}


def write_sizes(config: Any, fields: Mapping[str, str] = SIZES) -> dict[str, Any]:
  """The keys of config.json for the sizes and `norm_eps` of a configuration. The inverse of `read_sizes`."""
  return {key: getattr(config, field) for field, key in fields.items()} | {"rms_norm_eps": config.norm_eps}


def write_rope(theta: float, scaling: RopeScaling | None = None) -> dict[str, Any]:
  """The keys of config.json for RoPE's theta and scaling, as transformers 4 and 5 both read them.

  This is the inverse of `ConfigKeys.rope`.
  """
  written = write_scaling(scaling)
  return {
    "rope_theta": theta,
    "rope_scaling": written or None,
    "rope_parameters": {"rope_type": "default", **written, "rope_theta": theta},
  }
