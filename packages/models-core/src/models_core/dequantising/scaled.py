"""8-bit floats and integers, and packed codes, with scales beside them: FP8, compressed-tensors, ModelOpt, FBGEMM.

The stored dtypes and shapes tell most; a configuration tells the size of blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from models_core.dequantising.codes import E4M3, Codes
from models_core.dequantising.grids import Grid, grid, kind_of
from models_core.dequantising.parts import Described, Parts, pair
from models_core.dequantising.weights import Rows

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# Columns that are decoded together where a scale belongs to a whole row.
_LINE = 256


def fp8(parts: Parts, said: Described) -> tuple[str, Rows]:
  """A weight of 8-bit floats in blocks, or with one scale. A block at the end of an axis may be partial."""
  block = said.get("weight_block_size")
  return _floats(parts, None if block is None else pair(block, "weight_block_size"))


def fbgemm(parts: Parts, said: Described) -> tuple[str, Rows]:
  """A weight of 8-bit floats with one scale for each row."""
  return _floats(parts, None)


def _floats(parts: Parts, block: tuple[int, int] | None) -> tuple[str, Rows]:
  """A weight of 8-bit floats; without a block, the number of scales tells whether there is one, or one for each row."""
  codes, scale = parts["codes"], parts["scale"]
  if codes.dtype != _FP8:
    raise ValueError(f"{codes.name} is {codes.dtype.name}, expected float8_e4m3fn")
  shape = parts.matrix(codes)
  name, block = _blocks(scale, shape, block)
  found = grid(scale, parts.weight, shape, block, kind=kind_of(scale))
  return f"FP8 {name}", _rows(shape, E4M3, codes, (found,))


def _blocks(scale: Any, shape: Sequence[int], block: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
  """What the blocks of some scales are called, and their size."""
  rows, columns = shape[-2:]
  if block is not None:
    return f"{block[0]}x{block[1]}", block
  if int(np.prod(scale.shape)) == int(np.prod(shape[:-2])):
    return "per tensor", (rows, columns)
  return "per channel", (1, columns)


def _rows(
  shape: tuple[int, ...],
  codes: Codes,
  words: Any,
  scales: tuple[Grid, ...],
  zero: Grid | float = 0.0,
  biases: Grid | None = None,
) -> Rows:
  columns = shape[-1]
  smallest = min(one.columns for one in scales)
  line = smallest if smallest < columns else min(_LINE, -(-columns // 32) * 32)
  unsigned = np.dtype(f"u{words.dtype.itemsize}")
  return Rows(shape, codes, dataclasses.replace(words, dtype=unsigned), line, scales, zero, biases)
