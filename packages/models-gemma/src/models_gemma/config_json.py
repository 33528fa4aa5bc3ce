"""What config.json says alike of all Gemmas."""

from __future__ import annotations

from typing import Any

from models_core.config import SIZES, ConfigKeys, read_sizes, write_sizes
from models_core.errors import ConfigError
from models_gemma.attention_types import AttentionType, every

GELU_TANH = "gelu_pytorch_tanh"

_SIZES = {"num_embed" if field == "vocab_size" else field: key for field, key in SIZES.items()}
# What no Gemma is: each key's only value.
_FIXED = {"attention_bias": False, "use_bidirectional_attention": False, "tie_word_embeddings": True}


def read_common(keys: ConfigKeys) -> dict[str, Any]:
  """Fields that all configurations have. Refuses what no Gemma does."""
  for key, value in _FIXED.items():
    keys.expect(key, value)
  keys.expect("hidden_activation", GELU_TANH)
  return read_sizes(keys, _SIZES)


def write_common(config: Any) -> dict[str, Any]:
  """The inverse of `read_common`."""
  return write_sizes(config, _SIZES) | {
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": GELU_TANH,
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
  if (slides := keys.sliding_layers(num_layers)) is not None:
    kinds = {True: AttentionType.LOCAL_SLIDING, False: AttentionType.GLOBAL}
    stated["layer_types"] = tuple(kinds[slide] for slide in slides)
  if len(set(stated.values())) > 1:
    raise ConfigError(f"{' and '.join(stated)} say different things about which layers slide; remove one")
  return next(iter(stated.values()), every(pattern, num_layers))
