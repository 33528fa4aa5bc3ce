"""Layers that are alike are traced once, in programs that own their model.

A model of 80 layers that runs under `jax.jit` is traced and lowered layer by layer, which takes as long as fetching a
compiled program from a cache. Inside `one_trace` the layers call one function, which JAX traces once for each kind of
layer; XLA inlines the calls, so that the compiled program is the same.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from models_core.layers.stand_in import Arguments, StandIn

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("one_trace", default=False)


@contextlib.contextmanager
def one_trace() -> Iterator[None]:
  """Context of a program whose model is dropped after the call."""
  token = _active.set(True)
  try:
    yield
  finally:
    _active.reset(token)


def layer_function() -> Callable[[Any], Callable[..., Any]] | None:
  """Takes layers to functions to call for them, for the layers of one run; None outside of `one_trace`.

  A run has a function of its own, since a trace also depends on contexts: of a mesh, or of a library that replaces
  operations.
  """
  if not _active.get():
    return None

  changing: set[Any] = set()

  # Layers of a run share the arguments that are static.
  @functools.partial(jax.jit, static_argnums=(0, 1))
  def call(kind: Any, arguments: Arguments, state: Any, arrays: dict[int, Any]) -> Any:
    graph, _ = kind
    stand_in = StandIn(nnx.merge(graph, state), graph, state)
    out = stand_in.module(*arguments.join(arrays))
    if stand_in.is_changed():
      changing.add(kind)
    return out

  def function_of(layer: Any) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
      graph, state = nnx.split(layer)
      # Attributes may be equal and differ, such as 1 and True.
      kind = (graph, repr(graph))
      arguments, arrays = Arguments.split(args)
      out = call(kind, arguments, state, arrays)
      # What a layer changes in itself, others may read. The compiler drops what was traced.
      return layer(*args) if kind in changing else out

    return function

  return function_of
