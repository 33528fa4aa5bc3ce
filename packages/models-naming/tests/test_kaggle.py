import pytest

from models_naming import UnknownModelError, kaggle_handle


@pytest.mark.parametrize(
  ("model_id", "handle"),
  [
    ("google/gemma-2b", "google/gemma/flax/2b"),
    ("google/gemma-7b-it", "google/gemma/flax/7b-it"),
    ("google/gemma-1.1-2b-it", "google/gemma/flax/1.1-2b-it"),
    ("google/gemma-2-2b-it", "google/gemma-2/flax/gemma2-2b-it"),
    ("gemma2-9b", "google/gemma-2/flax/gemma2-9b"),
    ("google/gemma-3-1b-pt", "google/gemma-3/flax/gemma3-1b"),
    ("google/gemma-3-27b-it", "google/gemma-3/flax/gemma3-27b-it"),
    ("google/gemma-3-270m-it", "google/gemma-3/flax/gemma-3-270m-it"),
    ("someone/model/flax/own", "someone/model/flax/own"),
    ("google/gemma/flax/2b/3", "google/gemma/flax/2b/3"),
  ],
)
def test_handles(model_id, handle):
  assert kaggle_handle(model_id) == handle


@pytest.mark.parametrize("model_id", ["meta-llama/Llama-3.1-8B", "google/codegemma-2b", "somebody/nothing"])
def test_what_kaggle_is_not_known_to_have(model_id):
  with pytest.raises(UnknownModelError):
    kaggle_handle(model_id)
