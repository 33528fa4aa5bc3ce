"""Attention types: which layers have a sliding window."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from models_core.errors import ConfigError


class AttentionType(enum.Enum):
  """Whether a layer sees all earlier tokens or those in a sliding window. The values are those of config.json."""

  GLOBAL = "full_attention"
  LOCAL_SLIDING = "sliding_attention"

  def __repr__(self) -> str:
    return self.name


def every(pattern: int, num_layers: int) -> tuple[AttentionType, ...]:
  """Makes the last of every `pattern` layers global: with 6, five sliding layers, a global one, and so on."""
  return tuple(
    AttentionType.LOCAL_SLIDING if (i + 1) % pattern else AttentionType.GLOBAL for i in range(num_layers)
  )


def checked(types: Iterable[AttentionType], num_layers: int, window: int | None) -> tuple[AttentionType, ...]:
  """Checks the types of a model's layers, and drops entries beyond the last layer.

  Raises:
    ConfigError: if there are fewer types than layers, or if a layer slides and there is no window.
  """
  types = tuple(types)
  if len(types) < num_layers:
    raise ConfigError(f"attention_types has {len(types)} entries for {num_layers} layers: give one for each")
  if AttentionType.LOCAL_SLIDING in types[:num_layers] and window is None:
    raise ConfigError(
      "attention_types has sliding layers, but sliding_window_size is None: give sliding_window_size in tokens"
    )
  return types[:num_layers]
