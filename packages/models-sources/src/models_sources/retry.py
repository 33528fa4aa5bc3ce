"""Retries: the only module that decides whether a failed request is made again, and after how long a wait."""

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
  """How many attempts to make, and how long to wait between them.

  Attributes:
    attempts: requests in all, including the first.
    first_wait: seconds before the second attempt; each further wait is twice as long.
    longest_wait: upper limit of a wait, in seconds.
    patience: the longest `retry_after` that is waited for, in seconds; a longer one is an error at once.
    sleep: waits a number of seconds.
    jitter: returns a random number in [0, 1), so that many clients do not retry at the same moment.
  """

  attempts: int = 5
  first_wait: float = 1.0
  longest_wait: float = 30.0
  patience: float = 300.0
  sleep: Callable[[float], None] = time.sleep
  jitter: Callable[[], float] = random.random

  def wait(self, attempt: int, retry_after: float | None) -> float:
    """Seconds to wait after a failed attempt.

    Args:
      attempt: number of the failed attempt, counted from 1.
      retry_after: seconds that the server asked for; None if it did not say.
    """
    backoff = min(self.longest_wait, self.first_wait * 2 ** (attempt - 1))
    if retry_after is not None:
      return retry_after + self.first_wait * self.jitter()
    return backoff * (0.5 + 0.5 * self.jitter())


def with_retries(action: Callable[[], T], policy: Policy) -> T:
  """Calls `action` again while it fails with a `ConnectionFailedError`; any other error is raised at once.

  Raises:
    ConnectionFailedError: the last one, if no attempts are left or `retry_after` exceeds the patience.
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
