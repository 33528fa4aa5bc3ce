"""Checks that parameters have the shapes that the saved configuration needs: otherwise nobody could load them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from models_core.config import TYING_FIELDS, VOCABULARY_FIELDS, field_of
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.saving.plan import Shaped
from models_core.stacks import without_stacks

_EMBEDDING = "embedder.input_embedding"


def check_shapes(parameters: Mapping[str, Shaped], family: Family, config: Any) -> None:
  """Compares parameters with those of a model that is made from a configuration.

  Args:
    parameters: shapes and dtypes of the parameters that are saved, by name; no layers are stacked.
    family: family of the model.
    config: the configuration that is saved.

  Raises:
    ConfigError: if names or shapes differ. If another value of one field would fit, the message names it.
  """
  config = without_stacks(config)
  found = {name: tuple(one.shape) for name, one in parameters.items()}
  needed = family.shapes(config)
  if found == needed:
    return
  problems = [
    f"{name} has shape {found[name]}, but the configuration needs {needed[name]}"
    for name in found
    if name in needed and found[name] != needed[name]
  ]
  problems += [f"{name} is missing" for name in needed if name not in found]
  problems += [f"{name} has no place in it" for name in found if name not in needed]
  more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
  for field, value in _candidates(found, config):
    other = dataclasses.replace(config, **{field: value})
    if family.shapes(other) == found:
      resize = f", or first {_resize(field)}" if field in VOCABULARY_FIELDS else ""
      raise ConfigError(
        f"the model contradicts its configuration, where {field}={getattr(config, field)}: {problems[0]}{more}. Pass "
        f"config=dataclasses.replace(model.config, {field}={value}){resize}"
      )
  raise ConfigError(
    f"the model contradicts its configuration: {problems[0]}{more}. Pass the configuration of this model as config="
  )


def _resize(field: str) -> str:
  return f"change the weights by models_core.vocabulary.resize_vocabulary(model, model.config.{field})"


def _candidates(found: Mapping[str, tuple[int, ...]], config: Any) -> Iterator[tuple[str, Any]]:
  """Fields that people forget to change, and the value that parameters show."""
  if (field := field_of(config, VOCABULARY_FIELDS)) and found.get(_EMBEDDING):
    yield field, found[_EMBEDDING][0]
  if field := field_of(config, TYING_FIELDS):
    yield field, not getattr(config, field)
  layers = {int(part[1]) for part in (name.split(".") for name in found) if part[0] == "layers"}
  if layers and hasattr(config, "num_layers"):
    yield "num_layers", max(layers) + 1
