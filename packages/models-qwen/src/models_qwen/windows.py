"""Sliding windows: of each layer, and as Qwen's config.json states them."""

from __future__ import annotations

from typing import Any

from models_core.config import ConfigKeys
from models_core.errors import ConfigError

# Read where `use_sliding_window` is true, else without effect.
KEYS = ("sliding_window", "max_window_layers")


def layer_windows(window: int | None, first: int, num_layers: int) -> tuple[int | None, ...]:
  """The window of each layer in tokens, from the first layer that has it on; None for a layer that sees all."""
  return tuple(window if i >= first else None for i in range(num_layers))


def read_window(keys: ConfigKeys, num_layers: int) -> tuple[int | None, int]:
  """The window, or None, and the first layer that has it.

  `layer_types` wins over `max_window_layers`, as in transformers.

  Raises:
    ConfigError: where the layers that slide are not all from one on, or `use_sliding_window` denies that any does.
  """
  slides, types = keys.boolean("use_sliding_window", False), keys.sliding_layers(num_layers)
  if not slides:
    if types is not None and any(types):
      raise ConfigError(
        "layer_types names sliding layers, but use_sliding_window is false: correct one of them"
      )
    return None, 0
  window = keys.integer("sliding_window")
  if types is None:
    return window, keys.integer("max_window_layers", minimum=0)
  first = num_layers - sum(types)
  if any(types[:first]):
    raise ConfigError(
      f"layer_types has {sum(types)} sliding layers, which are not the last ones: not implemented"
    )
  return window, first


def read_common_window(keys: ConfigKeys, num_layers: int) -> int | None:
  """The window of every layer, or None: transformers' models with experts read no first layer.

  Raises:
    ConfigError: where `layer_types` says otherwise.
  """
  slides = keys.boolean("use_sliding_window", False)
  if keys.sliding_layers(num_layers) not in (None, (slides,) * num_layers):
    raise ConfigError(
      f"layer_types differs from use_sliding_window={slides}, which holds for all layers: remove it"
    )
  return keys.integer("sliding_window") if slides else None


def write_window(window: int | None, first: int, num_layers: int) -> dict[str, Any]:
  """The keys of `read_window`."""
  windows = layer_windows(window, first, num_layers)
  return {
    "use_sliding_window": window is not None,
    "sliding_window": window,
    "max_window_layers": first if window is not None else num_layers,
    "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
  }
