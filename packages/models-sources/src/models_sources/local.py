"""The source `local`: a directory of this machine, or one safetensors or GGUF file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from models_sources.disk import read_errors
from models_sources.errors import FilesNotFoundError, InvalidNameError
from models_sources.names import check_name, missing_files


@dataclasses.dataclass(frozen=True)
class LocalFiles:
  """The files of a directory, or one file.

  Attributes:
    path: absolute path of the directory or the file; symbolic links are not resolved.
    revision: always None, because a directory has no versions.
  """

  path: str
  revision: None = dataclasses.field(default=None, init=False, repr=False)

  def names(self) -> Sequence[str]:
    """Names of the regular files at the top level, sorted. A symbolic link counts as the file it points to."""
    if os.path.isfile(self.path):
      return [os.path.basename(self.path)]
    with read_errors(self.path), os.scandir(self.path) as entries:
      # `entry.is_file()` would raise on a loop of symbolic links.
      return sorted(entry.name for entry in entries if os.path.isfile(entry.path))

  def locate(self, name: str) -> str:
    """The path of a file.

    Raises:
      FilesNotFoundError: there is no such file.
      InvalidNameError: the name leads out of the directory.
    """
    check_name(name)
    place = os.path.join(self._directory(), name)
    known = name == os.path.basename(self.path) if os.path.isfile(self.path) else os.path.isfile(place)
    if not known:
      raise missing_files(self.path, [name], self.names())
    return place

  def _directory(self) -> str:
    return os.path.dirname(self.path) if os.path.isfile(self.path) else self.path

  def size(self, name: str) -> int:
    """Bytes of a file."""
    path = self.locate(name)
    with read_errors(path):
      return os.stat(path).st_size

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer where it ends before `stop`."""
    path = self.locate(name)
    with read_errors(path), open(path, "rb") as file:
      file.seek(start)
      return file.read(max(0, stop - start))

  def fetch(self, names: Sequence[str]) -> str:
    """Checks that the files exist and returns the directory that holds them. Nothing is copied.

    Raises:
      FilesNotFoundError: some files do not exist; the message names all of them.
    """
    here = self.names()
    absent = [
      n for n in names if n not in here and not os.path.isfile(os.path.join(self.path, check_name(n)))
    ]
    if absent:
      raise missing_files(self.path, absent, here)
    return self._directory()


def open_files(
  identifier: str,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  download_path: str | None = None,
  progress: bool = True,
) -> LocalFiles:
  """Opens a directory or one file; `~` stands for the home directory.

  Args:
    identifier: path of a directory or a file.
    revision: must be None, because a directory has no versions.
    token: has no effect: local files need none.
    download_path: has no effect: nothing is downloaded.
    progress: has no effect.

  Raises:
    FilesNotFoundError: the path does not exist.
    InvalidNameError: a revision is given, or the path holds a NUL.
  """
  if revision is not None:
    raise InvalidNameError(
      f"{identifier} is a local path and has no revision {revision!r}: leave revision out"
    )
  if "\0" in identifier:
    raise InvalidNameError(f"{identifier!r} holds a NUL, which no path can: check the spelling")
  path = os.path.abspath(os.path.expanduser(identifier))
  if not os.path.exists(path):
    raise FilesNotFoundError(
      f"there is no file or directory {path}: check the spelling, "
      "or name the source of a repository, such as 'huggingface'"
    )
  return LocalFiles(path)
