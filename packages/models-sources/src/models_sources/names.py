"""Checks of file names within a checkpoint: a name is relative and never leads upwards."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from models_sources.errors import FilesNotFoundError, InvalidNameError

# Drive letters, backslashes and NULs mean different things on different systems.
_FOREIGN = re.compile(r"[\\\0]|^[A-Za-z]:")


def check_name(name: str, kind: str = "file name") -> str:
  """Returns the name if a path joined from a directory and this name stays inside the directory.

  Raises:
    InvalidNameError: the name is absolute or empty, or a part between its slashes is `..`, `.` or empty.
  """
  if _FOREIGN.search(name) or any(part in ("", ".", "..") for part in name.split("/")):
    raise InvalidNameError(
      f"{name!r} is not a valid {kind}: it must be relative and must not lead out of its directory"
    )
  return name


def missing_files(place: str, names: Sequence[str], available: Collection[str]) -> FilesNotFoundError:
  """Makes the error for files that `place` does not have; the message suggests the nearest names that it has."""
  near = sorted({match for name in names for match in difflib.get_close_matches(name, available, n=2)})
  hint = (
    f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(available)[:8]) or 'no files'}"
  )
  return FilesNotFoundError(f"{place} has no {', '.join(names)}; {hint}")
