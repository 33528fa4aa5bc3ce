"""What a checkpoint is to the rest of the house: named tensors, each a byte range of a file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from models_core.errors import CheckpointError


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
    """They are here already."""
    return self.path


@dataclasses.dataclass(frozen=True, slots=True)
class Codec:
  """How a file stores numbers that are no array: blocks along the last axis.

  Attributes:
    name: of the encoding, such as "Q4_1".
    block_size: elements of a block.
    block_bytes: bytes of a block.
    decode: uint8 [n * block_bytes] -> float32 [n * block_size].
  """

  name: str
  block_size: int
  block_bytes: int
  decode: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
  """A tensor of a checkpoint, as its header tells it.

  Attributes:
    name: as the file spells it.
    dtype: of the elements; of a quantised tensor, what decoding gives.
    shape: slowest axis first.
    file: the file's name.
    start: first byte of its data within the file.
    stop: one past the last byte.
    codec: set where the bytes are not the elements themselves.
    cell: shape of the parts that are stored as one each; None where the elements are a run of bytes.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  file: str
  start: int
  stop: int
  codec: Codec | None = None
  cell: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """All that the headers of a checkpoint say. No tensor data has been read.

  Attributes:
    files: where the bytes come from.
    dialect: which of a family's weight tables its names follow ("huggingface", "gguf", "orbax").
    tensors: by name.
    metadata: what the headers hold besides tensors.
    problems: what is wrong with the headers themselves; reported together with what doesn't fit a model.
    shared_files: names of files that are needed whichever tensors are read.
    open_reader: `(checkpoint, names of files, on_bytes) -> reader`, where tensors are no runs of bytes.
  """

  files: Files
  dialect: str
  tensors: Mapping[str, TensorInfo]
  metadata: Mapping[str, object] = dataclasses.field(default_factory=dict)
  problems: tuple[str, ...] = ()
  shared_files: tuple[str, ...] = ()
  open_reader: Callable[..., Any] | None = None


def as_files(place: str | os.PathLike | Files) -> Files:
  """A path of this machine, or files as they are."""
  if isinstance(place, (str, os.PathLike)):
    return LocalFiles(str(pathlib.Path(place).expanduser()))
  return place
