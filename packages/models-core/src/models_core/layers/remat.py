"""Rematerialisation: which activations the backward pass recomputes instead of keeping them."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flax import nnx

P = ParamSpec("P")
R = TypeVar("R")


class RematConfig(enum.Enum):
  """What the backward pass recomputes: NONE nothing, BLOCK each attention block, DECODER each decoder layer."""

  NONE = "none"
  BLOCK = "block"
  DECODER = "decoder"

  def block(self, attention: Callable[P, R]) -> Callable[P, R]:
    """The function to call for an attention block, with rematerialisation if this is BLOCK."""
    return _recomputed(attention) if self is RematConfig.BLOCK else attention

  def layer(self, layer: Callable[P, R]) -> Callable[P, R]:
    """The function to call for a decoder layer, with rematerialisation if this is DECODER."""
    return _recomputed(layer) if self is RematConfig.DECODER else layer


def _recomputed(module: Callable[P, R]) -> Callable[P, R]:
  # The module is an argument of `_call`: nnx.remat splits only arguments into arrays and static parts.
  return functools.partial(nnx.remat(_call), module)


def _call(module: Callable[..., R], *args: Any, **kwargs: Any) -> R:
  return module(*args, **kwargs)
