"""Numbers that belong to blocks of a weight: its scales, zero points and biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

from models_core.dequantising.codes import Codes, unpack
from models_core.formats import ReadBox, TensorInfo

_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
_Kind = Literal["float", "e4m3", "e8m0", "integer"]
_ALL_BYTES = np.arange(256, dtype=np.uint8)
# What bytes stand for.
_BYTES = {
  "e4m3": _ALL_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32),
  "e8m0": _ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Grid:
  """A tensor that holds one number for each block of a weight [.., o, i].

  Attributes:
    info: the stored tensor.
    shape: the tensor's shape as blocks of the weight, [.., ceil(o / rows), ceil(i / columns)], whatever axes of size 1
      the file leaves out.
    rows: of the weight that share a number.
    columns: likewise.
    kind: what the stored elements are: floats of 16 or 32 bits, E4M3, powers of two (E8M0), or integers.
    codes: how the numbers are packed along the rows; None if each is an element of its own.
    is_inverse: whether the number divides.
    group_of: the tensor that holds the group of each column; None if the columns of a block are neighbours.
    factor: of all numbers.
  """

  info: TensorInfo
  shape: tuple[int, ...]
  rows: int
  columns: int
  kind: _Kind = "float"
  codes: Codes | None = None
  is_inverse: bool = False
  group_of: TensorInfo | None = None
  factor: float = 1.0

  @property
  def parts(self) -> tuple[TensorInfo, ...]:
    """The stored tensors."""
    return (self.info,) if self.group_of is None else (self.info, self.group_of)

  def lines(self, read: ReadBox, lead: Sequence[slice], rows: slice, columns: slice, line: int) -> np.ndarray:
    """The numbers of lines, which are parts of a row: float32 [.., R, L], or [.., R, C] if columns have their own.

    Args:
      read: reads boxes of stored tensors.
      lead: index of the axes in front of the rows.
      rows: of the weight.
      columns: of the weight, from the beginning of a line to the end of one or of the row.
      line: columns of the weight in a line.

    Raises:
      ValueError: if a number is not finite, or a group does not exist.
    """
    if self.group_of is not None:
      groups = np.array(read(self.group_of, (columns,))).astype(np.int64)
      if np.all(groups == -1):  # compressed-tensors says so that there is no order
        groups = np.arange(columns.start, columns.stop) // self.columns
      check_groups(groups, self.shape[-1], self.group_of.name)
      low, high = int(groups.min()), int(groups.max()) + 1
      across = groups - low
    else:
      low, high = columns.start // self.columns, -(-columns.stop // self.columns)
      across = np.arange(columns.start, columns.stop, line) // self.columns - low
    top, bottom = rows.start // self.rows, -(-rows.stop // self.rows)
    found = self._numbers(read, lead, slice(top, bottom), slice(low, high))
    if self.rows > 1:
      found = np.take(found, np.arange(rows.start, rows.stop) // self.rows - top, axis=-2)
    return found if self.group_of is None and self.columns == line else np.take(found, across, axis=-1)

  def _numbers(self, read: ReadBox, lead: Sequence[slice], rows: slice, columns: slice) -> np.ndarray:
    whole = tuple(along if size > 1 else slice(0, 1) for along, size in zip(lead, self.shape, strict=False))
    if self.codes is None:
      dtype = np.dtype(np.uint8) if self.kind in _BYTES else self.info.dtype
      seen = dataclasses.replace(self.info, shape=self.shape, dtype=dtype)
      numbers = as_floats(read(seen, (*whole, rows, columns)), self.kind, self.info.name)
      return numbers if self.factor == 1 else numbers * np.float32(self.factor)
    each, words = self.codes.per_word
    first = rows.start // each * words
    stop = min(-(-rows.stop // each) * words, self.info.shape[-2])
    packed = np.array(read(self.info, (*whole, slice(first, stop), columns))).view(np.uint32)
    codes = unpack(packed, dataclasses.replace(self.codes, axis=-2))
    skipped = rows.start - first // words * each
    return codes[..., skipped : skipped + rows.stop - rows.start, :].astype(np.float32)


def check_groups(groups: np.ndarray, count: int, name: str) -> None:
  """Checks the numbers of groups.

  Raises:
    ValueError: if a group does not exist.
  """
  wrong = groups[(groups < 0) | (groups >= count)]
  if wrong.size:
    raise ValueError(f"{name} holds the group {wrong[0]}, but there are {count} groups, counted from 0")


def as_floats(array: np.ndarray, kind: _Kind, name: str) -> np.ndarray:
  """The numbers of a stored tensor in float32, in memory of their own.

  Raises:
    ValueError: if one is not finite.
  """
  numbers = np.take(_BYTES[kind], array) if kind in _BYTES else array.astype(np.float32)
  if not np.all(np.isfinite(numbers)):
    raise ValueError(f"{name} holds a number that is not finite: {numbers[~np.isfinite(numbers)].flat[0]}")
  return numbers


def kind_of(info: TensorInfo, bytes_are: _Kind = "e8m0") -> _Kind:
  """What the elements of a tensor of scales are.

  Args:
    info: the tensor.
    bytes_are: what plain bytes hold.

  Raises:
    ValueError: if they are nothing that scales can be.
  """
  if info.dtype in map(np.dtype, _FLOATS):
    return "float"
  if info.dtype == ml_dtypes.float8_e4m3fn:
    return "e4m3"
  if info.dtype == ml_dtypes.float8_e8m0fnu:
    return "e8m0"
  if info.dtype == np.uint8:
    return bytes_are
  raise ValueError(f"{info.name} is {info.dtype.name}, expected scales: floating-point numbers")


def grid(info: TensorInfo, weight: str, shape: Sequence[int], block: tuple[int, int], **kinds: Any) -> Grid:
  """The grid of a stored tensor whose shape has been checked.

  Args:
    info: the stored tensor.
    weight: name of the weight.
    shape: of the weight, [.., o, i].
    block: rows and columns that share a number.
    **kinds: other fields of the grid.

  Raises:
    ValueError: if the tensor's shape is another one.
  """
  *lead, rows, columns = shape
  block = (min(block[0], rows), min(block[1], columns))
  expected = (*lead, -(-rows // block[0]), -(-columns // block[1]))
  if [n for n in info.shape if n != 1] != [n for n in expected if n != 1]:
    raise ValueError(
      f"{info.name} has shape {info.shape}, but {weight} {tuple(shape)} in blocks of {block[0]} x {block[1]} has "
      f"numbers of shape {expected}"
    )
  return Grid(info, expected, *block, **kinds)


def combined(
  factors: Sequence[Grid], read: ReadBox, lead: Sequence[slice], rows: slice, columns: slice, line: int
) -> np.ndarray:
  """The product of several scales, float32, each rounded once; the lines are those of `Grid.lines`."""
  product: np.ndarray | None = None
  for one in factors:
    lines = one.lines(read, lead, rows, columns, line)
    if product is None:
      product = lines
      continue
    if np.any(lines <= 0):
      raise ValueError(f"{one.info.name} holds {lines.min()}, expected a positive scale")
    product = product / lines if one.is_inverse else product * lines
  assert product is not None
  if not np.all(np.isfinite(product)):
    raise ValueError(
      f"the scales of {factors[0].info.name} and {factors[-1].info.name} give no finite number"
    )
  return product
