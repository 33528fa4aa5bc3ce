"""When to ask again: the one place where the waiting for a better moment is decided."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from models_sources.errors import ConnectionFailedError

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Policy:
  """How often to ask, and how long to wait in between.

  Attributes:
    attempts: questions in all, the first one included.
    first_wait: seconds before the second attempt; each further wait doubles.
    longest_wait: seconds that doubling ends at.
    patience: the longest `retry_after`, in seconds, that is waited for; a longer one is an error at once.
    sleep: waits a number of seconds.
    jitter: a number of [0, 1), so that many clients don't come back at the same moment.
  """

  attempts: int = 5
  first_wait: float = 1.0
  longest_wait: float = 30.0
  patience: float = 300.0
  sleep: Callable[[float], None] = time.sleep
  jitter: Callable[[], float] = random.random

  def wait(self, attempt: int, retry_after: float | None) -> float:
    """Seconds to wait after the failed attempt of that number, counted from 1."""
    backoff = min(self.longest_wait, self.first_wait * 2 ** (attempt - 1))
    if retry_after is not None:
      return retry_after + self.first_wait * self.jitter()
    return backoff * (0.5 + 0.5 * self.jitter())


def with_retries(action: Callable[[], T], policy: Policy) -> T:
  """Does it, again and again while it fails with a `ConnectionFailedError`; any other error is permanent.

  Raises:
    ConnectionFailedError: the last one, when the attempts are used up or `retry_after` exceeds the patience.
  """
  attempt = 1
  while True:
    try:
      return action()
    except ConnectionFailedError as error:
      if attempt >= policy.attempts or (error.retry_after or 0) > policy.patience:
        raise
      seconds = policy.wait(attempt, error.retry_after)
      _log.info("%s; attempt %d of %d in %.1f s", error, attempt + 1, policy.attempts, seconds)
    policy.sleep(seconds)
    attempt += 1
