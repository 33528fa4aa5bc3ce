"""Places outside this machine's file system that checkpoints are written to, such as folders of object stores.

A source of files provides a `Target`; this package knows only the interface. Data goes up as streams, under names that
no other save uses. The small files beside it, such as config.json, wait for the commit, which puts the file that makes a
checkpoint of the folder last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from models_core.errors import SaveError
from models_core.formats import INDEX, ORBAX, SINGLE, Files, safetensors_entries
from models_core.saving.plan import SavedFile, index_of, numbered


class Draft(Protocol):
  """A save to a target that is under way."""

  @property
  def token(self) -> str:
    """Names the save: letters and digits. The name of each file that `create` makes holds it."""

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
    """Removes what the save has made so far."""


class Target(Protocol):
  """A folder outside this machine's file system. Its errors are SaveErrors."""

  @property
  def path(self) -> str:
    """Its address."""

  def begin(self, *, overwrite: bool, last: str) -> Draft:
    """Begins a save.

    Args:
      overwrite: whether the folder may hold files.
      last: name of the file that is written last; without it the folder holds no checkpoint.

    Raises:
      SaveError: if the folder cannot be written, or holds files and `overwrite` is false. Nothing has changed.
    """

  def join(self, token: str, last: str) -> Draft:
    """Takes part in a save that another process has begun, to create some of its files."""


# Where a checkpoint is saved: a directory of this machine, or a target that a source provides.
Place: TypeAlias = str | os.PathLike | Target


def path_of(place: Place) -> str:
  """The path or address of a place."""
  return os.fspath(place) if isinstance(place, str | os.PathLike) else place.path


def check_target(target: Target, *, overwrite: bool, last: str) -> None:
  """Begins a save and discards it, which shows whether the target can be written.

  Raises:
    SaveError: if it cannot.
  """
  target.begin(overwrite=overwrite, last=last).discard()


@contextlib.contextmanager
def draft_of(target: Target, files: Sequence[SavedFile], *, overwrite: bool, last: str) -> Iterator[Draft]:
  """Gives a draft of a safetensors checkpoint, which is committed if the block succeeds and discarded otherwise.

  Args:
    target: where it is saved.
    files: all files of weights, which `named_for` names and the block creates.
    overwrite: whether the target may hold files. Weights are replaced, all others stay.
    last: name of the file that is written last.

  Raises:
    SaveError: if the target cannot be written, or holds an Orbax tree.
  """
  draft = target.begin(overwrite=overwrite, last=last)
  try:
    old = draft.files
    if ORBAX.is_in(old):
      raise SaveError(
        f"{target.path} holds an Orbax tree, which would stay beside the new checkpoint: remove it, or give another "
        "address"
      )
    outdated = safetensors_entries(old)
    yield draft
    named = named_for(draft, files)
    draft.put(INDEX, index_of(named))
    # transformers reads the single file even if there is an index.
    draft.commit({file.name: file.nbytes for file in named}, outdated, {SINGLE} & outdated)
  except BaseException:
    draft.discard()
    raise


def named_for(draft: Draft, files: Sequence[SavedFile]) -> list[SavedFile]:
  """The files under names that only this save uses, so that an old checkpoint stays whole until the commit."""
  return numbered([file.tensors for file in files], draft.token)


def put_files(target: Target, files: Mapping[str, bytes], *, overwrite: bool, last: str) -> None:
  """Saves files that fit into memory, such as those of an adapter. Files of other names stay.

  Args:
    target: where they are saved.
    files: their contents, by name.
    overwrite: whether the target may hold files.
    last: name of the file that is written last.

  Raises:
    SaveError: if the target cannot be written.
  """
  draft = target.begin(overwrite=overwrite, last=last)
  try:
    for name, data in files.items():
      draft.put(name, data)
    draft.commit({}, ())
  except BaseException:
    draft.discard()
    raise
