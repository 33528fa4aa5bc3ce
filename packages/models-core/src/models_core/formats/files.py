"""The files of a checkpoint, wherever they lie."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from models_core.errors import CheckpointError

# Bytes [start, stop) of one file, fewer where it ends before `stop`.
ReadRange = Callable[[int, int], bytes]


class Files(Protocol):
  """The files of one checkpoint, wherever they lie."""

  @property
  def path(self) -> str:
    """Where the files are: a directory, or the address of a store."""

  def names(self) -> Sequence[str]:
    """Names of all files, relative to the root."""

  def size(self, name: str) -> int:
    """Bytes of a file."""

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer where it ends before `stop`."""

  def fetch(self, names: Sequence[str]) -> str:
    """Makes the named files local, complete or not at all. Returns the directory that holds them."""


@runtime_checkable
class RangeFiles(Files, Protocol):
  """Files that are read where they lie, range by range, by many threads at once. All ranges are of one version."""

  def read_into(self, name: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with a file's bytes from `start` on, or raises."""


@dataclasses.dataclass(frozen=True)
class LocalFiles:
  """A directory, or one file, of this machine."""

  path: str

  def names(self) -> Sequence[str]:
    """Names of the regular files in the directory, sorted."""
    if os.path.isfile(self.path):
      return [os.path.basename(self.path)]
    if not os.path.isdir(self.path):
      raise CheckpointError(self.path, ["there is no such file or directory"])
    # Of a loop of links, the entry itself would raise.
    return sorted(entry.name for entry in os.scandir(self.path) if os.path.isfile(entry.path))

  def locate(self, name: str) -> str:
    """The path of a file by its name."""
    return self.path if os.path.isfile(self.path) else os.path.join(self.path, name)

  def size(self, name: str) -> int:
    """Bytes of a file."""
    return os.stat(self.locate(name)).st_size

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file."""
    with open(self.locate(name), "rb") as file:
      file.seek(start)
      return file.read(stop - start)

  def fetch(self, names: Sequence[str]) -> str:
    """They are here already. Returns the directory that holds them."""
    return os.path.dirname(self.path) if os.path.isfile(self.path) else self.path


def as_files(place: str | os.PathLike | Files) -> Files:
  """A path of this machine, or files as they are."""
  if isinstance(place, (str, os.PathLike)):
    return LocalFiles(str(pathlib.Path(place).expanduser()))
  return place


@contextlib.contextmanager
def open_file(files: Files, name: str) -> Iterator[ReadRange]:
  """Reads of one file: through a single descriptor where the files have a method `locate`, which gives its path.

  `locate` is optional: it returns None for a file that is not on this machine.
  """
  locate = getattr(files, "locate", None)
  path = None if locate is None else locate(name)
  if path is None:
    yield functools.partial(files.read, name)
    return
  with open(path, "rb", buffering=0) as file:
    yield lambda start, stop: os.pread(file.fileno(), max(0, stop - start), start)
