"""Names of files within a checkpoint: relative, and never upwards."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from models_sources.errors import FilesNotFoundError, InvalidNameError

# A drive letter, a backslash or a NUL means something else on one system than on another.
_FOREIGN = re.compile(r"[\\\0]|^[A-Za-z]:")


def check_name(name: str, kind: str = "file name") -> str:
  """The name itself, if joining it to a directory cannot leave that directory.

  Raises:
    InvalidNameError: it is absolute, empty, or has a part `..`, `.` or an empty one.
  """
  if _FOREIGN.search(name) or any(part in ("", ".", "..") for part in name.split("/")):
    raise InvalidNameError(
      f"{name!r} is no {kind}: it has to be relative and must not lead out of its directory"
    )
  return name


def missing_files(place: str, names: Sequence[str], available: Collection[str]) -> FilesNotFoundError:
  """The error for files that `place` doesn't have, with the nearest names that it does have."""
  near = sorted({match for name in names for match in difflib.get_close_matches(name, available, n=2)})
  hint = (
    f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(available)[:8]) or 'no files'}"
  )
  return FilesNotFoundError(f"{place} has no {', '.join(names)}; {hint}")
