"""Weights that several stored tensors make: how the codes lie in the files, and how a box of them is decoded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from models_core.dequantising.codes import TABLE4, Codes, decode, unpack, words_of
from models_core.dequantising.grids import Grid, check_groups, combined
from models_core.formats import Index, ReadBox, TensorInfo


@dataclasses.dataclass(frozen=True)
class Rows:
  """A weight [.., o, i] whose codes are packed along its rows, as in most formats.

  Rows are decoded in lines, which are as long as the smallest block of scales.

  Attributes:
    shape: of the weight.
    codes: how its numbers are stored.
    words: the tensor of codes, [.., o, W].
    line: number of columns in a line; codes of a line fill whole words of 32 bits.
    scales: factors of each number's scale.
    zero: what is subtracted from each code: one number, or one for each block.
    biases: what is added to each number at last.
  """

  shape: tuple[int, ...]
  codes: Codes
  words: TensorInfo
  line: int
  scales: tuple[Grid, ...]
  zero: Grid | float = 0.0
  biases: Grid | None = None

  @property
  def parts(self) -> tuple[TensorInfo, ...]:
    """The stored tensors, that of the codes first."""
    grids = [*self.scales, self.zero, self.biases]
    others = [part for grid in grids if isinstance(grid, Grid) for part in grid.parts]
    return tuple(dict.fromkeys((self.words, *others)))

  @property
  def cell(self) -> tuple[int, ...]:
    """The shape of what should be decoded together."""
    return (*(1 for _ in self.shape[1:]), min(self.line, self.shape[-1]))

  def read(self, read: ReadBox, index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads and decodes a box of the weight: bfloat16 for that dtype, otherwise float32."""
    *lead, rows, wanted = index
    first = wanted.start // self.line
    lines = -(-wanted.stop // self.line) - first
    columns = slice(first * self.line, min((first + lines) * self.line, self.shape[-1]))
    shape = [*(s.stop - s.start for s in (*lead, rows)), lines * self.line]
    scale = self._by_line(combined(self.scales, read, lead, rows, columns, self.line), lines)
    zero = bias = None
    if isinstance(self.zero, Grid):
      zero = self._by_line(self.zero.lines(read, lead, rows, columns, self.line), lines)
    elif self.zero:
      zero = np.full((1, 1), self.zero, np.float32)
    if self.biases is not None:
      bias = self._by_line(self.biases.lines(read, lead, rows, columns, self.line), lines)
    codes, words = self._words(read, (*lead, rows), columns, lines)
    numbers = decode(codes, dtype, words, scale, zero, bias).reshape(shape)
    return numbers[..., wanted.start - columns.start : wanted.stop - columns.start]

  def _by_line(self, numbers: np.ndarray, lines: int) -> np.ndarray:
    """One number for each line, [N, 1], or one for each column, [N, line]."""
    if numbers.shape[-1] == lines:
      return np.ascontiguousarray(numbers).reshape(-1, 1)
    return _wider(numbers, lines * self.line).reshape(-1, self.line)

  def _words(self, read: ReadBox, rows: Index, columns: slice, lines: int) -> tuple[Codes, np.ndarray]:
    """The words of lines, and how codes lie in them: uint8 [N, line] for codes of 8 bits, otherwise uint32 [N, W]."""
    codes, unit = self.codes, 8 * self.words.dtype.itemsize
    each, words = codes.per_word if unit == 32 else (unit // codes.bits, 1)
    first, stop = columns.start // each * words, -(-columns.stop // each) * words
    stored = read(self.words, (*rows, slice(first, min(stop, self.words.shape[-1]))))
    if codes.crosses or self.line * codes.bits % max(unit, 32 if codes.bits < 8 else 8):
      skipped = columns.start - first // words * each
      stored = unpack(np.ascontiguousarray(stored).view(np.uint32), codes)
      stored = stored[..., skipped : skipped + columns.stop - columns.start]
      codes, unit = Codes(8, codes.stand_for), 8
    stored = np.ascontiguousarray(_wider(stored, self.line * lines * codes.bits // unit))
    packed = stored.view(np.uint8 if codes.bits == 8 else np.uint32)
    return codes, packed.reshape(math.prod(stored.shape[:-1]) * lines, -1)


def _wider(array: np.ndarray, length: int) -> np.ndarray:
  """An array with zeros at the end of its last axis."""
  if array.shape[-1] == length:
    return array
  padded = np.zeros((*array.shape[:-1], length), array.dtype)
  padded[..., : array.shape[-1]] = array
  return padded


@dataclasses.dataclass(frozen=True)
class Columns:
  """A weight [o, i] that is stored the other way round, as in AWQ and GPTQ: [i, o], a group for several inputs.

  Attributes:
    shape: of the weight.
    codes: how its numbers are stored; AWQ packs them along the outputs, GPTQ along the inputs.
    words: the tensor of codes.
    group: number of inputs in a group; the last one may be smaller.
    scales: of groups, [G, o].
    zeros: of groups, read and checked: (first group, last group, outputs) -> float32 [groups, outputs].
    zero_parts: the stored tensors of the zeros.
    group_of: the tensor that holds the group of each input; None if the inputs of a group are neighbours.
  """

  shape: tuple[int, int]
  codes: Codes
  words: TensorInfo
  group: int
  scales: Grid
  zeros: Callable[[ReadBox, slice, slice], np.ndarray]
  zero_parts: tuple[TensorInfo, ...] = ()
  group_of: TensorInfo | None = None

  @property
  def parts(self) -> tuple[TensorInfo, ...]:
    """The stored tensors, that of the codes first."""
    index = () if self.group_of is None else (self.group_of,)
    return tuple(dict.fromkeys((self.words, self.scales.info, *self.zero_parts, *index)))

  @property
  def cell(self) -> tuple[int, ...]:
    """The shape of what should be decoded together: all outputs, since they are neighbours in the file."""
    return (self.shape[0], self.codes.per_word[0] if self.codes.axis == -2 else 1)

  def read(self, read: ReadBox, index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads and decodes a box of the weight: bfloat16 for that dtype, otherwise float32."""
    outputs, inputs = index
    each, words = self.codes.per_word
    if self.codes.axis == -1:
      wide, deep = _widened(outputs, each, self.shape[0]), inputs
      box = (deep, slice(wide.start // each, -(-wide.stop // each)))
    else:
      wide, deep = outputs, _widened(inputs, each, self.shape[1])
      box = (slice(deep.start // each * words, words_of(deep.stop, self.codes)), wide)
    groups = self._groups(read, deep)
    low, high = int(groups.min()), int(groups.max()) + 1
    scale = self.scales.lines(read, (), slice(low, high), wide, 1)
    zero = self.zeros(read, slice(low, high), wide)
    packed = np.ascontiguousarray(read(self.words, box)).view(np.uint32)
    numbers = [
      self._decode(dtype, packed, run, scale[owners], zero[owners])
      for run, owners in self._runs(groups - low, deep)
    ]
    whole = np.concatenate(numbers) if len(numbers) > 1 else numbers[0]
    top, left = inputs.start - deep.start, outputs.start - wide.start
    return whole[top : top + inputs.stop - inputs.start, left : left + outputs.stop - outputs.start].T

  def _groups(self, read: ReadBox, inputs: slice) -> np.ndarray:
    """The group of each input."""
    if self.group_of is None:
      return np.arange(inputs.start, inputs.stop) // self.group
    groups = np.array(read(self.group_of, (inputs,))).astype(np.int64)
    check_groups(groups, self.scales.shape[0], self.group_of.name)
    return groups

  def _runs(self, groups: np.ndarray, inputs: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of inputs, counted from the first, and their groups: [G, 1] for whole groups, else [1, R]."""
    count, lowest = inputs.stop - inputs.start, inputs.start
    each = self.codes.per_word[0] if self.codes.axis == -2 else 1
    if self.group % each or not self._are_neighbours(groups, lowest):
      yield slice(0, count), groups[None]
      return
    head = min(-lowest % self.group, count)
    body = head + (count - head) // self.group * self.group
    for start, stop, size in ((0, head, head), (head, body, self.group), (body, count, count - body)):
      if start < stop:
        yield slice(start, stop), groups[start:stop:size, None]

  def _are_neighbours(self, groups: np.ndarray, lowest: int) -> bool:
    """Whether inputs have the groups that they have where none is stored."""
    usual = np.arange(lowest, lowest + len(groups)) // self.group
    return self.group_of is None or np.array_equal(groups, usual - usual[0])

  def _decode(
    self, dtype: np.dtype, packed: np.ndarray, run: slice, scale: np.ndarray, zero: np.ndarray
  ) -> np.ndarray:
    """The numbers of a run of inputs: [R, outputs]. `scale` and `zero` have a group's numbers, [G, 1 or R, outputs]."""
    count = run.stop - run.start
    if self.codes.axis == -1:
      words, first = packed[run], run.start
    else:
      each, size = self.codes.per_word
      first = run.start // each * each
      words = packed[first // each * size : words_of(run.stop, self.codes)]
      if self.codes.crosses or count % each:  # the last words may hold more codes than there are inputs
        words = unpack(words, self.codes)[:count]
        return decode(Codes(8), dtype, words.reshape(len(scale), -1, words.shape[-1]), scale, zero).reshape(
          count, -1
        )
    words = words.reshape(len(scale), -1, words.shape[-1])
    numbers = decode(self.codes, dtype, words, scale, zero)
    return numbers.reshape(-1, numbers.shape[-1])


def _widened(part: slice, unit: int, size: int) -> slice:
  """A part of an axis, widened to whole units."""
  return slice(part.start // unit * unit, min(-(-part.stop // unit) * unit, size))


@dataclasses.dataclass(frozen=True)
class Flat:
  """A weight [o, i] whose codes are one sequence, in blocks that run over the ends of rows, as in bitsandbytes.

  Attributes:
    shape: of the weight.
    words: the tensor of codes, 4 bits each, as bytes.
    block: number of elements in a block.
    scales: the scale of each block: (first block, last block) -> float32 [blocks].
    table: the 16 numbers that codes stand for.
    others: the stored tensors besides `words`.
  """

  shape: tuple[int, ...]
  words: TensorInfo
  block: int
  scales: Callable[[ReadBox, slice], np.ndarray]
  table: Callable[[ReadBox], np.ndarray]
  others: tuple[TensorInfo, ...]

  @property
  def parts(self) -> tuple[TensorInfo, ...]:
    """The stored tensors, that of the codes first."""
    return (self.words, *self.others)

  @property
  def cell(self) -> tuple[int, ...]:
    """The shape of what should be decoded together: rows that are whole blocks."""
    row = self.shape[-1]
    return (*(1 for _ in self.shape[2:]), self.block // math.gcd(self.block, row), row)

  def read(self, read: ReadBox, index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads and decodes a box of the weight: bfloat16 for that dtype, otherwise float32."""
    rows, row = index[0], math.prod(self.shape[1:])
    start, stop = rows.start * row, rows.stop * row
    blocks = slice(start // self.block, -(-stop // self.block))
    scale = self.scales(read, blocks)
    table = self.table(read)
    half = self.block // 2
    words = read(self.words, (slice(blocks.start * half, min(blocks.stop * half, self.words.shape[0])),))
    words = np.ascontiguousarray(_wider(words, len(scale) * half)).view(np.uint32).reshape(len(scale), -1)
    numbers = decode(TABLE4, dtype, words, scale[:, None], table=table).reshape(-1)
    skipped = start - blocks.start * self.block
    box = numbers[skipped : skipped + stop - start].reshape(rows.stop - rows.start, *self.shape[1:])
    return box[(slice(None), *index[1:])]
