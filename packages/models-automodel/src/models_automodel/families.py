"""Families, found by the entry points `models.families`. Only the requested family is imported."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

import models_naming
from models_automodel.errors import MissingFamilyError, ModelNameError
from models_core.errors import ModelsError
from models_core.extras import install_command

if TYPE_CHECKING:
  from models_core.family import Family

GROUP = "models.families"


@functools.cache
def installed() -> dict[str, importlib.metadata.EntryPoint]:
  """The entry points of all installed families, by the family's name."""
  return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def check_installed(model_id: str) -> None:
  """Refuses a published repository whose architecture's package is missing, before any request to a source.

  Raises:
    MissingFamilyError: the package is missing; the message holds the command that installs it.
  """
  for family, ids in models_naming.known_model_ids().items():
    if model_id in ids:
      category = next(info.category for info in models_naming.FAMILIES.values() if info.family == family)
      if category not in installed():
        raise _missing(category, model_id)


def install_command_of(category: str) -> str | None:
  """The command that installs the family of a config category; None for a third party's."""
  distribution = models_naming.distribution_of(category)
  return install_command(f"models-automodel[{distribution.extra}]") if distribution else None


def _missing(category: str, wanted_by: str) -> MissingFamilyError:
  remedy = install_command_of(category) or "install the package that announces it"
  return MissingFamilyError(f"{wanted_by} is a {category} model: {remedy}")


def family_module(category: str, wanted_by: str) -> ModuleType:
  """Imports the package of an architecture, such as `models_llama.llama3`.

  Args:
    category: the config category, which is also the family's name.
    wanted_by: the model that needs the family, for the message.

  Raises:
    MissingFamilyError: the package is missing; the message holds the command that installs it.
  """
  entry = installed().get(category)
  if entry is None:
    raise _missing(category, wanted_by)
  return importlib.import_module(entry.module)


def load_family(category: str, wanted_by: str) -> Family:
  """Imports the family of a config category.

  Raises:
    MissingFamilyError: the package is missing, or its version of the family contract differs from models-core's.
  """
  # Imported here, because `automodel list` does not need Flax.
  from models_core.family import FAMILY_API_VERSION

  family = family_module(category, wanted_by).FAMILY
  if family.api_version != FAMILY_API_VERSION:
    raise MissingFamilyError(
      f"{installed()[category].value} is written for version {family.api_version} of the family contract, "
      f"models-core has {FAMILY_API_VERSION}: upgrade the older of the two"
    )
  return family


def family_of_model_type(model_type: str, wanted_by: str) -> Family:
  """The family that reads a `model_type` of config.json.

  Raises:
    MissingFamilyError: as `load_family`.
    ModelNameError: if no installed family reads it.
  """
  if (category := models_naming.category_of_model_type(model_type)) is not None:
    return load_family(category, wanted_by)
  # Only the module of a third party's family says which model types it reads.
  for category in installed():
    if models_naming.distribution_of(category) is None:
      family = load_family(category, wanted_by)
      if model_type in family.model_types:
        return family
  raise ModelNameError(
    f"{wanted_by}: no installed family reads model_type {model_type!r}: install the package of its family; "
    f"installed are {', '.join(installed()) or 'none'}"
  )


def family_of_config(config: Any, wanted_by: str) -> Family:
  """The family that a configuration object belongs to.

  Raises:
    ModelsError: if no installed family's package defines its class.
  """
  module = type(config).__module__
  for category, entry in installed().items():
    if module == entry.module or module.startswith(f"{entry.module}."):
      return load_family(category, wanted_by)
  raise ModelsError(
    f"the configuration {module}.{type(config).__qualname__} belongs to no installed family: install its package"
  )
