"""What readers of checkpoints offer: boxes of any tensor, and more where a format allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from models_core.formats.tensors import Index, TensorInfo

OnBytes = Callable[[int], None]


class TensorReader(Protocol):
  """The tensors of a checkpoint, for many threads at once.

  Attributes:
    tensors: as the headers described them, by name.
    chunk: bytes of a read that passes through scratch memory.
    threads: that keep it busy.
    runs: reads of contiguous elements; None where tensors are not stored so.
    cells: reads of cells front to back; None where tensors are not stored in cells.
  """

  tensors: Mapping[str, TensorInfo]
  chunk: int
  threads: int

  @property
  def runs(self) -> RunReader | None:
    """Reads of contiguous elements."""

  @property
  def cells(self) -> CellReader | None:
    """Reads of cells front to back."""

  def read_box(self, info: TensorInfo, index: Index) -> np.ndarray:
    """The elements of a tensor within an index of one slice an axis, decoded; valid until this thread's next call."""

  def parts(self, info: TensorInfo) -> Iterator[np.ndarray]:
    """All elements of a tensor, a few megabytes at a time; each part is valid until the next one."""

  def check_equal(self, name: str, twin: str, part: int = 0, parts: int = 1) -> None:
    """Compares two tensors' numbers, or one of some parts of them.

    Raises:
      CheckpointError: if they differ.
    """

  def close(self) -> None:
    """Lets go of files and threads. No read may be under way."""


class RunReader(Protocol):
  """Tensors whose elements are contiguous bytes of a file each."""

  def read_into(self, info: TensorInfo, element: int, target: np.ndarray) -> None:
    """Elements from `element` on, into contiguous memory of the same dtype."""

  def read_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray:
    """Elements, decoded; valid until this thread's next call."""

  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Elements as read-only memory that lives as long as an array refers to it; None where there is no such memory."""


class CellReader(Protocol):
  """Tensors that are stored as grids of cells, each compressed by itself.

  Attributes:
    run: bytes of a cell that are decoded at a time.
  """

  run: int

  def has_streams(self, info: TensorInfo) -> bool:
    """Whether the cells of a tensor can be read by `open_cell`."""

  def open_cell(self, info: TensorInfo, position: tuple[int, ...]) -> Cell:
    """The cell at a position of a tensor's grid, for one thread."""


class Cell(Protocol):
  """The elements of a cell as bytes, front to back."""

  def read_into(self, start: int, target: np.ndarray) -> None:
    """Fills contiguous memory from byte `start` on, which lies behind all that was read."""
