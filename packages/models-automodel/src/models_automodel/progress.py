"""What a terminal shows while something takes time: the progress bar of weights, and a line that says what is done."""

from __future__ import annotations

import contextlib
import sys

import tqdm


def weights_bar(progress: bool) -> tqdm.tqdm:
  """A progress bar that counts bytes; `reset` sets their total."""
  hidden = None if progress else True  # None shows bars on a terminal only.
  return tqdm.tqdm(unit="B", unit_scale=True, desc="weights", disable=hidden)


class StatusLine:
  """A line of stderr that changes in place. What is not a terminal does not show it."""

  def __init__(self) -> None:
    self._is_terminal = sys.stderr.isatty()

  def show(self, text: str) -> None:
    """Shows a text in place of the one before; "" removes it."""
    if self._is_terminal:
      with contextlib.suppress(OSError):
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

  def clear(self) -> None:
    """Removes the line."""
    self.show("")
