"""The interface of checkpoint readers: each reads boxes of a tensor; some formats also offer runs or cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from models_core.formats.tensors import Index, TensorInfo

# Called with the number of bytes that were just read.
OnBytes = Callable[[int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
  """Bytes of a tensor, and the memory that they go to.

  Attributes:
    info: of the tensor, which has no codec.
    start: the first of the bytes, counted from the tensor's first one.
    buffer: uint8 memory for them.
  """

  info: TensorInfo
  start: int
  buffer: np.ndarray

  @property
  def offset(self) -> int:
    """The first of the bytes, counted from the file's first one."""
    return self.info.start + self.start


class TensorReader(Protocol):
  """Reads the tensors of a checkpoint, in any number of threads at once.

  Attributes:
    where: path or address of the checkpoint, for messages.
    tensors: by name, as the headers describe them.
    chunk: number of bytes to read at a time where a read passes through scratch memory.
    threads: number of threads that make full use of the reader.
    runs: reads contiguous elements; None where the format does not store tensors contiguously.
    cells: reads cells front to back; None where the format does not store tensors in cells.
  """

  where: str
  tensors: Mapping[str, TensorInfo]
  chunk: int
  threads: int

  @property
  def runs(self) -> RunReader | None:
    """Reads contiguous elements; None where the format does not store tensors contiguously."""

  @property
  def cells(self) -> CellReader | None:
    """Reads cells front to back; None where the format does not store tensors in cells."""

  def read_box(self, info: TensorInfo, index: Index) -> np.ndarray:
    """Reads and decodes one box of a tensor.

    Args:
      info: of the tensor.
      index: of the box, one slice for each axis.

    Returns:
      An array of the box's shape, valid until this thread's next call.
    """

  def parts(self, info: TensorInfo) -> Iterator[np.ndarray]:
    """Yields all elements of a tensor, a few megabytes at a time. Each array is valid until the next one."""

  def close(self) -> None:
    """Closes the files and stops the threads. No read may be running."""


class RunReader(Protocol):
  """Reads tensors whose elements are contiguous in a file.

  `element` is a tensor's element counted in row-major order: (2, 3) of a tensor [8, 16] is element 35.
  """

  def read_into(self, info: TensorInfo, element: int, target: np.ndarray) -> None:
    """Fills `target`, contiguous memory of the tensor's dtype, with the elements from `element` on."""

  def read_extents(self, extents: Sequence[Extent]) -> None:
    """Fills the buffers of some extents, in the order in which they lie in files. Neighbours are read together."""

  def read_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray:
    """Reads and decodes `count` elements from `element` on; the array [count] is valid until this thread's next call.

    Both numbers are multiples of the block size where the tensor has a codec.
    """

  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Maps `count` elements from `element` on as read-only memory; None where the file cannot be mapped.

    The memory stays valid as long as an array refers to it.
    """


class CellReader(Protocol):
  """Reads tensors that are stored as grids of cells, each of which is compressed by itself.

  For example, a tensor [1024, 768] in cells of [256, 256] has a grid of 4 x 3 cells, and its last cell is at (3, 2).

  Attributes:
    run: number of bytes of a cell to decode at a time.
  """

  run: int

  def has_streams(self, info: TensorInfo) -> bool:
    """Whether `open_cell` can read the cells of a tensor."""

  def open_cell(self, info: TensorInfo, position: tuple[int, ...]) -> Cell:
    """Opens the cell at a position of the tensor's grid, for use by one thread."""


class Cell(Protocol):
  """The decoded bytes of one cell, read front to back."""

  def read_into(self, start: int, target: np.ndarray) -> None:
    """Fills contiguous memory with the bytes from `start` on, which must not be before the end of the last read."""
