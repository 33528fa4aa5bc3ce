"""Headers of safetensors files, which are checked completely before any tensor data is read."""

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
from collections.abc import Iterator, Mapping, Sequence
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
_SHARD = re.compile(r"model-(?:[0-9a-f]{16}-)?\d{5}-of-\d{5}\.safetensors")

# In bytes: three times all headers of the largest published checkpoint. A longer header, with millions of invented
# tensors, would take minutes and gigabytes to refuse.
_MAX_HEADER = 16 << 20
_FIRST_READ = 256 * 1024
# Headers that are read concurrently, since each takes a request if the files are in a store.
_AT_ONCE = 16

# dtype in a header -> NumPy's dtype.
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
  """A checkpoint in safetensors files."""

  @property
  def format(self) -> Format:
    """The safetensors format."""
    return SAFETENSORS


def read_safetensors(files: Files) -> SafetensorsCheckpoint:
  """Reads the headers of a safetensors checkpoint, which is one file or many.

  The checkpoint consists of the files that the index lists; without an index, of `model.safetensors`; without that, of
  all safetensors files in the directory.

  Returns:
    The checkpoint. Its `problems` name every file that is missing or broken, and every tensor that is missing or
    occurs twice.

  Raises:
    CheckpointError: if there is no safetensors file.
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
    f"{name} is missing, but {INDEX} lists it: the download or copy is incomplete"
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
        problems.append(f"{info.name} occurs twice: in {twin.file} and in {info.file}; remove one")
      else:
        tensors[info.name] = info
  if index is not None:
    problems += [
      f"{tensor} is missing from {file}, but {INDEX} says that it is there: download both files again"
      for tensor, file in index.items()
      if tensor not in tensors and file in headers
    ]
  return SafetensorsCheckpoint(files, tensors, metadata, tuple(problems), headers=headers)


def read_safetensors_file(files: Files, name: str) -> SafetensorsCheckpoint:
  """Reads the header of one file. Other files are not looked at.

  Raises:
    CheckpointError: if the header is malformed, or does not describe each byte of the file exactly once.
  """
  file = _read_file(files, name)
  tensors = {info.name: info for info in file.tensors}
  return SafetensorsCheckpoint(files, tensors, file.metadata, headers={name: file.header})


def _nothing_found(names: set[str]) -> str:
  if "adapter_config.json" in names:
    return "this is a LoRA adapter, not a model: load its base model, then merge the adapter into it"
  if pickles := sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))):
    return (
      f"the weights are pickled ({pickles[0]}), and pickles are never loaded: convert them to safetensors"
    )
  return "no safetensors file" + (
    f" among {', '.join(sorted(names)[:8])}" if names else ": the directory is empty"
  )


def _read_index(files: Files, problems: list[str]) -> Mapping[str, str] | None:
  """Reads the index: tensor -> file. If it cannot be used, returns None and adds a problem."""
  try:
    if (size := files.size(INDEX)) > _MAX_HEADER:
      raise ValueError(f"it has {size} bytes, but at most {_MAX_HEADER} are read")
    weight_map = read_json(files, INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
      raise ValueError("it has no weight_map")
    for file in weight_map.values():
      if not isinstance(file, str) or not is_inside(file):
        raise ValueError(f"it lists {file!r}, which is not a file name within the directory")
    return weight_map
  except ConfigError as error:
    problems.append(str(error))
  except ValueError as error:
    problems.append(f"{INDEX} cannot be read: {error}")
  return None


def is_inside(name: str) -> bool:
  """Whether a file name is relative and stays within its directory."""
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
  """The contents of a file's header.

  Attributes:
    tensors: in the order of their bytes.
    metadata: the strings of `__metadata__`, by key.
    header: the header's fingerprint.
  """

  tensors: list[TensorInfo]
  metadata: dict[str, object]
  header: Header


def _read_file(files: Files, name: str) -> _File:
  """Reads the header of one file.

  Raises:
    CheckpointError: if the header is malformed, or does not describe each byte of the file exactly once.
  """
  with open_file(files, name) as read:
    return _parse(read, files.size(name), name, f"{files.path}/{name}")


def _parse(read: ReadRange, size: int, name: str, where: str) -> _File:
  beginning = _beginning(read, size, where)
  header = _object(beginning[8:], where)
  metadata = header.pop("__metadata__", None) or {}
  if not isinstance(metadata, dict):
    raise CheckpointError(where, ["__metadata__ in the header is not a JSON object"])
  problems: list[str] = []
  infos = []
  for tensor, entry in header.items():
    try:
      infos.append(_tensor(tensor, entry, name, len(beginning)))
    except (ValueError, TypeError) as error:
      problems.append(f"{tensor}: {error}")
  infos.sort(key=lambda info: (info.start, info.stop))
  if problems := problems or list(_gaps(infos, len(beginning), size)):
    raise CheckpointError(where, problems)
  return _File(infos, metadata, Header.of(beginning))


def _beginning(read: ReadRange, size: int, where: str) -> bytes:
  """The bytes of a file up to the data: the header and its length."""
  start = read(0, min(size, _FIRST_READ))
  if len(start) < 8:
    raise CheckpointError(where, [f"not a safetensors file: it has only {size} bytes"])
  (length,) = struct.unpack("<Q", start[:8])
  if length > size - 8:
    raise CheckpointError(
      where,
      [
        f"the header claims {length} bytes, but the file has {size}: it is truncated or not a safetensors file"
      ],
    )
  if length > _MAX_HEADER:
    raise CheckpointError(where, [f"the header has {length} bytes, but at most {_MAX_HEADER} are read"])
  if len(start) < 8 + length:
    start += read(len(start), 8 + length)
  return start[: 8 + length]


def _object(text: bytes, where: str) -> dict[str, Any]:
  """The JSON object that a header holds."""
  try:
    header = parse_json(text)
  except (ValueError, RecursionError) as error:
    raise CheckpointError(where, [f"the header is not valid JSON: {error}"]) from None
  if not isinstance(header, dict):
    raise CheckpointError(
      where, [f"the header holds a value of type {type(header).__name__}, expected a JSON object"]
    )
  return header


def _gaps(infos: Sequence[TensorInfo], data: int, size: int) -> Iterator[str]:
  """The first place where tensors, in the order of their bytes, do not fill a file from `data` to its end."""
  end = data
  for info in infos:
    if info.start != end:
      yield (
        f"{info.name}: its data starts at byte {info.start} and "
        f"{'overlaps' if info.start < end else 'leaves a gap after'} what precedes it, which ends at byte {end}"
      )
      return
    end = info.stop
  if end != size:
    yield (
      f"the file has {size} bytes, but its header describes {end}: it is truncated or overwritten; download it again"
    )


def _tensor(name: str, entry: Any, file: str, data: int) -> TensorInfo:
  if not isinstance(entry, dict):
    raise ValueError("its header entry is not a JSON object")
  if lacking := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
    raise ValueError(f"its header entry lacks {', '.join(lacking)}")
  kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise ValueError(f"its dtype {kind!r} is not one of {', '.join(DTYPES)}")
  for key, numbers in (("shape", shape), ("data_offsets", offsets)):
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
      raise ValueError(f"its {key} is {numbers!r}, expected a list of whole numbers")
  if len(offsets) != 2:
    raise ValueError(f"its data_offsets is {offsets!r}, expected two numbers")
  start, stop = offsets
  if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
    raise ValueError(
      f"its data_offsets span {stop - start} bytes, which does not fit {kind} of shape {tuple(shape)}"
    )
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


def shard_name(number: int, count: int, token: str = "") -> str:
  """The name of one of several files, counted from 1; with a token, a name that only one save uses."""
  return f"model-{token and token + '-'}{number:05}-of-{count:05}.safetensors"


def _is_safetensors(name: str) -> bool:
  return name.endswith(".safetensors")


def safetensors_entries(files: Files) -> set[str]:
  """Names of the index, of the files that it lists, and of other files with the names that savers use."""
  names = set(files.names())
  found = {name for name in names if name in (INDEX, SINGLE) or _SHARD.fullmatch(name)}
  with contextlib.suppress(ConfigError, AttributeError):
    weight_map = read_json(files, INDEX).get("weight_map", {}) if INDEX in names else {}
    found |= {name for name in weight_map.values() if isinstance(name, str) and is_inside(name)} & names
  return found


def _entries(directory: str) -> set[str]:
  # A link that leads nowhere is no file, but is replaced, too.
  dangling = {name for name in os.listdir(directory) if name in (INDEX, SINGLE) or _SHARD.fullmatch(name)}
  with contextlib.suppress(OSError):
    return dangling | safetensors_entries(LocalFiles(directory))
  return dangling


SAFETENSORS = Format(
  name="safetensors",
  naming="huggingface",
  owns=_is_safetensors,
  is_in=lambda files: any(map(_is_safetensors, files.names())),
  read=read_safetensors,
  entries=_entries,
)
