"""What is recomputed in the backward pass instead of being kept."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flax import nnx

P = ParamSpec("P")
R = TypeVar("R")


class RematConfig(enum.Enum):
  """NONE keeps all activations, BLOCK recomputes each attention block, DECODER each layer."""

  NONE = "none"
  BLOCK = "block"
  DECODER = "decoder"

  def block(self, attention: Callable[P, R]) -> Callable[P, R]:
    """An attention block, to be called; recomputed where that is wanted."""
    return _recomputed(attention) if self is RematConfig.BLOCK else attention

  def layer(self, layer: Callable[P, R]) -> Callable[P, R]:
    """A layer, to be called; recomputed where that is wanted."""
    return _recomputed(layer) if self is RematConfig.DECODER else layer


def _recomputed(module: Callable[P, R]) -> Callable[P, R]:
  # An argument, not a bound call: nnx.remat splits its arguments into arrays and the rest.
  return functools.partial(nnx.remat(_call), module)


def _call(module: Callable[..., R], *args: Any, **kwargs: Any) -> R:
  return module(*args, **kwargs)
