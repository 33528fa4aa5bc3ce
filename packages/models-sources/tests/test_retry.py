import pytest

from models_sources import AccessError, ConnectionFailedError
from models_sources.retry import Policy, with_retries


def failing(errors):
  """An action that raises these errors, one a call, and then gives their number."""
  left = list(errors)

  def action():
    if left:
      raise left.pop(0)
    return len(errors)

  return action


def later(retry_after=None):
  error = ConnectionFailedError("later")
  error.retry_after = retry_after
  return error


def policy(waits, **changes):
  return Policy(sleep=waits.append, jitter=lambda: 1.0, **changes)


def test_waits_double_up_to_the_longest():
  waits = []
  assert with_retries(failing([later()] * 6), policy(waits, attempts=7, longest_wait=5)) == 6
  assert waits == [1, 2, 4, 5, 5, 5]


def test_jitter_halves_at_most():
  waits = []
  with_retries(failing([later()] * 2), Policy(sleep=waits.append, jitter=lambda: 0.0))
  assert waits == [0.5, 1.0]


def test_retry_after_decides():
  waits = []
  with_retries(failing([later(17), later(0)]), policy(waits))
  assert waits == [18, 1]


def test_a_longer_retry_after_than_the_patience_is_an_error_at_once():
  waits = []
  with pytest.raises(ConnectionFailedError):
    with_retries(failing([later(301)]), policy(waits))
  assert waits == []


def test_the_last_error_is_raised():
  waits, errors = [], [later() for _ in range(5)]
  with pytest.raises(ConnectionFailedError) as caught:
    with_retries(failing(errors), policy(waits))
  assert caught.value is errors[-1]
  assert len(waits) == 4


def test_permanent_errors_are_raised_at_once():
  waits = []
  with pytest.raises(AccessError):
    with_retries(failing([AccessError("no")]), policy(waits))
  assert waits == []
