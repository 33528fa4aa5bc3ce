"""The files that a saved model came from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

from models_core.formats import Checkpoint, Files, Format, TensorReader, as_files
from models_core.saving.plan import SavedTensor


@dataclasses.dataclass(frozen=True)
class Base:
  """The files that a model came from. What a configuration and parameters leave open is written as they have it.

  Attributes:
    files: with config.json, and the files that are copied.
    checkpoint: what its headers say, where they were read.
    reader: gives a reader of the checkpoint that is open anyway; without it one is opened for the tensors that are
      copied.
  """

  files: Files
  checkpoint: Checkpoint | None = None
  reader: Callable[[], TensorReader] | None = None

  @classmethod
  def of(cls, place: str | os.PathLike | Files, format: Format) -> Base:
    """The files of a place. Headers are read where a checkpoint in this format is there.

    Raises:
      CheckpointError: if there is no such place.
    """
    files = as_files(place)
    return cls(files, format.read(files) if format.is_in(files) else None)

  def in_format(self, format: Format) -> Checkpoint | None:
    """The checkpoint, if it is in this format: no other one's tensors can be repeated in such files."""
    return self.checkpoint if self.checkpoint is not None and self.checkpoint.format is format else None

  @contextlib.contextmanager
  def open_reader(self, tensors: Sequence[SavedTensor]) -> Iterator[TensorReader | None]:
    """A reader of the tensors that are copied; None where none is."""
    names = sorted({tensor.copied.file for tensor in tensors if tensor.copied is not None})
    if not names:
      yield None
    elif self.reader is not None:
      yield self.reader()
    else:
      assert self.checkpoint is not None
      with contextlib.closing(self.checkpoint.open(names)) as reader:
        yield reader
