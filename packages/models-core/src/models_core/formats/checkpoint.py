"""What a checkpoint is to the rest of the house: named tensors in files of one format, and a reader of them."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence, Set

from models_core.formats.files import Files
from models_core.formats.reader import OnBytes, TensorReader
from models_core.formats.tensors import TensorInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
  """What identifies a header that was read, so that a file which was replaced meanwhile is found out.

  Attributes:
    nbytes: of the header, from the file's first byte on.
    digest: of these bytes.
  """

  nbytes: int
  digest: bytes

  @classmethod
  def of(cls, data: bytes) -> Header:
    """Of a file's first bytes."""
    return cls(len(data), hashlib.blake2b(data, digest_size=16).digest())


@dataclasses.dataclass(frozen=True)
class Format:
  """A kind of files that hold checkpoints.

  Attributes:
    name: such as "safetensors".
    naming: the naming scheme of its tensors, the key of a family's weight table.
    keeps_own_names: a family without a table for the naming scheme has its parameters' own names in such files.
    owns: whether a file of this name holds weights in this format.
    is_in: whether files hold a checkpoint of this format. May read the first bytes of some.
    read: reads the headers.
    entries: a directory -> names of the files and folders in it that make up its checkpoint: those that a new one
      takes the place of.
  """

  name: str
  naming: str
  owns: Callable[[str], bool]
  is_in: Callable[[Files], bool]
  read: Callable[[Files], Checkpoint]
  entries: Callable[[str], Set[str]]
  keeps_own_names: bool = False


@dataclasses.dataclass(frozen=True)
class Checkpoint(abc.ABC):
  """All that the headers of a checkpoint say. No tensor data has been read.

  Attributes:
    files: where the bytes come from.
    tensors: by name.
    metadata: what the headers hold besides tensors.
    problems: what is wrong with the headers themselves; reported together with what doesn't fit a model.
    shared_files: names of files that are needed whichever tensors are read.
  """

  files: Files
  tensors: Mapping[str, TensorInfo]
  metadata: Mapping[str, object] = dataclasses.field(default_factory=dict)
  problems: tuple[str, ...] = ()
  shared_files: tuple[str, ...] = ()

  @property
  @abc.abstractmethod
  def format(self) -> Format:
    """What kind of files these are."""

  @abc.abstractmethod
  def open(self, names: Sequence[str], on_bytes: OnBytes = lambda count: None) -> TensorReader:
    """A reader of the tensors, for many threads at once.

    Args:
      names: of the files that will be read. They are fetched where they lie elsewhere and cannot be read there.
      on_bytes: called with the number of bytes that were read, from several threads.

    Raises:
      CheckpointError: if a file is not what its header described.
    """
