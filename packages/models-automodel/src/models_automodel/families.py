"""Families, found by the entry points `models.families` or registered. Only the requested family is imported."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import models_naming
from models_automodel.errors import MissingFamilyError, ModelNameError
from models_core.errors import ModelsError
from models_core.extras import install_command

if TYPE_CHECKING:
  from models_core.family import Family

GROUP = "models.families"

_log = logging.getLogger(__name__)


# Families of this process that no package announces, by name.
_registered: dict[str, Family] = {}


@functools.cache
def installed() -> dict[str, importlib.metadata.EntryPoint]:
  """The entry points of all installed families, by the family's name. A name of this project is its own package's."""
  found: dict[str, importlib.metadata.EntryPoint] = {}
  for entry in importlib.metadata.entry_points(group=GROUP):
    owner = models_naming.distribution_of(entry.name)
    if owner is not None and entry.dist is not None and entry.dist.name != owner.name:
      _log.warning(
        "%s announces a family %s, which is of %s: it is not used", entry.dist.name, entry.name, owner.name
      )
    else:
      found[entry.name] = entry
  return found


def entry_of(category: str) -> importlib.metadata.EntryPoint | None:
  """The entry point of one family; None if its package is missing.

  A family of this project is looked up in its own package: a search of all packages takes as long as to plan a model.
  """
  if (owner := models_naming.distribution_of(category)) is None:
    return installed().get(category)
  try:
    points = importlib.metadata.distribution(owner.name).entry_points
  except importlib.metadata.PackageNotFoundError:
    return None
  return next(iter(points.select(group=GROUP, name=category)), None)


def known() -> list[str]:
  """The names of all families that can be loaded: those that were registered, and those that are installed."""
  return list(dict.fromkeys([*_registered, *installed()]))


def register(family: Family) -> None:
  """Makes a family known to this process, as `AutoModel.register` describes it.

  Raises:
    MissingFamilyError: it is written for another version of the family contract.
    ModelNameError: its name or one of its `model_types` is taken.
  """
  _check_version(family, f"the family {family.name}")
  if family.name in installed():
    raise ModelNameError(f"{family.name} is the name of an installed family: register it under another name")
  for model_type in family.model_types:
    if (owner := models_naming.category_of_model_type(model_type)) is not None:
      raise ModelNameError(
        f"the family {family.name} reads model_type {model_type!r}, which is that of the family {owner}: pass "
        "config= to load such a checkpoint with it"
      )
  _registered[family.name] = family


def check_installed(model_id: str) -> None:
  """Refuses a published repository whose architecture's package is missing, before any request to a source.

  Raises:
    MissingFamilyError: the package is missing; the message holds the command that installs it.
  """
  for family, ids in models_naming.known_model_ids().items():
    if model_id in ids:
      category = next(info.category for info in models_naming.FAMILIES.values() if info.family == family)
      if entry_of(category) is None:
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
    MissingFamilyError: the package is missing or cannot be imported; the message holds the remedy.
  """
  if (entry := entry_of(category)) is None:
    raise _missing(category, wanted_by)
  try:
    return importlib.import_module(entry.module)
  except Exception as error:  # whatever a broken package raises
    raise MissingFamilyError(
      f"{_named(entry)} cannot be imported ({error}): repair or uninstall it"
    ) from error


def _named(entry: importlib.metadata.EntryPoint) -> str:
  package = f" of the package {entry.dist.name}" if entry.dist is not None else ""
  return f"the family {entry.name} = {entry.value}{package}"


def load_family(category: str, wanted_by: str) -> Family:
  """Returns the family of a config category: the one that was registered, or that of the installed package.

  Raises:
    MissingFamilyError: the package is missing, broken, or of another version of the family contract than models-core.
  """
  if (family := _registered.get(category)) is not None:
    return family
  module = family_module(category, wanted_by)
  entry = entry_of(category)
  assert entry is not None
  named = _named(entry)
  if not hasattr(module, "FAMILY"):
    raise MissingFamilyError(f"{named} has no attribute FAMILY: repair or uninstall it")
  _check_version(module.FAMILY, named)
  return module.FAMILY


def _check_version(family: Family, named: str) -> None:
  # Imported here, because `automodel list` does not need Flax.
  from models_core.family import FAMILY_API_VERSION

  if family.api_version != FAMILY_API_VERSION:
    raise MissingFamilyError(
      f"{named} is written for version {family.api_version} of the family contract, models-core has "
      f"{FAMILY_API_VERSION}: upgrade the older of the two"
    )


def loadable(wanted_by: str, *, only_theirs: bool = False) -> Iterator[tuple[str, Family]]:
  """Yields all families by name, without those that cannot be loaded: each of these is logged.

  Args:
    wanted_by: the model that a family is looked for, for messages.
    only_theirs: whether those of this project are left out.
  """
  for category in known():
    if not only_theirs or models_naming.distribution_of(category) is None:
      try:
        yield category, load_family(category, wanted_by)
      except MissingFamilyError as error:
        _log.warning("%s: not tried: %s", wanted_by, error)


def family_of_model_type(model_type: str, wanted_by: str) -> Family:
  """The family that reads a `model_type` of config.json.

  Raises:
    MissingFamilyError: as `load_family`.
    ModelNameError: if no family reads it.
  """
  if (category := models_naming.category_of_model_type(model_type)) is not None:
    return load_family(category, wanted_by)
  # Only the module of a third party's family says which model types it reads.
  for _, family in loadable(wanted_by, only_theirs=True):
    if model_type in family.model_types:
      return family
  raise ModelNameError(
    f"{wanted_by}: no installed family reads model_type {model_type!r}: install the package of its family; "
    f"installed are {', '.join(known()) or 'none'}"
  )


def family_of_config(config: Any, wanted_by: str) -> Family:
  """The family that a configuration object belongs to.

  Raises:
    ModelsError: if no installed family's package defines its class.
  """
  for family in _registered.values():
    if isinstance(config, family.config_class):
      return family
  module = type(config).__module__
  for category, entry in installed().items():
    if module == entry.module or module.startswith(f"{entry.module}."):
      return load_family(category, wanted_by)
  raise ModelsError(
    f"the configuration {module}.{type(config).__qualname__} belongs to no installed family: install its package"
  )
