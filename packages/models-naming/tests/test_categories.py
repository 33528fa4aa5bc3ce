import pytest

from models_naming import FAMILIES, category_of_model_type, distribution_of


@pytest.mark.parametrize(
  ("model_type", "category"),
  [
    ("llama", "llama3"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3_moe", "qwen3"),
    ("gemma", "gemma"),
    ("gemma2", "gemma"),
    ("gemma3", "gemma3"),
    ("gemma3_text", "gemma3"),
    ("gemma3n", None),
    ("qwen3_next", None),
    ("mistral", None),
  ],
)
def test_category_of_model_type(model_type, category):
  assert category_of_model_type(model_type) == category


@pytest.mark.parametrize(
  ("category", "name", "extra"),
  [
    ("llama3", "models-llama", "llama"),
    ("gemma", "models-gemma", "gemma"),
    ("gemma3", "models-gemma", "gemma"),
    ("qwen2", "models-qwen", "qwen"),
    ("qwen3", "models-qwen", "qwen"),
  ],
)
def test_distribution_of(category, name, extra):
  assert distribution_of(category) == (name, extra)
  assert category in {info.category for info in FAMILIES.values()}


@pytest.mark.parametrize("category", ["falcon", "gemma3n", "gemma4", "llama", "llama3_vision", "qwen", ""])
def test_a_third_party_s_category_has_no_distribution(category):
  """Also one that begins with a name of ours, or that a name of ours begins with."""
  assert distribution_of(category) is None
