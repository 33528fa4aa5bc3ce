"""AWQ and GPTQ, whose weights are stored as [inputs, outputs]; auto-round writes both."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models_core.dequantising import scaled
from models_core.dequantising.codes import AWQ4, Codes, unpack, words_of
from models_core.dequantising.grids import Grid, grid, kind_of
from models_core.dequantising.naming import is_skipped, matches
from models_core.dequantising.parts import Described, Parts, integer
from models_core.dequantising.weights import Columns
from models_core.formats import ReadBox, TensorInfo

_BITS = (2, 3, 4, 8)
# Names of GPTQ's formats -> whether zero points are stored as they are; otherwise less 1.
_STORED_ZEROS = {"gptq": False, "gptq_v2": True}
# auto-round's names of formats -> the format.
_PACKINGS = {
  "auto_round": "gptq",
  "auto_round:auto_gptq": "gptq",
  "auto_round:gptqmodel": "gptq_v2",
  "auto_round:exllamav2": "gptq_v2",
  "auto_round:auto_awq": "awq",
}


def awq(parts: Parts, said: Described) -> tuple[str, Columns]:
  """A weight of AWQ: eight outputs in a word, in an order of their own."""
  bits, version = integer(said, "bits", range(1, 17), 4), said.get("version", "gemm")
  if bits != 4:
    raise ValueError(f"its bits are {bits} in the configuration, expected 4")
  if not isinstance(version, str) or version.lower() != "gemm":
    raise ValueError(f"the weights are in AWQ's format {version!r}, which is not read, only 'gemm'")
  words, scale = _words(parts), parts["scale"]
  inputs, outputs = words.shape[0], words.shape[1] * 8
  shape, group = (outputs, inputs), _group(said, inputs)
  scales = grid(scale, parts.weight, (-(-inputs // group), outputs), (1, 1), kind=kind_of(scale))
  stored = parts.get("zeros")
  if stored is None and said.get("zero_point", True):
    stored = parts["zeros"]
  if stored is None:
    return f"AWQ groups of {group}", Columns(shape, AWQ4, words, group, scales, _constant(8.0))
  stored = _zero_words(stored, scales, AWQ4)

  def zeros(read: ReadBox, groups: slice, wanted: slice) -> np.ndarray:
    codes = _read_zeros(read, stored, AWQ4, groups, wanted)
    return codes.astype(np.float32)

  return f"AWQ groups of {group}", Columns(shape, AWQ4, words, group, scales, zeros, (stored,))


def gptq(parts: Parts, said: Described) -> tuple[str, Columns]:
  """A weight of GPTQ: inputs packed in words, in groups that may hold any inputs."""
  bits = integer(said, "bits", range(1, 17), 4)
  if bits not in _BITS:
    raise ValueError(
      f"its bits are {bits} in the configuration, expected one of {', '.join(map(str, _BITS))}"
    )
  form = said.get("checkpoint_format") or said.get("format") or "gptq"
  if (
    not isinstance(form, str)
    or form not in _STORED_ZEROS
    or said.get("pack_dtype", "int32") != "int32"
    or said.get("is_marlin_format")
  ):
    raise ValueError(
      f"the weights are in GPTQ's format {form!r}, which is not read, only 'gptq' and 'gptq_v2'"
    )
  codes = Codes(bits, axis=-2)
  words, scale, index = _words(parts), parts["scale"], parts.get("groups")
  outputs = words.shape[1]
  inputs = index.shape[0] if index is not None and index.shape else words.shape[0] * 32 // bits
  if index is not None and (len(index.shape) != 1 or index.dtype != np.int32):
    raise ValueError(
      f"{index.name} is {index.dtype.name} of shape {index.shape}, expected int32 with one axis"
    )
  if words_of(inputs, codes) != words.shape[0]:
    raise ValueError(
      f"{words.name} has shape {words.shape}, which does not hold {inputs} codes of {bits} bits in each column"
    )
  if index is None and said.get("desc_act"):
    index = parts["groups"]
  group = _group(said, inputs)
  scales = grid(scale, parts.weight, (-(-inputs // group), outputs), (1, 1), kind=kind_of(scale))
  across = Codes(bits)
  stored = _zero_words(parts["zeros"], scales, across)
  name = f"GPTQ int{bits} groups of {group}"
  zeros = _gptq_zeros(stored, across, said.get("sym") is True, _STORED_ZEROS[form])
  return name, Columns((outputs, inputs), codes, words, group, scales, zeros, (stored,), index)


def _gptq_zeros(
  stored: TensorInfo, codes: Codes, is_symmetric: bool, as_they_are: bool
) -> Callable[[ReadBox, slice, slice], np.ndarray]:
  """Reads GPTQ's zero points.

  Symmetric ones are in the middle, whatever the file says of its version: GPTQModel mislabels some files.
  """
  middle = 1 << codes.bits - 1
  mask = (1 << codes.bits) - 1

  def zeros(read: ReadBox, groups: slice, wanted: slice) -> np.ndarray:
    if not is_symmetric and not as_they_are and not codes.crosses:
      # Writers subtract 1 from whole words, where a zero borrows from its neighbours: adding it restores them.
      found = _read_zeros(read, stored, codes, groups, wanted, add=0xFFFFFFFF // mask)
      return found.astype(np.float32)
    found = _read_zeros(read, stored, codes, groups, wanted)
    if is_symmetric:
      if not (np.all(found == middle) or np.all(found == middle - 1)):
        raise ValueError(
          f"{stored.name} holds zero points besides {middle - 1} and {middle}, but the configuration says sym"
        )
      return np.full(found.shape, middle, np.float32)
    return found.astype(np.float32) if as_they_are else (found.astype(np.int32) + 1 & mask).astype(np.float32)

  return zeros


def _read_zeros(
  read: ReadBox, stored: TensorInfo, codes: Codes, groups: slice, outputs: slice, add: int = 0
) -> np.ndarray:
  """The stored zero points of some groups, after `add` is added to each word: uint8 [groups, outputs]."""
  each, size = codes.per_word
  first = outputs.start // each * size
  stop = min(-(-outputs.stop // each) * size, stored.shape[1])
  words = np.array(read(stored, (groups, slice(first, stop)))).view(np.uint32) + np.uint32(add)
  skipped = outputs.start - first // size * each
  return unpack(words, codes)[:, skipped : skipped + outputs.stop - outputs.start]


def _constant(zero: float) -> Callable[[ReadBox, slice, slice], np.ndarray]:
  return lambda read, groups, outputs: np.full(
    (groups.stop - groups.start, outputs.stop - outputs.start), zero, np.float32
  )


def _words(parts: Parts) -> TensorInfo:
  words = parts["codes"]
  parts.matrix(words, stacked=False)
  if words.dtype not in (np.int32, np.uint32):
    raise ValueError(f"{words.name} is {words.dtype.name}, expected int32")
  return words


def _zero_words(stored: TensorInfo, scales: Grid, codes: Codes) -> TensorInfo:
  expected = (scales.shape[0], words_of(scales.shape[1], codes))
  if stored.shape != expected or stored.dtype not in (np.int32, np.uint32):
    raise ValueError(
      f"{stored.name} is {stored.dtype.name} of shape {stored.shape}, expected int32 of shape {expected}"
    )
  return stored


def _group(said: Described, inputs: int) -> int:
  """The number of inputs in a group; -1 is all."""
  group = said.get("group_size", 128)
  if type(group) is not int or (group < 1 and group != -1):
    raise ValueError(
      f"its group_size is {group!r} in the configuration, expected a positive whole number or -1"
    )
  return inputs if group == -1 else min(group, inputs)


def gptq_module(said: Described, module: str) -> Described:
  """What GPTQ's configuration says of a module: `dynamic` holds overrides by regular expressions."""
  dynamic = said.get("dynamic")
  for key, fields in dynamic.items() if isinstance(dynamic, Mapping) else ():
    if matches(key.removeprefix("+:").removeprefix("-:"), module):
      if key.startswith("-:"):
        raise ValueError(f"{module} is quantised, but dynamic says {key!r}, that it is not")
      return {**said, **fields} if isinstance(fields, Mapping) else said
  return said


