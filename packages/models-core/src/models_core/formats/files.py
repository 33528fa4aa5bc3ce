"""Access to the files of a checkpoint, on this machine or in a store."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from models_core.errors import CheckpointError, ModelsError

# Bytes that the system reads ahead: more than a disk reads while a load is planned.
_AHEAD = 256 << 20

# Reads bytes [start, stop) of one file; returns fewer where it ends before `stop`.
ReadRange = Callable[[int, int], bytes]


class Files(Protocol):
  """The files of one checkpoint, on this machine or in a store."""

  @property
  def path(self) -> str:
    """Where the files are: a directory, or an address such as `gs://bucket/folder`."""

  def names(self) -> Sequence[str]:
    """Names of all files, relative to `path`."""

  def size(self, name: str) -> int:
    """Bytes of a file."""

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer where it ends before `stop`."""

  def fetch(self, names: Sequence[str]) -> str:
    """Makes the named files local, complete or not at all. Returns the directory that holds them."""


@contextlib.contextmanager
def read_errors(path: str) -> Iterator[None]:
  """Turns an error of the file system while a path is read into one that names the path and the remedy.

  An error of a file that does not exist stays as it is: callers may ask for one that need not be there.

  Raises:
    CheckpointError: if the file system refuses.
  """
  try:
    yield
  except FileNotFoundError:
    raise
  except OSError as error:
    if error.errno is None:
      raise
    remedy = _REMEDIES.get(error.errno, "")
    raise CheckpointError(path, [f"cannot be read: {error.strerror or error}{remedy}"]) from error


_REMEDIES = {
  errno.EACCES: "; make it readable for this user",
  errno.EPERM: "; make it readable for this user",
  errno.EMFILE: "; raise the limit on open files, which `ulimit -n` shows",
  errno.ENFILE: "; raise the system's limit on open files",
  errno.ELOOP: "; the link leads back to itself: restore the file",
}


@runtime_checkable
class RangeFiles(Files, Protocol):
  """Files that many threads can read in place, range by range. All ranges belong to one version of a file."""

  def read_into(self, name: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with a file's bytes from `start` on; raises an error where it cannot fill all of it."""


@dataclasses.dataclass(frozen=True)
class LocalFiles:
  """A directory, or one file, on this machine.

  Attributes:
    path: of the directory or file.
  """

  path: str

  def names(self) -> Sequence[str]:
    """Names of the regular files in the directory, sorted.

    Raises:
      CheckpointError: if the path does not exist.
    """
    if os.path.isfile(self.path):
      return [os.path.basename(self.path)]
    if not os.path.isdir(self.path):
      raise CheckpointError(self.path, ["there is no such file or directory"])
    # Not entry.is_file(), which raises an error for a symbolic link that leads back to itself.
    with read_errors(self.path), os.scandir(self.path) as entries:
      return sorted(entry.name for entry in entries if os.path.isfile(entry.path))

  def locate(self, name: str) -> str:
    """The path of the file with this name."""
    return self.path if os.path.isfile(self.path) else os.path.join(self.path, name)

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
      return file.read(stop - start)

  def fetch(self, names: Sequence[str]) -> str:
    """Returns the directory that holds the files. They are already on this machine."""
    return os.path.dirname(self.path) if os.path.isfile(self.path) else self.path


def dead_entries(files: Files) -> dict[str, str]:
  """The entries of a directory on this machine that are in the place of a file and cannot be read.

  Returns:
    What each is, by its name, as the rest of a sentence that begins with the name.
  """
  if not os.path.isdir(files.path):
    return {}
  names = set(files.names())
  found = {}
  for entry in os.scandir(files.path):
    if entry.name in names or os.path.isfile(entry.path):
      continue
    if os.path.isdir(entry.path):
      found[entry.name] = "is a folder"
    elif not os.path.islink(entry.path):
      found[entry.name] = "is not a regular file"
    elif os.path.exists(os.path.join(files.path, target := os.readlink(entry.path))):
      found[entry.name] = f"is a link to {target}, which is not a regular file"
    else:
      loops = "a link that leads back to itself" if _loops(entry.path) else None
      found[entry.name] = f"is {loops or f'a link to {target}, which does not exist'}"
  return found


def _loops(path: str) -> bool:
  try:
    os.stat(path)
  except OSError as error:
    return error.errno == errno.ELOOP
  return False


def has_file(files: Files, name: str) -> bool:
  """Whether there is a file of this name, also below the top level of a directory."""
  return name in files.names() or os.path.isfile(os.path.join(files.path, name))


def as_files(place: str | os.PathLike | Files) -> Files:
  """Makes `LocalFiles` of a path on this machine; returns `Files` unchanged."""
  if isinstance(place, (str, os.PathLike)):
    return LocalFiles(str(pathlib.Path(place).expanduser()))
  return place


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
  """Turns an error of the file system into a CheckpointError."""
  try:
    yield
  except OSError as error:
    # Errors of sources have no number: they say more than this would.
    if error.errno is None or isinstance(error, ModelsError):
      raise
    raise CheckpointError(where, [f"cannot be read: {error.strerror}"]) from error


@contextlib.contextmanager
def open_file(files: Files, name: str) -> Iterator[ReadRange]:
  """Opens one file and yields a function that reads ranges of its bytes.

  Files may have a method `locate(name)`, which returns the file's path, or None if the file is not on this machine.
  If there is a path, all ranges are read through a single descriptor; otherwise `files.read` reads each of them.
  """
  locate = getattr(files, "locate", None)
  path = None if locate is None else locate(name)
  if path is None:
    yield functools.partial(files.read, name)
    return
  with read_errors(path):
    file = open(path, "rb", buffering=0)  # noqa: SIM115

  def read(start: int, stop: int) -> bytes:
    with read_errors(path):
      return os.pread(file.fileno(), max(0, stop - start), start)

  with file:
    yield read


def read_ahead(files: Files, names: Sequence[str]) -> None:
  """Has the system begin to read some files into its page cache, one after another, and does not wait for it.

  A disk is idle while a load is planned. Nothing is copied, and files that are not on this machine are left out.
  """
  locate = getattr(files, "locate", lambda name: None)
  paths = [path for name in names if (path := locate(name)) is not None]
  if paths and hasattr(os, "sendfile"):
    threading.Thread(target=_drop, args=(paths, _AHEAD), daemon=True).start()


def _drop(paths: Sequence[str], nbytes: int) -> None:
  """Sends the first bytes of some files to nowhere."""
  # Where the system cannot do this, files are read when they are needed.
  with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
    for path in paths:
      if not nbytes:
        break
      with open(path, "rb") as file:
        while nbytes and (count := os.sendfile(nowhere.fileno(), file.fileno(), file.tell(), nbytes)):
          nbytes -= count
          file.seek(count, os.SEEK_CUR)


def names_in(files: Files, folder: str) -> list[str]:
  """Sorted names of the files in a folder, such as "folder/file". `files.names()` may list the top level alone."""
  found = {name for name in files.names() if name.rpartition("/")[0] == folder}
  path = os.path.join(files.path, folder)
  if os.path.isdir(path):
    with read_errors(path), os.scandir(path) as entries:
      found |= {f"{folder}/{entry.name}" for entry in entries if os.path.isfile(entry.path)}
  return sorted(found)
