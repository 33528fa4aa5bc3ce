"""Exceptions reach another process as they are."""

import pickle

import pytest

from models_core import errors
from models_core.errors import CheckpointError, ModelsError, SaveError
from models_core.extras import MissingExtraError
from models_core.processes import ProcessError

ONE_SENTENCE = [
  errors.ConfigError,
  errors.ShardingError,
  errors.AdapterError,
  errors.CacheError,
  ProcessError,
]


@pytest.mark.parametrize(
  "error",
  [
    CheckpointError("/models/a", ["x is missing", "y has shape (2,), expected (3,)"]),
    SaveError("/models/a cannot be written", 28),
    pytest.param(SaveError("/models/a cannot be written"), id="no errno"),
    MissingExtraError("install it", name="tensorstore"),
    *(kind("what is wrong") for kind in ONE_SENTENCE),
  ],
  ids=lambda error: type(error).__name__,
)
def test_an_error_survives_pickling(error):
  error.add_note("a note")
  found = pickle.loads(pickle.dumps(error))
  assert type(found) is type(error)
  assert isinstance(found, ModelsError)
  assert str(found) == str(error)
  assert found.__notes__ == ["a note"]
  for name in ("where", "problems", "errno", "name"):
    assert getattr(found, name, None) == getattr(error, name, None)
