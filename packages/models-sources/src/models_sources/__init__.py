"""Where checkpoints lie: a model identifier becomes files.

A source is a module with one function, `open_files`, announced by an entry point of the group `models.sources`
under the name that users ask for:

    [project.entry-points."models.sources"]
    huggingface = "models_sources.huggingface"

`open_files` finds the files of an identifier, pins one version of them, and returns a `Files`. It reads no weights.
Only the source that is asked for is imported, and with it the client library that it needs.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Protocol, cast

from models_sources.errors import (
  AccessError,
  ConnectionFailedError,
  CorruptFilesError,
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
  "Files",
  "FilesNotFoundError",
  "InvalidNameError",
  "MissingClientError",
  "RangeFiles",
  "Source",
  "SourceError",
  "get_source",
  "source_names",
  "source_of_address",
]

GROUP = "models.sources"

# Schemes of addresses, and the sources that read them.
_SCHEMES = {"gs": "gcs", "s3": "s3"}


class Files(Protocol):
  """The files of one version of one checkpoint, wherever they lie. Safe to use from several threads.

  A method `locate(name) -> str | None` is optional: the path of a file on this machine, None where it lies elsewhere.
  Then a header is read through one descriptor.
  """

  @property
  def path(self) -> str:
    """Where the files are, or where `fetch` puts them: a directory, or one file."""

  @property
  def revision(self) -> str | None:
    """What, as `open_files`' argument, gives these very files again; None where a source has no versions."""

  def names(self) -> Sequence[str]:
    """Names of all files, relative to the root, with `/` between folders, sorted."""

  def size(self, name: str) -> int:
    """Bytes of a file.

    Raises:
      FilesNotFoundError: there is no such file.
    """

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer only where the file ends before `stop`.

    Raises:
      FilesNotFoundError: there is no such file.
      ConnectionFailedError: the bytes did not come, after all retries.
    """

  def fetch(self, names: Sequence[str]) -> str:
    """Makes the named files local, complete or not at all. Returns the directory that holds them.

    Raises:
      FilesNotFoundError: naming every file that there isn't.
      ConnectionFailedError: a file did not come, after all retries.
      CorruptFilesError: a file came twice with other bytes than its source promises.
    """


class Source(Protocol):
  """What a source module offers."""

  def open_files(
    self,
    identifier: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    download_path: str | None = None,
    progress: bool = True,
  ) -> Files:
    """Finds the files of an identifier.

    Args:
      identifier: what the source calls a checkpoint: a path, a repository's name.
      revision: branch, tag or commit, where the source has versions; None is its default one.
      token: of the user's account; None takes the one that the client library has saved, False sends none.
      download_path: directory below which downloads are kept; None is the client library's cache.
      progress: False shows no progress bars.

    Raises:
      SourceError: a subclass that says what is missing and what to do.
    """


class RangeFiles(Files, Protocol):
  """Files that can also be read where they lie: then nothing is fetched that a reader reads by ranges."""

  def read_into(self, name: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with a file's bytes from `start` on.

    Raises:
      CorruptFilesError: the file was replaced since it was opened, or ends before the buffer does.
      ConnectionFailedError: the bytes did not come, after all retries.
    """


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
  return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def source_names() -> tuple[str, ...]:
  """Names of all installed sources, sorted. Imports none of them."""
  return tuple(sorted(_entry_points()))


def source_of_address(identifier: str) -> str | None:
  """The source that an address of a store names by its scheme: "gs://bucket/folder" -> "gcs". None for all else."""
  scheme, separator, _ = identifier.partition("://")
  return _SCHEMES.get(scheme) if separator else None


def get_source(name: str) -> Source:
  """The source module of that name. Only this one is imported.

  Raises:
    InvalidNameError: no installed package announces it.
  """
  if name not in _entry_points():
    raise InvalidNameError(
      f"there is no source {name!r}: available are {', '.join(source_names()) or 'none'}; "
      f"another package can announce one by an entry point of the group {GROUP!r}"
    )
  return cast(Source, _entry_points()[name].load())
