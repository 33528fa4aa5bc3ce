import jax
import pytest


@pytest.fixture
def compilations():
  """The programs that were compiled since the fixture was called."""
  found = []

  def note(name, seconds, **more):
    if "backend_compile" in name:
      found.append(more)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield found
  jax.monitoring.unregister_event_duration_listener(note)
