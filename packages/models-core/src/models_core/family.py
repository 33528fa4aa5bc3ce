"""The contract between an architecture and all other code: a `Family`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

from flax import nnx

from models_core.errors import ConfigError
from models_core.formats import SAFETENSORS, Format, TensorInfo
from models_core.layers import abstract_state, dotted
from models_core.weights import WeightTable, own_names

# The version of this contract. AutoModel refuses a family that was written for another version.
FAMILY_API_VERSION = 1

# The classes of a configuration and of its model.
C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Generic[C, M]):
  """An architecture: its configuration, its model, and the weight tables of its checkpoints.

  A package announces a family by an entry point in the group `models.families`, such as
  `llama3 = "models_llama.llama3"`: a module with an attribute `FAMILY`.

  Attributes:
    name: the configuration category, such as "llama3".
    model_types: the values of `model_type` in config.json that belong to the family.
    model_class: the model, called as `model_class(config, rngs=...)`.
    config_class: a frozen dataclass with a classmethod for each published size.
    read_config: config.json -> configuration. Raises ConfigError on a key that it does not use and on which numbers may
      depend, and on two spellings of one key with different values.
    write_config: configuration -> config.json, in the spellings of older and newer versions of transformers.
    weights: the weight table of each naming scheme. "huggingface" is required. "gguf" is present if the architecture
      has GGUF files, "orbax" if somebody publishes Orbax trees in a naming scheme of their own, "tunix" and "maxtext" if
      these train a model of the architecture. An Orbax tree may always hold the parameters under their own names.
    fit_config: `(preset, tensors by name) -> configuration`, for a checkpoint without config.json. It takes from the
      tensors what a preset leaves open, such as the number of rows of the embedding. It returns None if the tensors
      cannot belong to a model of the preset's size.
    api_version: the version of the contract that the family was written for.
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
    """The weight table of Hugging Face's naming scheme."""
    return self.weights[SAFETENSORS.naming]

  def shapes(self, config: C) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that a configuration gives the model, by name. Nothing is allocated."""
    make: Any = self.model_class
    _, state = abstract_state(functools.partial(make, config))
    return {
      dotted(path): tuple(variable.get_value().shape)
      for path, variable in nnx.to_flat_state(state)
      if isinstance(variable, nnx.Param)
    }

  def tables_for(
    self, format: Format, names: Collection[str], shapes: Mapping[str, Sequence[int]]
  ) -> list[WeightTable]:
    """The weight tables of the naming schemes that a checkpoint may be in: those that know most of its names.

    Names tell the naming scheme of a whole model. Those of some parts of it may be the same in several.

    Args:
      format: the format of the checkpoint.
      names: of its tensors.
      shapes: shapes of the model's parameters, by name.

    Raises:
      ConfigError: if the family has no table for a naming scheme of the format.
    """
    tables = [self.weights[naming] for naming in (format.naming, *format.dialects) if naming in self.weights]
    if format.keeps_own_names:
      tables.append(own_names(shapes, names))
    if len(tables) < 2:
      return tables or [self.table_of(format, shapes)]
    known = [table.known(names) for table in tables]
    return [table for table, number in zip(tables, known, strict=True) if number == max(known)]

  def table_of(
    self, format: Format, shapes: Mapping[str, Sequence[int]], naming: str | None = None
  ) -> WeightTable:
    """The weight table of a naming scheme, in which models are written.

    Args:
      format: the format of a checkpoint.
      shapes: shapes of the model's parameters, by name.
      naming: one of the format's naming schemes; None is its own.

    Raises:
      ConfigError: if the family has no table for the naming scheme.
    """
    naming = naming or format.naming
    if (table := self.weights.get(naming)) is not None:
      return table
    if format.keeps_own_names and naming == format.naming:
      return own_names(shapes)
    raise ConfigError(
      f"the family {self.name} has no weight table for the naming scheme {naming!r}, only for "
      f"{', '.join(self.weights)}: use a checkpoint in another format"
    )
