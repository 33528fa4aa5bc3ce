"""Sources of checkpoints: a model identifier becomes files.

A source is a module with one function, `open_files`. An entry point in the group `models.sources` announces it under
the name that users ask for:

    [project.entry-points."models.sources"]
    huggingface = "models_sources.huggingface"

`open_files` finds the files of an identifier, pins one version of them, and returns a `Files`. It reads no weights.
A source that can be written to has a second function, `open_target`, which returns a `Target`. Only the requested source is imported, together with its client library.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from models_sources.errors import (
  AccessError,
  ConnectionFailedError,
  CorruptFilesError,
  DiskError,
  FilesNotFoundError,
  InvalidNameError,
  MissingClientError,
  SourceError,
)

__all__ = [
  "GROUP",
  "AccessError",
  "ConnectionFailedError",
  "CorruptFilesError",
  "DiskError",
  "Draft",
  "Files",
  "FilesNotFoundError",
  "InvalidNameError",
  "MissingClientError",
  "RangeFiles",
  "Source",
  "SourceError",
  "Target",
  "WritableSource",
  "get_source",
  "source_names",
  "source_of_address",
]

if TYPE_CHECKING:
  __version__: str
else:

  def __getattr__(name: str) -> str:
    # Not read at import, because importlib.metadata takes longer than all else here.
    if name == "__version__":
      from importlib.metadata import version

      return version("models-sources")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


GROUP = "models.sources"

# URL scheme -> the source that reads its addresses.
_SCHEMES = {"gs": "gcs", "s3": "s3"}


class Files(Protocol):
  """The files of one version of one checkpoint, wherever they lie. Safe to use from several threads.

  An implementation may also have a method `locate(name) -> str | None`: the path of a file on this machine, or None if
  the file is elsewhere. Readers then open a local file once and read its header through that descriptor.
  """

  @property
  def path(self) -> str:
    """Where the files are, or where `fetch` puts them: a directory, one file, or an address."""

  @property
  def revision(self) -> str | None:
    """The version: passed to `open_files`, it gives these very files again. None if the source has no versions."""

  def names(self) -> Sequence[str]:
    """Sorted names of all files, relative to the root, with `/` between folders."""

  def size(self, name: str) -> int:
    """Bytes of a file.

    Raises:
      FilesNotFoundError: there is no such file.
    """

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer only where the file ends before `stop`.

    Raises:
      FilesNotFoundError: there is no such file.
      ConnectionFailedError: the bytes could not be read, after all retries.
    """

  def fetch(self, names: Sequence[str]) -> str:
    """Makes the named files local, complete or not at all, and returns the directory that holds them.

    Raises:
      FilesNotFoundError: some files do not exist; the message names all of them.
      ConnectionFailedError: a file could not be downloaded, after all retries.
      CorruptFilesError: a file was downloaded twice, and neither copy matches the hash that its source states.
      DiskError: the file system of this machine refuses, for example because it is full.
    """


class Source(Protocol):
  """The interface of a source module."""

  def open_files(
    self,
    identifier: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    download_path: str | None = None,
    progress: bool = True,
  ) -> Files:
    """Finds the files of an identifier and pins one version of them.

    Args:
      identifier: the source's name of a checkpoint, such as a path or a repository id.
      revision: branch, tag or commit, if the source has versions; None is the default version.
      token: of the user's account; None takes the one that the client library has saved, False sends none.
      download_path: directory that downloads are kept in; None is the client library's cache.
      progress: whether downloads may show progress bars.

    Raises:
      SourceError: a subclass whose message says what is wrong and what to do.
    """


class RangeFiles(Files, Protocol):
  """Files whose byte ranges can be read in place. Readers load weights from them without calling `fetch`."""

  def read_into(self, name: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with the bytes of a file that begin at `start`.

    Raises:
      CorruptFilesError: the file was replaced after it was opened, or ends before the buffer is full.
      ConnectionFailedError: the bytes could not be read, after all retries.
    """


class Draft(Protocol):
  """A save that is under way: data is created at once, small files wait for the commit."""

  @property
  def token(self) -> str:
    """Names the save. The name of each file that `create` makes holds it."""

  @property
  def files(self) -> Files:
    """The files that were there when the save began."""

  def create(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[bytes | memoryview], None]]:
    """A context in which a new file is written. It gives a function that takes the bytes, piece by
    piece; they must not change before the context is left."""

  def put(self, name: str, data: bytes) -> None:
    """Keeps a small file until `commit`, where it replaces one of the same name."""

  def commit(
    self, sizes: Mapping[str, int], outdated: Collection[str], conflicting: Collection[str] = ()
  ) -> None:
    """Makes the checkpoint whole in one step: readers find the old one, the new one, or an error.

    Args:
      sizes: bytes of all files that `create` made, in whatever process, by name.
      outdated: names of old files that are not kept.
      conflicting: those of them that would be read instead of the new ones.
    """

  def discard(self) -> None:
    """Removes what the save has made so far. Raises no SourceError."""


class Target(Protocol):
  """A folder that a checkpoint can be written to."""

  @property
  def path(self) -> str:
    """Its address."""

  def begin(self, *, overwrite: bool, last: str) -> Draft:
    """Begins a save.

    Args:
      overwrite: whether the folder may hold files.
      last: name of the file that is written last; without it the folder holds no checkpoint.

    Raises:
      SourceError: the folder cannot be written, or holds files and `overwrite` is false. Nothing has changed.
    """

  def join(self, token: str, last: str) -> Draft:
    """Takes part in a save that another process has begun, to create some of its files."""


@runtime_checkable
class WritableSource(Protocol):
  """A source that checkpoints can be written to."""

  def open_target(self, place: str, *, token: str | bool | None = None) -> Target:
    """Opens a folder for writing.

    Args:
      place: its address.
      token: of the user's account; None takes the platform's credentials.

    Raises:
      SourceError: a subclass whose message says what is wrong and what to do.
    """


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
  """The entry points of all installed sources, by name. A search of all packages takes as long as to plan a model."""
  return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)} | _own()


@functools.cache
def _own() -> dict[str, importlib.metadata.EntryPoint]:
  """The entry points of this package's sources, by name."""
  try:
    own = importlib.metadata.distribution("models-sources").entry_points
  except importlib.metadata.PackageNotFoundError:
    return {}
  return {point.name: point for point in own.select(group=GROUP)}


def source_names() -> tuple[str, ...]:
  """Sorted names of all installed sources. Imports none of them."""
  return tuple(sorted(_entry_points()))


def source_of_address(identifier: str) -> str | None:
  """The source of an object store's address, by its scheme: "gs://bucket/folder" -> "gcs". None for anything else."""
  scheme, separator, _ = identifier.partition("://")
  return _SCHEMES.get(scheme) if separator else None


def get_source(name: str) -> Source:
  """Imports the source module of that name, and no other.

  Raises:
    InvalidNameError: no installed package announces a source of that name.
  """
  point = _own().get(name) or _entry_points().get(name)
  if point is None:
    raise InvalidNameError(
      f"there is no source {name!r}: available are {', '.join(source_names()) or 'none'}; "
      f"another package can announce one with an entry point in the group {GROUP!r}"
    )
  return cast(Source, point.load())
