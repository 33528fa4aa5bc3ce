"""Sliding windows of Qwen's layers, and the keys of config.json that state them."""

from __future__ import annotations

from typing import Any

from models_core.config import ConfigKeys
from models_core.errors import ConfigError

# Keys without effect unless `use_sliding_window` is true.
KEYS = ("sliding_window", "max_window_layers")


def layer_windows(window: int | None, first: int, num_layers: int) -> tuple[int | None, ...]:
  """Sliding window of each layer in tokens: None before layer `first`, where layers see all tokens."""
  return tuple(window if i >= first else None for i in range(num_layers))


def read_window(keys: ConfigKeys, num_layers: int) -> tuple[int | None, int]:
  """Reads the sliding window in tokens, or None, and the index of the first layer that has it.

  `layer_types` takes precedence over `max_window_layers`, as in transformers.

  Raises:
    ConfigError: if the sliding layers are not the last ones, or if `use_sliding_window` contradicts `layer_types`.
  """
  window, types = _window(keys), keys.sliding_layers(num_layers)
  if window is None:
    if types is not None and any(types):
      why = "sliding_window is null" if keys.get("use_sliding_window") else "use_sliding_window is false"
      raise ConfigError(f"config.json: layer_types names sliding layers, but {why}: correct one of them")
    return None, 0
  if types is None:
    return window, keys.integer("max_window_layers", minimum=0)
  first = num_layers - sum(types)
  if any(types[:first]):
    raise ConfigError(
      f"config.json: layer_types has {sum(types)} sliding layers, which are not the last ones: only models whose last "
      "layers slide are implemented"
    )
  return window, first


def read_common_window(keys: ConfigKeys, num_layers: int) -> int | None:
  """Reads the sliding window in tokens that all layers of a model with experts share, or None.

  transformers does not read `max_window_layers` for these models.

  Raises:
    ConfigError: if `layer_types` says that only some layers slide.
  """
  window = _window(keys)
  if keys.sliding_layers(num_layers) not in (None, (window is not None,) * num_layers):
    raise ConfigError(
      f"config.json: layer_types differs from use_sliding_window={window is not None}, which applies to all layers of a "
      "model with experts: remove layer_types"
    )
  return window


def _window(keys: ConfigKeys) -> int | None:
  """The sliding window in tokens; None if it is switched off, or null."""
  off = not keys.boolean("use_sliding_window", False) or keys.is_null("sliding_window")
  return None if off else keys.integer("sliding_window")


def write_window(window: int | None, first: int, num_layers: int) -> dict[str, Any]:
  """The inverse of `read_window`: keys of config.json."""
  windows = layer_windows(window, first, num_layers)
  return {
    "use_sliding_window": window is not None,
    "sliding_window": window,
    "max_window_layers": first if window is not None else num_layers,
    "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
  }
