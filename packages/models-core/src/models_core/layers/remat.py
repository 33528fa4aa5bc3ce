"""Rematerialisation: which activations the backward pass recomputes instead of keeping them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from models_core.layers.stand_in import StandIn

M = TypeVar("M", bound=Callable[..., Any])


class RematConfig(enum.Enum):
  """What the backward pass recomputes: NONE nothing, BLOCK each attention block, DECODER each decoder layer."""

  NONE = "none"
  BLOCK = "block"
  DECODER = "decoder"

  def block(self, attention: M) -> M:
    """The function to call for an attention block, with rematerialisation if this is BLOCK."""
    return _recomputed(attention) if self is RematConfig.BLOCK else attention

  def layer(self, layer: M) -> M:
    """The function to call for a decoder layer, with rematerialisation if this is DECODER."""
    return _recomputed(layer) if self is RematConfig.DECODER else layer


def _recomputed(module: Any) -> Any:
  """A function that calls a module, and whose backward pass calls it again instead of keeping its activations.

  `nnx.remat` writes all variables of the module after the call, which fails if a transformation closes over it.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    stand_ins = []

    @jax.checkpoint
    def run(state: Any, arrays: dict[int, jax.Array]) -> Any:
      stand_in = StandIn(module, graphdef, state)
      stand_ins.append(stand_in)
      args, kwargs = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
      out = stand_in.module(*args, **kwargs)
      return out, [leaf.value for leaf in stand_in.changes()]

    out, values = run(state, arrays)
    stand_ins[0].hand_back(values)
    return out

  return call
