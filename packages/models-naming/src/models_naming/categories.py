"""Config categories: which `model_type` of config.json belongs to which, and which distribution implements it."""

from typing import NamedTuple

from immutabledict import immutabledict


class Distribution(NamedTuple):
  """The distribution that implements a category.

  Attributes:
    name: of the distribution, such as `models-qwen`.
    extra: of `models-automodel` that installs it, such as `qwen`.
  """

  name: str
  extra: str


_GEMMA = Distribution("models-gemma", "gemma")
_LLAMA = Distribution("models-llama", "llama")
_QWEN = Distribution("models-qwen", "qwen")

_DISTRIBUTIONS = immutabledict(
  {"gemma": _GEMMA, "gemma3": _GEMMA, "llama3": _LLAMA, "qwen2": _QWEN, "qwen3": _QWEN}
)

_MODEL_TYPES = immutabledict(
  {
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "llama": "llama3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
  }
)


def distribution_of(category: str) -> Distribution | None:
  """The distribution that implements a config category; None for a third party's category."""
  return _DISTRIBUTIONS.get(category)


def category_of_model_type(model_type: str) -> str | None:
  """The config category of a `model_type` in config.json; None if no family of this project reads it."""
  return _MODEL_TYPES.get(model_type)
