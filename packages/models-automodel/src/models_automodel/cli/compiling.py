"""A line on the terminal that says what takes time: "compiling ..." while XLA compiles."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from models_automodel.progress import StatusLine

# What JAX reports at the end of lowering, which compilation follows, and at the end of compilation.
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"
# The lines that are shown while JAX does not compile, each with its text; the last one counts.
_shown: list[tuple[StatusLine, str]] = []


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[], None]]:
  """Shows a line on a terminal while a block runs: "compiling ..." while JAX compiles, and a text of its own otherwise.

  It yields a function that removes the line before the end of the block.
  """
  line = StatusLine()
  _listen()
  _shown.append((line, text))
  line.show(text)

  def clear() -> None:
    if (line, text) in _shown:
      _shown.remove((line, text))
      line.clear()

  try:
    yield clear
  finally:
    clear()


@functools.cache
def _listen() -> None:
  import jax

  # Once, since there is no way back.
  jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
  if _shown and event in (_LOWERED, _COMPILED):
    line, text = _shown[-1]
    line.show("compiling ..." if event == _LOWERED else text)
