"""The contract between an architecture and the rest of the house."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from flax import nnx

from models_core.errors import ConfigError
from models_core.formats import SAFETENSORS, Format, TensorInfo
from models_core.weights import WeightTable, own_names

# The major contract. AutoModel refuses a family of another one.
FAMILY_API_VERSION = 1

# A configuration and its model.
C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Generic[C, M]):
  """An architecture: what reads its configuration, holds its weights and computes its logits.

  A package announces it by an entry point `models.families`: `llama3 = "models_llama.llama3"`, a module with
  an attribute `FAMILY`.

  Attributes:
    name: the configuration category, such as "llama3".
    model_types: values of config.json's `model_type` that it reads.
    model_class: called as `model_class(config, rngs=...)`.
    config_class: a frozen dataclass with a classmethod for each published size.
    read_config: config.json -> configuration. Raises ConfigError on a key that it neither uses nor knows to be
      harmless, and where two spellings differ.
    write_config: configuration -> config.json, in the spellings of old and new transformers.
    weights: a weight table for each naming scheme: "huggingface" always; "gguf" where it exists; "orbax" where
      somebody else writes such trees: without it they hold parameters under their own names.
    fit_config: `(preset, tensors by name) -> configuration` of a checkpoint without config.json, which may decide some
      of it, such as the rows of the embedding; None where the two are plainly of different sizes.
    api_version: the contract that it was written against.
  """

  name: str
  model_types: tuple[str, ...]
  model_class: type[M]
  config_class: type[C]
  read_config: Callable[[Mapping[str, Any]], C]
  write_config: Callable[[C], dict[str, Any]]
  weights: Mapping[str, WeightTable]
  fit_config: Callable[[C, Mapping[str, TensorInfo]], C | None] | None = None
  api_version: int = FAMILY_API_VERSION

  @property
  def huggingface(self) -> WeightTable:
    """The weight table of Hugging Face's names."""
    return self.weights[SAFETENSORS.naming]

  def table_of(self, format: Format, shapes: Mapping[str, Sequence[int]]) -> WeightTable:
    """The weight table of a format's naming scheme.

    Args:
      format: of a checkpoint.
      shapes: of the model's parameters, by name.

    Raises:
      ConfigError: if the family has no table for it.
    """
    if (table := self.weights.get(format.naming)) is not None:
      return table
    if format.keeps_own_names:
      return own_names(shapes)
    raise ConfigError(f"the family {self.name} has no weight table for the naming scheme {format.naming!r}")
