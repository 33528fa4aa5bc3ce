"""Codes in rows with scales beside them: FP8, compressed-tensors, ModelOpt, FBGEMM, torchao.

The stored dtypes and shapes tell most; a configuration tells the size of blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from models_core.dequantising.codes import E2M1, E4M3, INT8, Codes, words_of
from models_core.dequantising.grids import Grid, grid, kind_of
from models_core.dequantising.naming import is_skipped
from models_core.dequantising.parts import Described, Parts, integer, pair
from models_core.dequantising.weights import Rows
from models_core.formats import TensorInfo

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# Columns that are decoded together where a scale belongs to a whole row.
_LINE = 256
_EVERY_LINEAR = "Linear"


def fp8(parts: Parts, said: Described) -> tuple[str, Rows]:
  """A weight of 8-bit floats in blocks, or with one scale. A block at the end of an axis may be partial."""
  block = said.get("weight_block_size")
  return _eight_bits(parts, None if block is None else pair(block, "weight_block_size"))


def per_row(parts: Parts, said: Described) -> tuple[str, Rows]:
  """A weight of 8 bits with one scale for each row, or for all."""
  if (zeros := parts.get("zeros")) is not None:
    raise ValueError(f"{zeros.name} is not read: zero points of {parts.weight}")
  return _eight_bits(parts, None)


def modelopt(parts: Parts, said: Described) -> tuple[str, Rows]:
  """A weight of ModelOpt: 8-bit floats, or 4-bit ones with two scales that multiply."""
  for role in ("pre_quant", "svd_a", "svd_b"):
    if (other := parts.get(role)) is not None:
      raise ValueError(f"{other.name} changes the inputs of the layer, which is not read here")
  if parts["codes"].dtype == np.uint8:
    return _four_bit_floats(parts, parts["codes"], is_inverse=False)
  return _eight_bits(parts, (128, 128) if len(parts["scale"].shape) == 4 else None)


def compressed(parts: Parts, said: Described) -> tuple[str, Rows]:
  """A weight of compressed-tensors."""
  if said.get("refused"):
    raise ValueError(said["refused"])
  if (packed := parts.get("packed")) is None:
    return _eight_bits(parts, _block_of(parts["codes"], said))
  if packed.dtype == np.uint8:
    return _four_bit_floats(parts, packed, is_inverse=True)
  return _packed_integers(parts, packed, said)


def compressed_module(said: Described, module: str) -> Described:
  """What compressed-tensors' configuration says of a module: the fields of the first group that has it as a target."""
  if refused := _refused(said):
    return {"refused": refused}
  groups = said.get("config_groups")
  groups = [one for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []
  exact = [one for one in groups if any(is_skipped(module, target) for target in _targets(one))]
  others = [one for one in groups if _EVERY_LINEAR in _targets(one)]
  chosen = next(iter(exact or others or (groups if len(groups) == 1 else [])), None)
  weights = None if chosen is None else chosen.get("weights")
  return weights if isinstance(weights, Mapping) else {}


def _targets(group: Mapping[str, Any]) -> list[str]:
  targets = group.get("targets")
  return [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []


def _refused(said: Described) -> str | None:
  """Why nothing of a configuration of compressed-tensors is read."""
  formats = [said.get("format")]
  groups = said.get("config_groups")
  for one in groups.values() if isinstance(groups, Mapping) else ():
    formats.append(one.get("format") if isinstance(one, Mapping) else None)
  for one in formats:
    if isinstance(one, str) and ("24" in one or "sparse" in one):
      return f"the weights are in the format {one}, which is not read"
  if said.get("transform_config"):
    return "the weights are rotated (transform_config), which is not read"
  sparsity = said.get("sparsity_config")
  form = sparsity.get("format") if isinstance(sparsity, Mapping) else None
  return None if form in (None, "dense") else f"the weights are sparse ({form}), which is not read"


def _block_of(codes: TensorInfo, said: Described) -> tuple[int, int] | None:
  """The block size that compressed-tensors gives a weight; None if the number of scales tells it."""
  match said.get("strategy"):
    case "block":
      return pair(said.get("block_structure"), "block_structure")
    case "group" | "tensor_group":
      return 1, integer(said, "group_size", range(1, 1 << 20))
    case "channel":
      return 1, codes.shape[-1] if codes.shape else 1
  return None


def _eight_bits(parts: Parts, block: tuple[int, int] | None) -> tuple[str, Rows]:
  """A weight of 8 bits; without a block, the number of scales tells whether there is one, or one for each row."""
  stored, scale = parts["codes"], parts["scale"]
  if stored.dtype not in (_FP8, np.int8):
    raise ValueError(f"{stored.name} is {stored.dtype.name}, expected float8_e4m3fn or int8")
  shape = parts.matrix(stored)
  if scale.dtype == np.uint8 or scale.dtype == ml_dtypes.float8_e8m0fnu:
    block = block or (1, 32)
  what, block = _blocks(scale, shape, block)
  found = grid(scale, parts.weight, shape, block, kind=kind_of(scale))
  zero: Grid | float = 0.0
  if (zeros := parts.get("zeros")) is not None:
    if zeros.dtype != np.int8:
      raise ValueError(f"{zeros.name} is {zeros.dtype.name}, expected int8")
    zero = grid(zeros, parts.weight, shape, block, kind="integer")
  name, codes = ("FP8", E4M3) if stored.dtype == _FP8 else ("int8", INT8)
  return f"{name} {what}", rows(shape, codes, stored, (found,), zero)


def _blocks(
  scale: TensorInfo, shape: Sequence[int], block: tuple[int, int] | None
) -> tuple[str, tuple[int, int]]:
  """What the blocks of some scales are called, and their size."""
  if block is not None and block != (1, shape[-1]):
    return f"{block[0]}x{block[1]}", block
  if block is None and math.prod(scale.shape) == math.prod(shape[:-2]):
    return "per tensor", (shape[-2], shape[-1])
  return "per channel", (1, shape[-1])


def _four_bit_floats(parts: Parts, stored: TensorInfo, *, is_inverse: bool) -> tuple[str, Rows]:
  """NVFP4, with scales in E4M3 and a second one for all; or MXFP4, with powers of two.

  Args:
    parts: of the weight.
    stored: the codes.
    is_inverse: whether the second scale divides.
  """
  if stored.dtype != np.uint8:
    raise ValueError(f"{stored.name} is {stored.dtype.name}, expected uint8")
  *lead, count, width = parts.matrix(stored)
  shape = (*lead, count, 2 * width)
  scale, second = parts["scale"], parts.get("second")
  if scale.dtype != _FP8:
    if second is not None:
      raise ValueError(f"{scale.name} is {scale.dtype.name}, expected float8_e4m3fn beside {second.name}")
    found = grid(scale, parts.weight, shape, (1, 32), kind=kind_of(scale))
    return "MXFP4", rows(shape, E2M1, stored, (found,))
  first = grid(scale, parts.weight, shape, (1, 16), kind="e4m3")
  second = parts["second"]
  both = grid(second, parts.weight, shape, (count, shape[-1]), kind=kind_of(second), is_inverse=is_inverse)
  return "NVFP4", rows(shape, E2M1, stored, (first, both))


def _packed_integers(parts: Parts, packed: TensorInfo, said: Described) -> tuple[str, Rows]:
  """Integers of compressed-tensors in words of 32 bits, with an offset that makes them unsigned."""
  if packed.dtype != np.int32:
    raise ValueError(f"{packed.name} is {packed.dtype.name}, expected int32")
  count, width = parts.matrix(packed, stacked=False)
  bits = integer(said, "num_bits", range(1, 9))
  shape = _stated_shape(parts)
  codes = _order_of(bits, shape[1], width)
  if codes is None or shape[0] != count:
    raise ValueError(
      f"{packed.name} has shape {packed.shape}, which does not hold {shape} codes of {bits} bits, as "
      f"{parts['shape'].name} and the configuration say"
    )
  scale = parts["scale"]
  block = _block_of(packed, said)
  if block is None or said.get("strategy") == "channel":
    block = shape if math.prod(scale.shape) == 1 else (1, shape[1])
  if shape[1] % block[1]:
    raise ValueError(f"the group_size {block[1]} does not divide the {shape[1]} columns of {parts.weight}")
  groups = parts.get("groups")
  if groups is not None and (groups.shape != (shape[1],) or groups.dtype.kind != "i"):
    raise ValueError(f"{groups.name} has shape {groups.shape}, expected {(shape[1],)}, whole numbers")
  found = grid(scale, parts.weight, shape, block, kind=kind_of(scale), group_of=groups)
  zero: Grid | float = float(1 << bits - 1)
  if (zeros := parts.get("zeros")) is not None:
    zero = _packed_zeros(parts, zeros, found, bits)
  elif said.get("symmetric") is False:
    parts["zeros"]
  what = "per channel" if block[1] == shape[1] else f"groups of {block[1]}"
  return f"int{bits} {what}", rows(shape, codes, packed, (found,), zero)


def _packed_zeros(parts: Parts, zeros: TensorInfo, scales: Grid, bits: int) -> Grid:
  """Zero points, which are packed along the rows of the weight."""
  count = scales.shape[0]
  codes = _order_of(bits, count, zeros.shape[0] if zeros.shape else 0)
  if codes is None or zeros.dtype != np.int32 or zeros.shape[1:] != scales.shape[1:]:
    raise ValueError(
      f"{zeros.name} is {zeros.dtype.name} of shape {zeros.shape}, which does not hold zero points of {bits} bits for "
      f"the scales {scales.shape} of {parts.weight}"
    )
  return dataclasses.replace(scales, info=zeros, kind="integer", codes=codes)


def _stated_shape(parts: Parts) -> tuple[int, int]:
  info = parts["shape"]
  if info.dtype.kind != "i":
    raise ValueError(f"{info.name} is {info.dtype.name}, expected whole numbers")
  stated = parts.read(info).reshape(-1).tolist()
  if len(stated) != 2 or any(not 0 < n < 1 << 31 for n in stated):
    raise ValueError(f"{info.name} holds {stated}, expected two sizes")
  return int(stated[0]), int(stated[1])


def _order_of(bits: int, count: int, width: int) -> Codes | None:
  """How `count` codes lie in `width` words: as one string, or a whole number in each word; None if in neither way."""
  string, whole = Codes(bits), Codes(bits, order="whole")
  if width == words_of(count, string) != words_of(count, whole) or (
    width == words_of(count, string) and 32 % bits == 0
  ):
    return string
  # Where both ways take as many words, nothing tells which one it is.
  return whole if width == words_of(count, whole) != words_of(count, string) else None


def rows(
  shape: tuple[int, ...],
  codes: Codes,
  words: TensorInfo,
  scales: tuple[Grid, ...],
  zero: Grid | float = 0.0,
  biases: Grid | None = None,
) -> Rows:
  """A weight whose lines are as long as its smallest blocks."""
  columns = shape[-1]
  smallest = min(one.columns for one in scales)
  line = smallest if smallest < columns else min(_LINE, -(-columns // 32) * 32)
  unsigned = np.dtype(f"u{words.dtype.itemsize}")
  return Rows(shape, codes, dataclasses.replace(words, dtype=unsigned), line, scales, zero, biases)
