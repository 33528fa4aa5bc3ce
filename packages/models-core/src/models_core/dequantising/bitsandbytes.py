"""bitsandbytes: 4 bits in blocks that run over the ends of rows, and int8."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from models_core.dequantising.codes import INT8
from models_core.dequantising.grids import as_floats, grid
from models_core.dequantising.parts import Described, Parts, integer
from models_core.dequantising.scaled import rows
from models_core.dequantising.weights import Flat
from models_core.formats import ReadBox, TensorInfo

_SIZES = range(1, 1 << 31)


def bitsandbytes(parts: Parts, said: Described) -> tuple[str, Any]:
  """A weight of bitsandbytes; the tensors tell whether it has 4 bits or 8."""
  if parts.get("absmax") is not None or parts.get("nf4") is not None or parts.get("fp4") is not None:
    return _four_bits(parts)
  stored, scale = parts["codes"], parts["scale"]
  if stored.dtype != np.int8 or scale.dtype != np.float32:
    raise ValueError(
      f"{stored.name} is {stored.dtype.name} beside {scale.dtype.name}, expected int8 beside float32"
    )
  if (form := parts.get("format")) is not None and np.any(parts.read(form)):
    raise ValueError(f"{form.name} is {parts.read(form).reshape(-1)[0]}, expected 0, row by row")
  shape = parts.matrix(stored, stacked=False)
  found = grid(scale, parts.weight, shape, (1, shape[1]), factor=1 / 127)
  return "int8 per channel", rows(shape, INT8, stored, (found,))


def _four_bits(parts: Parts) -> tuple[str, Flat]:
  kind = "nf4" if parts.get("nf4") is not None else "fp4"
  state = _state(parts, kind)
  block = integer(state, "blocksize", range(8, 1 << 16))
  shape = state.get("shape")
  if (
    block % 8
    or not isinstance(shape, list)
    or len(shape) != 2
    or any(type(n) is not int or n not in _SIZES for n in shape)
  ):
    raise ValueError(
      f"{parts[kind].name} says blocksize {block} and shape {shape!r}, expected a multiple of 8, two sizes"
    )
  stored, absmax, table = parts["codes"], parts["absmax"], parts["map"]
  nbytes, count = stored.stop - stored.start, math.prod(shape)
  blocks = -(-count // block)
  if nbytes != -(-count // 2) or absmax.shape not in ((blocks,), (blocks, 1)):
    raise ValueError(
      f"{stored.name} has {nbytes} bytes and {absmax.name} has shape {absmax.shape}, but {tuple(shape)} numbers in "
      f"blocks of {block} take {-(-count // 2)} bytes and {blocks} scales"
    )
  if table.shape != (16,) or table.dtype != np.float32:
    raise ValueError(
      f"{table.name} is {table.dtype.name} of shape {table.shape}, expected 16 numbers in float32"
    )
  words = dataclasses.replace(stored, dtype=np.dtype(np.uint8), shape=(nbytes,))
  absmax = dataclasses.replace(absmax, shape=(blocks,))
  others = [absmax, table]
  if absmax.dtype == np.uint8:
    scales: Any = _nested(parts, absmax, state)
    others += [parts["nested"], parts["nested_map"]]
  elif absmax.dtype == np.float32:
    scales = lambda read, wanted: as_floats(read(absmax, (wanted,)), "float", absmax.name)
  else:
    raise ValueError(
      f"{absmax.name} is {absmax.dtype.name}, expected float32, or uint8 with a scale of its own"
    )
  numbers = lambda read: as_floats(read(table, (slice(0, 16),)), "float", table.name)
  return f"{kind} blocks of {block}", Flat(
    (shape[0], shape[1]), words, block, scales, numbers, (*others, parts[kind])
  )


def _nested(parts: Parts, absmax: TensorInfo, state: Described) -> Any:
  """Reads scales that are codes with scales of their own."""
  inner, table = parts["nested"], parts["nested_map"]
  block, offset = integer(state, "nested_blocksize", range(1, 1 << 24)), state.get("nested_offset")
  blocks = -(-absmax.shape[0] // block)
  if (
    inner.shape != (blocks,)
    or inner.dtype != np.float32
    or table.shape != (256,)
    or table.dtype != np.float32
  ):
    raise ValueError(
      f"{inner.name} is {inner.dtype.name} of shape {inner.shape} and {table.name} {table.dtype.name} of shape "
      f"{table.shape}, expected float32 of shapes {(blocks,)} and (256,)"
    )
  if not isinstance(offset, (int, float)) or not math.isfinite(offset):
    raise ValueError(f"nested_offset is {offset!r}, expected a number")

  def scales(read: ReadBox, wanted: slice) -> np.ndarray:
    codes = np.array(read(absmax, (wanted,)))
    numbers = as_floats(read(table, (slice(0, 256),)), "float", table.name)
    first, stop = wanted.start // block, -(-wanted.stop // block)
    largest = as_floats(read(inner, (slice(first, stop),)), "float", inner.name)
    owners = np.arange(wanted.start, wanted.stop) // block - first
    return as_floats(numbers[codes] * largest[owners] + np.float32(offset), "float", absmax.name)

  return scales


def _state(parts: Parts, kind: str) -> dict[str, Any]:
  """The JSON in a tensor of bytes that describes a weight."""
  info = parts[kind]
  try:
    state = json.loads(parts.read(info).tobytes())
  except (ValueError, RecursionError):
    raise ValueError(f"{info.name} holds no JSON") from None
  if not isinstance(state, dict):
    raise ValueError(f"{info.name} holds no JSON object")
  return state
