"""The contract between an architecture and the rest of the house."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from flax import nnx

from models_core.errors import ConfigError
from models_core.formats import TensorInfo
from models_core.weights import WeightTable, own_names

# The major contract. AutoModel refuses a family of another one.
FAMILY_API_VERSION = 1

# Dialects that are no convention of names: where a family has no table, parameters keep their own.
_NAMELESS = frozenset({"orbax"})

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
    weights: a weight table for each dialect: "huggingface" always; "gguf" where it exists; "orbax" where somebody
      else writes such trees: without it they hold parameters under their own names (`table_of`).
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


def table_of(family: Family, dialect: str, shapes: Mapping[str, Sequence[int]]) -> WeightTable:
  """The weight table of a dialect.

  Args:
    family: of the model.
    dialect: such as "huggingface".
    shapes: of the model's parameters, by name.

  Raises:
    ConfigError: if the family knows nothing of the dialect.
  """
  if (table := family.weights.get(dialect)) is not None:
    return table
  if dialect in _NAMELESS:
    return own_names(shapes)
  raise ConfigError(f"the family {family.name} does not read the {dialect} dialect")
