"""Headers of safetensors files, checked before anything else is read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import posixpath
import re
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from models_core.errors import CheckpointError, ConfigError
from models_core.formats.byte_reader import BytesCheckpoint
from models_core.formats.checkpoint import Format, Header
from models_core.formats.files import Files, LocalFiles, ReadRange, open_file
from models_core.formats.json_files import parse_json, read_json
from models_core.formats.memory import ALIGNMENT
from models_core.formats.tensors import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# Three times what the largest published checkpoint has in all, in bytes. Millions of made-up tensors would take minutes
# and gigabytes to refuse.
_MAX_HEADER = 16 << 20
_FIRST_READ = 256 * 1024
# Files whose headers are read at a time: elsewhere each takes a request.
_AT_ONCE = 16

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
  "C64": np.dtype(np.complex64),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
  "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


# Element types by what files call them, and the other way.
CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsCheckpoint(BytesCheckpoint):
  """The tensors of safetensors files."""

  @property
  def format(self) -> Format:
    """SAFETENSORS."""
    return SAFETENSORS


def read_safetensors(files: Files) -> SafetensorsCheckpoint:
  """The tensors of a safetensors checkpoint, of one file or of many.

  Where there is an index, it decides which files count; else `model.safetensors` alone, else all of them.

  Returns:
    The checkpoint. Its `problems` name every file that is missing or broken and every tensor that is doubled.

  Raises:
    CheckpointError: if there is nothing to read.
  """
  names = set(files.names())
  problems: list[str] = []
  index = _read_index(files, problems) if INDEX in names else None
  if index is not None:
    wanted = sorted(set(index.values()))
  elif SINGLE in names:
    wanted = [SINGLE]
  else:
    wanted = sorted(name for name in names if _is_safetensors(name) and "/" not in name)
  if not wanted and not problems:
    raise CheckpointError(files.path, [_nothing_found(names)])
  tensors: dict[str, TensorInfo] = {}
  metadata: dict[str, object] = {}
  headers: dict[str, Header] = {}
  problems += [
    f"{name} is missing, but {INDEX} names it: the download or copy is incomplete"
    for name in wanted
    if name not in names
  ]
  present = [name for name in wanted if name in names]
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    read = [pool.submit(_read_file, files, name) for name in present]
  for name, under_way in zip(present, read, strict=True):
    try:
      file = under_way.result()
    except CheckpointError as error:
      problems += [f"{name}: {problem}" for problem in error.problems]
      continue
    headers[name] = file.header
    metadata |= file.metadata
    for info in file.tensors:
      if (twin := tensors.get(info.name)) is not None:
        problems.append(f"{info.name} is doubled: in {twin.file} and in {info.file}; remove one")
      else:
        tensors[info.name] = info
  if index is not None:
    problems += [
      f"{tensor} is missing: {INDEX} says that {file} holds it"
      for tensor, file in index.items()
      if tensor not in tensors and file in headers
    ]
  return SafetensorsCheckpoint(files, tensors, metadata, tuple(problems), headers=headers)


def read_safetensors_file(files: Files, name: str) -> SafetensorsCheckpoint:
  """The tensors of one file among others.

  Raises:
    CheckpointError: if its header is broken or doesn't describe the file's bytes one to one.
  """
  file = _read_file(files, name)
  tensors = {info.name: info for info in file.tensors}
  return SafetensorsCheckpoint(files, tensors, file.metadata, headers={name: file.header})


def _nothing_found(names: set[str]) -> str:
  if "adapter_config.json" in names:
    return "this is an adapter: load its base model first, then merge"
  if pickles := sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))):
    return f"only pickled weights ({pickles[0]}), which are never loaded: convert them to safetensors"
  return "no safetensors file" + (
    f" among {', '.join(sorted(names)[:8])}" if names else ": the directory is empty"
  )


def _read_index(files: Files, problems: list[str]) -> Mapping[str, str] | None:
  """tensor -> file; None, and a problem, where the index cannot be used."""
  try:
    if (size := files.size(INDEX)) > _MAX_HEADER:
      raise ValueError(f"its {size} bytes are more than the {_MAX_HEADER} that are read")
    weight_map = read_json(files, INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
      raise ValueError("it has no weight_map")
    for file in weight_map.values():
      if not isinstance(file, str) or not is_inside(file):
        raise ValueError(f"the file name {file!r} leaves the directory")
    return weight_map
  except ConfigError as error:
    problems.append(str(error))
  except ValueError as error:
    problems.append(f"{INDEX} cannot be read: {error}")
  return None


def is_inside(name: str) -> bool:
  """Whether a relative name stays in its directory."""
  plain = posixpath.normpath(name)
  return (
    bool(name)
    and not name.startswith("/")
    and "\\" not in name
    and "\0" not in name
    and not plain.startswith("..")
  )


@dataclasses.dataclass(frozen=True)
class _File:
  """What the header of a file says.

  Attributes:
    tensors: in the order of their bytes.
    metadata: texts by name.
    header: to recognise it by.
  """

  tensors: list[TensorInfo]
  metadata: dict[str, object]
  header: Header


def _read_file(files: Files, name: str) -> _File:
  """Reads the header of one file.

  Raises:
    CheckpointError: if the header is broken or doesn't describe the file's bytes one to one.
  """
  with open_file(files, name) as read:
    return _parse(read, files.size(name), name, f"{files.path}/{name}")


def _parse(read: ReadRange, size: int, name: str, where: str) -> _File:
  start = read(0, min(size, _FIRST_READ))
  if len(start) < 8:
    raise CheckpointError(where, [f"{size} bytes are no safetensors file"])
  (length,) = struct.unpack("<Q", start[:8])
  if length > size - 8:
    raise CheckpointError(
      where, [f"its header claims {length} bytes of a file of {size}: truncated or no safetensors"]
    )
  if length > _MAX_HEADER:
    raise CheckpointError(
      where, [f"its header of {length} bytes is longer than the {_MAX_HEADER} that are read"]
    )
  if len(start) < 8 + length:
    start += read(len(start), 8 + length)
  try:
    header = parse_json(start[8 : 8 + length])
  except (ValueError, RecursionError) as error:
    raise CheckpointError(where, [f"its header is not valid: {error}"]) from None
  if not isinstance(header, dict):
    raise CheckpointError(where, [f"its header is {type(header).__name__}, expected an object"])
  metadata = header.pop("__metadata__", None) or {}
  if not isinstance(metadata, dict):
    raise CheckpointError(where, ["its __metadata__ is no object"])
  problems: list[str] = []
  infos = []
  for tensor, entry in header.items():
    try:
      infos.append(_tensor(tensor, entry, name, 8 + length))
    except (ValueError, TypeError) as error:
      problems.append(f"{tensor}: {error}")
  infos.sort(key=lambda info: (info.start, info.stop))
  end = 8 + length
  if not problems:
    for info in infos:
      if info.start != end:
        problems.append(
          f"{info.name}: its data {'overlaps' if info.start < end else 'leaves a gap after'} the one before"
        )
        break
      end = info.stop
    else:
      if end != size:
        problems.append(
          f"the file has {size} bytes, but its header describes {end}: truncated or overwritten"
        )
  if problems:
    raise CheckpointError(where, problems)
  return _File(infos, metadata, Header.of(start[: 8 + length]))


def _tensor(name: str, entry: Any, file: str, data: int) -> TensorInfo:
  if not isinstance(entry, dict):
    raise ValueError("its entry is no object")
  if lacking := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
    raise ValueError(f"its entry lacks {', '.join(lacking)}")
  kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if kind not in DTYPES:
    raise ValueError(f"its dtype {kind!r} is not one of {', '.join(DTYPES)}")
  for numbers in (shape, offsets):
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
      raise ValueError(f"{numbers!r} is no list of whole numbers")
  start, stop = offsets
  if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
    raise ValueError(f"{kind} {tuple(shape)} does not take the {stop - start} bytes of its data_offsets")
  return TensorInfo(name, DTYPES[kind], tuple(shape), file, data + start, data + stop)


def file_layout(
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
  """How a file with these tensors begins, and where the data of each one starts.

  As many tensors as can be start at a multiple of ALIGNMENT, so that a CPU device can use the mapped file. The format
  knows no gaps: tensors whose size is such a multiple come first, then the others, widest elements first.

  Args:
    tensors: dtype and shape by name.

  Returns:
    The bytes in front of the data, and the first byte of each tensor, counted from the file's start.

  Raises:
    KeyError: for a dtype that CODES does not have.
  """
  sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
  ordered = sorted(tensors, key=lambda name: (sizes[name] % ALIGNMENT != 0, -tensors[name][0].itemsize))
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  starts, end = {}, 0
  for name in ordered:
    dtype, shape = tensors[name]
    starts[name], end = end, end + sizes[name]
    header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-(8 + len(text)) % ALIGNMENT)
  beginning = struct.pack("<Q", len(text)) + text
  return beginning, {name: len(beginning) + start for name, start in starts.items()}


def shard_name(number: int, count: int) -> str:
  """The name of one of several files, counted from 1."""
  return f"model-{number:05}-of-{count:05}.safetensors"


def _is_safetensors(name: str) -> bool:
  return name.endswith(".safetensors")


def _entries(directory: str) -> set[str]:
  """The index, the files that it names, and files of the names that savers give."""
  names = set(os.listdir(directory))
  found = {name for name in names if name in (INDEX, SINGLE) or _SHARD.fullmatch(name)}
  with contextlib.suppress(OSError, ConfigError, AttributeError):
    weight_map = read_json(LocalFiles(directory), INDEX).get("weight_map", {})
    found |= {name for name in weight_map.values() if isinstance(name, str) and is_inside(name)} & names
  return found


SAFETENSORS = Format(
  name="safetensors",
  naming="huggingface",
  owns=_is_safetensors,
  is_in=lambda files: any(map(_is_safetensors, files.names())),
  read=read_safetensors,
  entries=_entries,
)
