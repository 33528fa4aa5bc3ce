"""Config categories: the `model_type` values of config.json that they read, and the distributions that hold them."""

from typing import NamedTuple

from immutabledict import immutabledict


class Distribution(NamedTuple):
  """Where a category's implementation lives.

  Attributes:
    name: the distribution, `models-qwen`.
    extra: the extra of `models-automodel` that installs it, `qwen`.
  """

  name: str
  extra: str

  @property
  def install_command(self) -> str:
    """The remedy where the distribution is missing: `pip install "models-automodel[qwen]"`."""
    return f'pip install "models-automodel[{self.extra}]"'


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
  """The distribution that holds a config category; None for a category of a third party."""
  return _DISTRIBUTIONS.get(category)


def category_of_model_type(model_type: str) -> str | None:
  """The config category that reads config.json's `model_type`; None where none of this project's does."""
  return _MODEL_TYPES.get(model_type)
