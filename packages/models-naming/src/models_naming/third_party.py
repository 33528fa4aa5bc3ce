"""Families that other packages announce with an entry point."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from models_naming.errors import NamingConflictError, NamingError
from models_naming.families import FamilyInfo

if TYPE_CHECKING:
  from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "models.names"


@functools.cache
def third_party_families() -> Mapping[str, FamilyInfo]:
  """The prefixes that installed packages announce in the group `models.names`.

  Each entry resolves to a mapping from a lower-case prefix to its `FamilyInfo`.

  Raises:
    NamingError: an entry cannot be imported or is not such a mapping.
    NamingConflictError: two packages give one prefix different meanings.
  """
  from importlib.metadata import entry_points  # takes longer to import than this whole package

  families: dict[str, FamilyInfo] = {}
  for entry in entry_points(group=ENTRY_POINT_GROUP):
    for prefix, info in _load(entry).items():
      if families.setdefault(prefix, info) != info:
        raise NamingConflictError(
          f"the prefix {prefix!r} is announced twice, as {families[prefix]} and as {info} by the entry point "
          f"{entry.name} = {entry.value}: uninstall one of the two packages"
        )
  return families


def _load(entry: EntryPoint) -> Mapping[str, FamilyInfo]:
  where = f"entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP}"
  try:
    families = entry.load()
  except Exception as error:
    raise NamingError(f"{where} cannot be imported ({error}): repair or uninstall its package") from error
  if not isinstance(families, Mapping):
    raise NamingError(f"{where} is a {type(families).__name__}, not a mapping from prefix to FamilyInfo")
  for prefix, info in families.items():
    if not (isinstance(prefix, str) and prefix and prefix == prefix.lower()):
      raise NamingError(f"{where}: prefix {prefix!r} is not a lower-case string")
    if not (isinstance(info, FamilyInfo) and info.family.isidentifier() and info.category.isidentifier()):
      raise NamingError(f"{where}: {prefix!r} is {info!r}, not a FamilyInfo of two identifiers")
  return families
