"""A tensor of a checkpoint as its header describes it: where its bytes lie, and how numbers are stored in them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Bounds along each axis, one slice an axis.
Index = tuple[slice, ...]


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

  @property
  def everything(self) -> Index:
    """The index of all elements."""
    return tuple(slice(0, size) for size in self.shape)


def bounds_of(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
  """The first element of an index and the one past its last, along each axis of an array.

  Args:
    index: without steps; `slice(None)` is the whole axis.
    shape: of the array.
  """
  return tuple(along.indices(size)[:2] for along, size in zip(index, shape, strict=True))


def cells_of(shape: Sequence[int], cell: Sequence[int]) -> Iterator[Index]:
  """The cells of a tensor, those at its ends cut off.

  Args:
    shape: of the tensor.
    cell: of all others.
  """
  steps = [range(0, size, max(1, step)) for size, step in zip(shape, cell, strict=True)]
  for corner in itertools.product(*steps):
    yield tuple(slice(at, min(at + axis.step, axis.stop)) for at, axis in zip(corner, steps, strict=True))