def auto_round(parts: Parts, said: Described) -> tuple[str, Any]:
  """A weight of auto-round, which is one of GPTQ or AWQ by another name, or has 8-bit floats."""
  if "codes" not in parts.tensors and "plain" in parts.tensors:
    renamed = dataclasses.replace(parts, tensors={**parts.tensors, "codes": parts.tensors["plain"]})
    return scaled.per_row(renamed, said)
  packing = said.get("packing_format", "auto_round:auto_gptq")
  form = _PACKINGS.get(packing) if isinstance(packing, str) else None
  if form is None:
    raise ValueError(f"the weights are in auto-round's format {packing!r}, which is not read")
  if form == "awq":
    return awq(parts, {**said, "version": "gemm"})
  return gptq(parts, {**said, "checkpoint_format": form})


def auto_round_module(said: Described, module: str) -> Described:
  """What auto-round's configuration says of a module: `extra_config` holds overrides by names or regular expressions."""
  extra = said.get("extra_config")
  for key, fields in extra.items() if isinstance(extra, Mapping) else ():
    if isinstance(fields, Mapping) and (is_skipped(module, key) or _is_pattern(key, module)):
      if fields.get("bits", 0) == 16:
        raise ValueError(f"{module} is quantised, but extra_config says {key!r}, that it is not")
      return {**said, **fields}
  return said


def _is_pattern(key: str, module: str) -> bool:
  return bool(re.search(r"[*\\[(|]", key)) and matches(key, module)
