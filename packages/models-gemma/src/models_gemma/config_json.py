"""The keys of config.json that all Gemma models share."""

from __future__ import annotations

from typing import Any

from models_core.config import SIZES, ConfigKeys, read_sizes, write_sizes
from models_core.errors import ConfigError
from models_gemma.attention_types import AttentionType, every

GELU_TANH = "gelu_pytorch_tanh"

_SIZES = {"num_embed" if field == "vocab_size" else field: key for field, key in SIZES.items()}
# Keys whose only supported value is this one, in all Gemma models.
_FIXED = {"attention_bias": False, "use_bidirectional_attention": False}


def read_common(keys: ConfigKeys) -> dict[str, Any]:
  """Reads the fields that all Gemma configurations share.

  Raises:
    ConfigError: if a key is missing, or has a value that no Gemma model implements.
  """
  for key, value in _FIXED.items():
    keys.expect(key, value)
  keys.expect("hidden_activation", GELU_TANH)
  return read_sizes(keys, _SIZES) | {"weight_tying": keys.boolean("tie_word_embeddings", True)}


def write_common(config: Any) -> dict[str, Any]:
  """The inverse of `read_common`."""
  return write_sizes(config, _SIZES) | {
    "attention_bias": False,
    "tie_word_embeddings": config.weight_tying,
    "hidden_activation": GELU_TANH,
  }


def read_types(keys: ConfigKeys, num_layers: int, pattern: int, *spellings: str) -> tuple[AttentionType, ...]:
  """Reads the attention type of each layer.

  Args:
    keys: of config.json.
    num_layers: of the model.
    pattern: passed to `every` if config.json states no types.
    *spellings: keys that may state such a pattern.

  Raises:
    ConfigError: if a type is unknown, if `layer_types` has the wrong length, or if two keys disagree.
  """
  stated = {key: every(keys.integer(key), num_layers) for key in spellings if keys.get(key) is not None}
  if (slides := keys.sliding_layers(num_layers)) is not None:
    kinds = {True: AttentionType.LOCAL_SLIDING, False: AttentionType.GLOBAL}
    stated["layer_types"] = tuple(kinds[slide] for slide in slides)
  if len(set(stated.values())) > 1:
    raise ConfigError(
      f"config.json: {' and '.join(stated)} state different sliding layers: remove one of them"
    )
  return next(iter(stated.values()), every(pattern, num_layers))
