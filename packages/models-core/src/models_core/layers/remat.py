"""Rematerialisation: which activations the backward pass recomputes instead of keeping them."""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
import numbers
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

from models_core.layers.stand_in import Arguments, StandIn

M = TypeVar("M", bound=Callable[..., Any])

_in_scan: contextvars.ContextVar[bool] = contextvars.ContextVar("in_scan", default=False)


@contextlib.contextmanager
def in_scan() -> Iterator[None]:
  """Context of the body of a scan, whose backward pass is a loop of its own: nothing can be taken from the forward one.

  Elsewhere barriers keep the compiler from that, which cost copies.
  """
  token = _in_scan.set(True)
  try:
    yield
  finally:
    _in_scan.reset(token)


class RematConfig(enum.Enum):
  """What the backward pass recomputes.

  NONE nothing, BLOCK each attention block, DECODER each decoder layer. The others recompute each decoder layer but for
  what a policy of `jax.checkpoint_policies` saves: NOTHING_SAVEABLE is DECODER, DOTS_SAVEABLE saves matrix products,
  DOTS_WITH_NO_BATCH_DIMS_SAVEABLE those with weights alone, and OFFLOAD_DOT_WITH_NO_BATCH_DIMS moves these to the
  memory of the host.

  Calling the class finds a member by its name in any case, `RematConfig("Block")`, or one of the first three by its
  number, counted from 1 as in the configurations of trainers: `RematConfig(2)`.
  """

  NONE = "none"
  BLOCK = "block"
  DECODER = "decoder"
  NOTHING_SAVEABLE = "nothing_saveable"
  DOTS_SAVEABLE = "dots_saveable"
  DOTS_WITH_NO_BATCH_DIMS_SAVEABLE = "dots_with_no_batch_dims_saveable"
  OFFLOAD_DOT_WITH_NO_BATCH_DIMS = "offload_dot_with_no_batch_dims"

  @classmethod
  def _missing_(cls, value: object) -> RematConfig | None:
    if isinstance(value, str):
      return cls.__members__.get(value.upper())
    # A bool is an int to Python, but no number of a member.
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
      return {number: member for member, number in cls.numbers().items()}.get(int(value))
    return None

  @classmethod
  def numbers(cls) -> dict[RematConfig, int]:
    """The numbers of NONE, BLOCK and DECODER in the configurations of trainers, where policies have none."""
    return {cls.NONE: 1, cls.BLOCK: 2, cls.DECODER: 3}

  def block(self, attention: M) -> M:
    """The function to call for an attention block, with rematerialisation if this is BLOCK."""
    return _recomputed(attention, None) if self is RematConfig.BLOCK else attention

  def layer(self, layer: M) -> M:
    """The function to call for a decoder layer, with rematerialisation unless this is NONE or BLOCK."""
    return layer if self in (RematConfig.NONE, RematConfig.BLOCK) else _recomputed(layer, self._policy())

  def _policy(self) -> Callable[..., Any] | None:
    """What is saved of a decoder layer; None is nothing."""
    if self is RematConfig.OFFLOAD_DOT_WITH_NO_BATCH_DIMS:
      return jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    return None if self is RematConfig.DECODER else getattr(jax.checkpoint_policies, self.value)


def _recomputed(module: Any, policy: Callable[..., Any] | None) -> Any:
  """A function that calls a module, and whose backward pass calls it again instead of keeping its activations.

  The policy says what is kept; None keeps nothing. `nnx.remat` writes all variables of the module after the call, which fails if a transformation closes over it.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    graphdef, state = nnx.split(module)
    arguments, arrays = Arguments.split((args, kwargs))
    stand_ins = []

    @functools.partial(jax.checkpoint, prevent_cse=not _in_scan.get(), policy=policy)
    def run(state: Any, arrays: dict[int, jax.Array]) -> Any:
      stand_in = StandIn(module, graphdef, state)
      stand_ins.append(stand_in)
      args, kwargs = arguments.join(arrays)
      out = stand_in.module(*args, **kwargs)
      return out, [leaf.value for leaf in stand_in.changes()]

    out, values = run(state, arrays)
    stand_ins[0].hand_back(values)
    return out

  return call
