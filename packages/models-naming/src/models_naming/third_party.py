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

  Each entry resolves to a mapping from a lower-case prefix to its `FamilyInfo`. One that does not is left out, so that
  it stops no other: see `broken_entries`.

  Raises:
    NamingConflictError: two packages give one prefix different meanings.
  """
  families: dict[str, FamilyInfo] = {}
  for entry, found in _entries():
    for prefix, info in found.items() if isinstance(found, Mapping) else ():
      if families.setdefault(prefix, info) != info:
        raise NamingConflictError(
          f"the prefix {prefix!r} is announced twice, as {families[prefix]} and as {info} by the entry point "
          f"{entry.name} = {entry.value}: uninstall one of the two packages"
        )
  return families


def broken_entries() -> tuple[str, ...]:
  """What is wrong with entries that cannot be imported, or are no such mapping: one sentence each."""
  return tuple(str(found) for _, found in _entries() if isinstance(found, NamingError))


@functools.cache
def _entries() -> tuple[tuple[EntryPoint, Mapping[str, FamilyInfo] | NamingError], ...]:
  """All entries, each with what it announces or what is wrong with it."""
  from importlib.metadata import entry_points  # takes longer to import than this whole package

  found: list[tuple[EntryPoint, Mapping[str, FamilyInfo] | NamingError]] = []
  for entry in entry_points(group=ENTRY_POINT_GROUP):
    try:
      found.append((entry, _load(entry)))
    except NamingError as error:
      found.append((entry, error))
  return tuple(found)


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
