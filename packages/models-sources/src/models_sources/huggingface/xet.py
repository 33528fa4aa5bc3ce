"""Transfers by the protocol Xet, which the client library uses for large files where the package `hf_xet` is installed.

`hf_xet` waits for a silent server for many minutes, and its errors do not say what to do. Here a transfer that fails, or
sends nothing for a while, is given up, and all further downloads of this process use plain HTTP.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import _xet, tqdm

from models_sources.errors import ConnectionFailedError, SourceError

# Seconds without a byte after which a transfer is given up.
STALL = 60.0
# How the names of the client's progress bars for these transfers begin.
_BARS = "huggingface_hub.xet_get"
# Ends all transfers by Xet of this process, which raise an error then. Some versions of the client cannot.
_abort = getattr(_xet, "abort_xet_session", None)


@contextlib.contextmanager
def watched(what: str, shown: bool) -> Iterator[type[tqdm]]:
  """Watches a download, and gives it up if it is a transfer by Xet that stalls.

  Args:
    what: is downloaded, for messages.
    shown: whether progress bars are shown.

  Yields:
    The class of progress bars that the client must use.

  Raises:
    ConnectionFailedError: a transfer by Xet failed or stalled. The next attempt uses plain HTTP.
  """
  if _abort is None:
    constants.HF_HUB_DISABLE_XET = True
  moved: list[float] = []  # when the transfer began, or the last byte came

  class Bar(tqdm):
    def __init__(self, *args: Any, **kwargs: Any):
      if str(kwargs.get("name")).startswith(_BARS):
        moved[:] = [time.monotonic()]
      super().__init__(*args, **kwargs if shown else {**kwargs, "disable": True})

    def update(self, n: float | None = 1) -> bool | None:
      if moved:
        moved[:] = [time.monotonic()]
      return super().update(n)

  done = threading.Event()

  def watch() -> None:
    while not done.wait(STALL / 20):
      if moved and time.monotonic() - moved[0] > STALL:
        assert _abort is not None
        _abort()
        return

  thread = threading.Thread(target=watch, name="xet", daemon=True)
  if not constants.HF_HUB_DISABLE_XET:
    thread.start()
  try:
    yield Bar
  except (SourceError, OSError):
    raise
  except Exception as error:
    if not moved:
      raise
    constants.HF_HUB_DISABLE_XET = True
    raise ConnectionFailedError(
      f"{what} could not be downloaded by Xet ({type(error).__name__}; a transfer is given up after {STALL:.0f} s without "
      "a byte): this process uses plain HTTP from now on"
    ) from None
  finally:
    done.set()
