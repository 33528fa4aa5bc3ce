"""Where checkpoints are saved: a directory of this machine, or the folder that an address names in a source."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import cast

import models_sources
from models_automodel.errors import SaveError, source_errors
from models_core.formats import Files, as_files
from models_core.saving import CONFIG, Place, check_directory, check_target, path_of

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def open_target(place: str | os.PathLike, *, token: str | bool | None = None) -> Place:
  """The place that a path or an address names. Nothing is read or written.

  Args:
    place: path of a directory, or an address such as gs://bucket/folder. A `pathlib.Path` is always a directory.
    token: of the user's account.

  Raises:
    MissingExtraError: if the client of the source is not installed.
    SaveError: if the address is of no source that can be written to.
  """
  path = os.fspath(place)
  if not isinstance(place, str) or (match := _SCHEME.match(path)) is None or match[1].lower() == "file":
    return path
  name = models_sources.source_of_address(path) or match[1]
  if name == "hf":
    raise SaveError(
      f"{path} cannot be written in place: save to a directory, then `models_automodel.upload` it"
    )
  if name not in models_sources.source_names():
    raise SaveError(
      f"{path} cannot be written: there is no source for addresses {match[0]}; save to a directory, or to gs:// or s3://"
    )
  with source_errors():
    source = models_sources.get_source(name)
  if not isinstance(source, models_sources.WritableSource):
    raise SaveError(
      f"{path} cannot be written: the source {name!r} is only read; save to a directory, or to gs:// or s3://"
    )
  with source_errors(), _save_errors():
    return _Target(source.open_target(path, token=token))


def check_place(place: Place, *, overwrite: bool = False) -> None:
  """Checks whether a checkpoint can be saved, before it is loaded or made. Leaves nothing behind.

  Raises:
    SaveError: if it cannot.
  """
  if isinstance(place, str | os.PathLike):
    check_directory(path_of(place), overwrite=overwrite)
  else:
    check_target(place, overwrite=overwrite, last=CONFIG)


def files_at(place: str | os.PathLike, *, token: str | bool | None = None) -> Files:
  """The files of a checkpoint at a path of this machine, or at an address.

  Raises:
    SourceFilesError: if there is nothing at the address, or it cannot be read.
  """
  name = models_sources.source_of_address(place) if isinstance(place, str) else None
  if name is None:
    return as_files(place)
  with source_errors():
    return cast(Files, models_sources.get_source(name).open_files(cast(str, place), token=token))


@contextlib.contextmanager
def _save_errors() -> Iterator[None]:
  """Turns an error of a source into a SaveError."""
  try:
    yield
  except models_sources.SourceError as error:
    raise SaveError(str(error), error.errno) from error


@dataclasses.dataclass(frozen=True)
class _Target:
  """A target of a source, with the errors of this package."""

  target: models_sources.Target

  @property
  def path(self) -> str:
    return self.target.path

  def begin(self, *, overwrite: bool, last: str) -> _Draft:
    with _save_errors():
      return _Draft(self.target.begin(overwrite=overwrite, last=last))

  def join(self, token: str, last: str) -> _Draft:
    with _save_errors():
      return _Draft(self.target.join(token, last))


@dataclasses.dataclass(frozen=True)
class _Draft:
  """A draft of a source, with the errors of this package."""

  draft: models_sources.Draft

  @property
  def token(self) -> str:
    return self.draft.token

  @property
  def files(self) -> Files:
    return cast(Files, self.draft.files)

  @contextlib.contextmanager
  def create(self, name: str, nbytes: int) -> Iterator[Callable[[bytes | memoryview], None]]:
    with _save_errors():
      context = self.draft.create(name, nbytes)
      put = context.__enter__()

    def write(data: bytes | memoryview) -> None:
      with _save_errors():
        put(data)

    try:
      yield write
    except BaseException as error:
      # An error of the block may be one of the source that is read: it stays as it is.
      context.__exit__(type(error), error, error.__traceback__)
      raise
    with _save_errors():
      context.__exit__(None, None, None)

  def put(self, name: str, data: bytes) -> None:
    self.draft.put(name, data)

  def commit(
    self, sizes: Mapping[str, int], outdated: Collection[str], conflicting: Collection[str] = ()
  ) -> None:
    with _save_errors():
      self.draft.commit(sizes, outdated, conflicting)

  def discard(self) -> None:
    self.draft.discard()
