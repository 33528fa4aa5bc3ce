"""Which layers slide."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from models_core.errors import ConfigError


class AttentionType(enum.Enum):
  """What a layer sees: all tokens before, or those within a sliding window. The values are config.json's."""

  GLOBAL = "full_attention"
  LOCAL_SLIDING = "sliding_attention"

  def __repr__(self) -> str:
    return self.name


def every(pattern: int, num_layers: int) -> tuple[AttentionType, ...]:
  """One global layer in `pattern`, the last of each such run: 6 gives five sliding layers, then a global one."""
  return tuple(
    AttentionType.LOCAL_SLIDING if (i + 1) % pattern else AttentionType.GLOBAL for i in range(num_layers)
  )


def checked(types: Iterable[AttentionType], num_layers: int, window: int | None) -> tuple[AttentionType, ...]:
  """The types of a model's layers; those beyond its last are left out.

  Raises:
    ConfigError: if there are too few, or if a layer slides without a window.
  """
  types = tuple(types)
  if len(types) < num_layers:
    raise ConfigError(f"attention_types has {len(types)} entries for {num_layers} layers: give one for each")
  if AttentionType.LOCAL_SLIDING in types[:num_layers] and window is None:
    raise ConfigError("attention_types has sliding layers: give sliding_window_size, in tokens")
  return types[:num_layers]
