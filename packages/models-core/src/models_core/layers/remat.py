"""What is recomputed in the backward pass instead of being kept."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TypeVar

from flax import nnx

F = TypeVar("F", bound=Callable)


class RematConfig(enum.Enum):
  """NONE keeps all activations, BLOCK recomputes each attention block, DECODER each layer."""

  NONE = "none"
  BLOCK = "block"
  DECODER = "decoder"

  def block(self, call: F) -> F:
    """An attention block's `__call__`, recomputed where that is wanted."""
    return nnx.remat(call) if self is RematConfig.BLOCK else call

  def layer(self, call: F) -> F:
    """A layer's `__call__`, recomputed where that is wanted."""
    return nnx.remat(call) if self is RematConfig.DECODER else call
