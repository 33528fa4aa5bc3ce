"""The base of a saved model: the files that it was loaded from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

from models_core.dequantising import dequantised
from models_core.formats import Checkpoint, Files, Format, TensorReader, as_files
from models_core.saving.plan import SavedTensor


@dataclasses.dataclass(frozen=True)
class Base:
  """The files that a model was loaded from. They decide what the configuration and the parameters leave open.

  Attributes:
    files: the files, such as config.json and those of the tokenizer.
    checkpoint: the headers of the weights; None if there are none in the expected format.
    reader: returns a reader of the checkpoint that is open already. If it is None, a reader is opened for the tensors
      that are copied.
  """

  files: Files
  checkpoint: Checkpoint | None = None
  reader: Callable[[], TensorReader] | None = None

  @classmethod
  def of(cls, place: str | os.PathLike | Files, format: Format) -> Base:
    """The base at a path. Headers are read if it holds a checkpoint in the given format; quantised weights are plain ones.

    Args:
      place: path of a directory or file, or files.
      format: the format to look for.

    Raises:
      CheckpointError: if the path does not exist, or its headers are broken.
    """
    files = as_files(place)
    return cls(files, dequantised(format.read(files)) if format.is_in(files) else None)

  def in_format(self, format: Format) -> Checkpoint | None:
    """The checkpoint if it is in this format, otherwise None: tensors are copied only between files of one format."""
    return self.checkpoint if self.checkpoint is not None and self.checkpoint.format is format else None

  @contextlib.contextmanager
  def open_reader(self, tensors: Sequence[SavedTensor]) -> Iterator[TensorReader | None]:
    """Opens a reader for the tensors that are copied from the base; None if there are none."""
    names = sorted({tensor.copied.file for tensor in tensors if tensor.copied is not None})
    if not names:
      yield None
    elif self.reader is not None:
      yield self.reader()
    else:
      assert self.checkpoint is not None
      with contextlib.closing(self.checkpoint.open(names)) as reader:
        yield reader
