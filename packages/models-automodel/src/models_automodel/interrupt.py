"""Ctrl-C: one line, and the status 130, whatever the process does.

Python runs a signal's handler between two of its own instructions, so that a compilation of a minute would delay it for
as long; and a process that raises, and is torn down while a compiler still runs, may crash. A thread waits for the signal
instead, and ends the process at once. A command that writes files takes `raise_at_interrupt`, to clean up.
"""

from __future__ import annotations

import os
import signal
import threading

STATUS = 130
LINE = "automodel: interrupted"


def exit_at_interrupt() -> None:
  """Ends the process at once at Ctrl-C. Only in the main thread."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.signal(signal.SIGINT, lambda *_: None)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=_wait, args=(reading,), daemon=True).start()


def _wait(reading: int) -> None:
  while signal.SIGINT not in os.read(reading, 64):
    pass
  end()


def end() -> None:
  """Prints the line, and ends the process without tearing anything down."""
  os.write(2, f"\n{LINE}\n".encode())
  os._exit(STATUS)


def raise_at_interrupt() -> None:
  """Raises KeyboardInterrupt at Ctrl-C again."""
  if threading.current_thread() is threading.main_thread():
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
