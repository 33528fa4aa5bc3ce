"""A tensor of a checkpoint as its header describes it: where its bytes are, and how they encode its elements."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# One slice for each axis, without steps, such as `(slice(0, 128), slice(64, 192))` of a tensor [4096, 4096].
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Codec:
  """How a file encodes a quantised tensor: as blocks of elements along the last axis.

  For example, Q8_0 encodes 32 elements in 34 bytes, so a tensor [2, 64] takes four blocks, 136 bytes.

  Attributes:
    name: of the encoding, such as "Q8_0".
    block_size: number of elements in a block.
    block_bytes: number of bytes in a block.
    decode: uint8 [n * block_bytes] -> float32 [n * block_size].
  """

  name: str
  block_size: int
  block_bytes: int
  decode: Callable[[np.ndarray], np.ndarray]


# Reads one box of a stored tensor; the array is valid until the thread's next call.
ReadBox = Callable[["TensorInfo", Index], np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
  """How several stored tensors make one, such as the codes and the scales of a quantised weight.

  Attributes:
    name: of the encoding, such as "FP8 128x128".
    parts: the stored tensors.
    decode: reads the parts of a box of the tensor that they make, and decodes them; the array is the caller's own.
      Raises ValueError with a sentence that names the stored tensor if its numbers are impossible.
  """

  name: str
  parts: tuple[TensorInfo, ...]
  decode: Callable[[ReadBox, Index], np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
  """A tensor of a checkpoint, as its header describes it.

  Attributes:
    name: the tensor's name in the file.
    dtype: of the elements; for a quantised tensor, of the decoded elements.
    shape: of the tensor, slowest axis first.
    file: name of the file that holds the tensor.
    start: offset of the tensor's first byte in the file; 0 for a tensor that is stored in cells.
    stop: `start` plus the tensor's size in bytes; for a tensor that is stored in cells, its decoded size.
    codec: of a quantised tensor; None where the bytes are the elements themselves.
    cell: shape of the cells that the tensor is stored in; None where its elements are contiguous in the file.
    packing: of a tensor that several stored ones make; `file`, `start` and `stop` are those of the first then.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  file: str
  start: int
  stop: int
  codec: Codec | None = None
  cell: tuple[int, ...] | None = None
  packing: Packing | None = None

  @property
  def stored(self) -> tuple[TensorInfo, ...]:
    """The stored tensors that make this one: itself, if it is one of them."""
    return (self,) if self.packing is None else self.packing.parts

  @property
  def encoding(self) -> str | None:
    """What a quantised tensor's encoding is called; None where the bytes are the elements themselves."""
    return self.codec.name if self.codec else self.packing.name if self.packing else None

  @property
  def everything(self) -> Index:
    """The index of the whole tensor."""
    return tuple(slice(0, size) for size in self.shape)


def bounds_of(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
  """The bounds `(start, stop)` of an index along each axis of an array.

  For example, `bounds_of((slice(None), slice(64, 192)), (128, 256))` is `((0, 128), (64, 192))`.

  Args:
    index: one slice for each axis, without steps; `slice(None)` is the whole axis.
    shape: of the array.

  Raises:
    ValueError: if the index and the shape differ in their number of axes.
  """
  return tuple(along.indices(size)[:2] for along, size in zip(index, shape, strict=True))


def cells_of(shape: Sequence[int], cell: Sequence[int]) -> Iterator[Index]:
  """Yields the index of each cell of a tensor, in row-major order.

  Cells at the end of an axis stop where the tensor does: a tensor [5] in cells of [2] gives 0:2, 2:4 and 4:5.

  Args:
    shape: of the tensor.
    cell: shape of a full cell.

  Raises:
    ValueError: if the two shapes differ in their number of axes.
  """
  steps = [range(0, size, max(1, step)) for size, step in zip(shape, cell, strict=True)]
  for corner in itertools.product(*steps):
    yield tuple(slice(at, min(at + axis.step, axis.stop)) for at, axis in zip(corner, steps, strict=True))
