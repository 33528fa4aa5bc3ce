"""Headers of safetensors files, which are checked completely before any tensor data is read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from models_core.errors import CheckpointError, ConfigError
from models_core.formats.byte_reader import BytesCheckpoint
from models_core.formats.checkpoint import Format, Header
from models_core.formats.files import Files, LocalFiles, ReadRange, open_file, reading
from models_core.formats.json_files import parse_json, read_json
from models_core.formats.kinds import is_safetensors, named, strangeness
from models_core.formats.left_out import left_out
from models_core.formats.memory import ALIGNMENT
from models_core.formats.safetensors_files import (
  INDEX,
  SINGLE,
  SUFFIX,
  choose_files,
  contradictions,
  is_inside,
  is_safetensors_name,
)
from models_core.formats.tensors import TensorInfo

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

  The checkpoint consists, as in transformers, of `model.safetensors`; without it, of the files that the index lists;
  without that, of all safetensors files at the top level whose tensors have different names. An index only says which
  files count: the headers say which tensors they hold.

  Returns:
    The checkpoint. Its `problems` name every file that is missing or broken, and tensors that occur twice. Its `notes`
    name files that are not loaded, and contradictions between the index and the headers.

  Raises:
    CheckpointError: if there is no safetensors file.
  """
  chosen = choose_files(files)
  problems, unread = list(chosen.problems), dict(chosen.unread)
  tensors: dict[str, TensorInfo] = {}
  metadata: dict[str, object] = {}
  headers: dict[str, Header] = {}
  twins: dict[tuple[str, str], list[str]] = {}
  broken: dict[tuple[str, str], list[str]] = {}
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    read = [pool.submit(_read_file, files, name) for name in chosen.names]
  for name, under_way in zip(chosen.names, read, strict=True):
    try:
      file = under_way.result()
    except CheckpointError as error:
      for problem in error.problems:
        # The same mistake made all Git LFS pointers. Other broken files are broken each in its own way.
        broken.setdefault((problem, "" if _is_strange(problem) else name), []).append(name)
      unread[name] = chosen.expected(name)
      continue
    headers[name] = file.header
    metadata |= file.metadata
    for info in file.tensors:
      if (twin := tensors.setdefault(info.name, info)) is not info:
        twins.setdefault((twin.file, info.file), []).append(info.name)
  problems += [_broken(names, problem) for (problem, _), names in broken.items()]
  problems += [_twice(pair, names, chosen.index) for pair, names in twins.items()]
  used = {*chosen.names, *unread, *([chosen.index] if chosen.index else [])}
  notes = [*chosen.notes, *contradictions(chosen, tensors, unread), *left_out(files, used)]
  tensors |= _aliases(tensors, metadata)
  return SafetensorsCheckpoint(
    files, tensors, metadata, tuple(problems), tuple(notes), unread=unread, headers=headers
  )


def _broken(names: Sequence[str], problem: str) -> str:
  more = f"; so are {len(names) - 1} other files, such as {names[1]}" if names[1:] else ""
  return f"{names[0]}{' ' if _is_strange(problem) else ': '}{problem}{more}"


def _is_strange(problem: str) -> bool:
  return problem.startswith(("is ", "begins ", "cannot "))


def _twice(pair: tuple[str, str], names: Sequence[str], index: str | None) -> str:
  one, other = pair
  if len(names) == 1:
    return f"{names[0]} occurs twice: in {one} and in {other}; remove one"
  choice = "" if index else f", or choose with file={other!r}"
  return f"{names[0]} and {len(names) - 1} more tensors occur twice: in {one} and in {other}; remove one of the files{choice}"


def _aliases(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, object]) -> dict[str, TensorInfo]:
  """Tensors that are stored under another name: of those that share memory, `safetensors.torch.save_model` writes one.

  It notes the others in the metadata: `{"model.embed_tokens.weight": "lm_head.weight"}`.
  """
  return {
    name: dataclasses.replace(tensors[stored], name=name)
    for name, stored in metadata.items()
    if name not in tensors and isinstance(stored, str) and stored in tensors
  }


def read_safetensors_file(files: Files, name: str) -> SafetensorsCheckpoint:
  """Reads the header of one file. Other files are not looked at.

  Raises:
    CheckpointError: if the header is malformed, or does not describe each byte of the file exactly once.
  """
  file = _read_file(files, name)
  tensors = {info.name: info for info in file.tensors}
  return SafetensorsCheckpoint(files, tensors, file.metadata, headers={name: file.header})


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
    CheckpointError: if the file cannot be read, the header is malformed, or does not describe each byte of the file
      exactly once.
  """
  where = f"{files.path}/{name}"
  with reading(where), open_file(files, name) as read:
    return _parse(read, files.size(name), name, where)


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
  if what := strangeness(start):
    raise CheckpointError(where, [what])
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
  owns=is_safetensors_name,
  is_in=lambda files: bool(named(files, SUFFIX, is_safetensors)),
  read=read_safetensors,
  entries=_entries,
)
