"""A checkpoint as other rooms see it: named tensors in files of one format, and a reader of them."""

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
  """The fingerprint of a file's header. Comparing it detects a file that has changed since its header was read.

  Attributes:
    nbytes: length of the header in bytes, from the file's first byte on.
    digest: BLAKE2b digest of these bytes.
  """

  nbytes: int
  digest: bytes

  @classmethod
  def of(cls, data: bytes) -> Header:
    """Computes the fingerprint of a header from its bytes."""
    return cls(len(data), hashlib.blake2b(data, digest_size=16).digest())


@dataclasses.dataclass(frozen=True)
class Format:
  """A file format of checkpoints.

  Attributes:
    name: such as "safetensors".
    naming: naming scheme of the format's tensors, which is the key of a family's weight table.
    dialects: other naming schemes in which files of this format may be.
    owns: whether a file of this name holds weights in this format.
    is_in: whether the files include a checkpoint in this format. May read the first bytes of some of them.
    read: reads the headers of the files' checkpoint.
    entries: a directory -> names of the files and folders in it that belong to its checkpoint in this format. A new
      checkpoint that is saved to the directory replaces them.
    keeps_own_names: whether files in this format may name tensors as the model names its parameters. They do in the
      format's naming scheme, too, if the family has no weight table for it.
  """

  name: str
  naming: str
  owns: Callable[[str], bool]
  is_in: Callable[[Files], bool]
  read: Callable[[Files], Checkpoint]
  entries: Callable[[str], Set[str]]
  dialects: tuple[str, ...] = ()
  keeps_own_names: bool = False


@dataclasses.dataclass(frozen=True)
class Checkpoint(abc.ABC):
  """Everything that the headers of a checkpoint say. No tensor data has been read.

  Attributes:
    files: of the checkpoint.
    tensors: by name.
    metadata: entries of the headers besides tensors, such as the keys of a GGUF file.
    problems: errors in the headers, one sentence each. They are reported together with tensors that do not fit a model.
    notes: on files that are left out, one sentence each.
    shared_files: names of the files that are needed whichever tensors are read.
    unread: names of the files whose headers could not be read, with the tensors that each should hold; None if nothing
      tells. A tensor that may be in one of them is not missing.
  """

  files: Files
  tensors: Mapping[str, TensorInfo]
  metadata: Mapping[str, object] = dataclasses.field(default_factory=dict)
  problems: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  shared_files: tuple[str, ...] = ()
  unread: Mapping[str, frozenset[str] | None] = dataclasses.field(default_factory=dict)

  def may_hold(self, tensor: str) -> bool:
    """Whether a tensor may be in a file whose header could not be read."""
    return any(held is None or tensor in held for held in self.unread.values())

  @property
  @abc.abstractmethod
  def format(self) -> Format:
    """The format of the files."""

  @abc.abstractmethod
  def open(self, names: Sequence[str], on_bytes: OnBytes = lambda count: None) -> TensorReader:
    """Opens the files and returns a reader of the tensors, which any number of threads may use at once.

    Args:
      names: of the files to read. Files that are neither on this machine nor readable in place are fetched first.
      on_bytes: called with the number of bytes that were just read, from several threads.

    Raises:
      CheckpointError: if a file has changed since its header was read.
    """
