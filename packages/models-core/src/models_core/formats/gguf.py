"""GGUF files: headers, read by byte ranges, and the codecs of quantised tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from models_core.errors import CheckpointError
from models_core.extras import require
from models_core.formats.byte_reader import BytesCheckpoint
from models_core.formats.checkpoint import Format, Header
from models_core.formats.files import Files, LocalFiles, ReadRange, open_file, reading
from models_core.formats.kinds import FIRST, GGUF_MAGIC, is_gguf, named, strangeness
from models_core.formats.left_out import left_out
from models_core.formats.selection import PART_NAME, is_projector, listed, show, split_groups
from models_core.formats.tensors import Codec, TensorInfo

_VERSIONS = (2, 3)
_FIRST_READ = 256 * 1024
# Headers with the largest vocabularies have about 20 MB.
_MAX_HEADER = 128 * 1024 * 1024
_MAX_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
# Elements to decode at a time: as float32 they take 1 MiB, which fits in a cache, and Python's overhead is small.
_DECODED_AT_ONCE = 1 << 18
_SUFFIX = ".gguf"
# Bytes of a file that hold its first keys.
_KEYS = 4096
# `general.type` of files that hold no language model -> what they hold.
_OTHER_MODELS = {
  "mmproj": "the projector of a vision tower",
  "adapter": "a LoRA adapter",
  "imatrix": "an importance matrix",
}

# Scalar types of metadata -> struct's format character, which is NumPy's too.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Tensor types whose bytes are the elements -> dtype.
_PLAIN = {
  0: np.dtype(np.float32),
  1: np.dtype(np.float16),
  24: np.dtype(np.int8),
  25: np.dtype(np.int16),
  26: np.dtype(np.int32),
  27: np.dtype(np.int64),
  28: np.dtype(np.float64),
  30: np.dtype(ml_dtypes.bfloat16),
}

# Quantised tensor types -> name, elements in a block, bytes in a block.
_QUANTISED = {
  2: ("Q4_0", 32, 18),
  3: ("Q4_1", 32, 20),
  6: ("Q5_0", 32, 22),
  7: ("Q5_1", 32, 24),
  8: ("Q8_0", 32, 34),
  10: ("Q2_K", 256, 84),
  11: ("Q3_K", 256, 110),
  12: ("Q4_K", 256, 144),
  13: ("Q5_K", 256, 176),
  14: ("Q6_K", 256, 210),
  16: ("IQ2_XXS", 256, 66),
  17: ("IQ2_XS", 256, 74),
  18: ("IQ3_XXS", 256, 98),
  19: ("IQ1_S", 256, 50),
  20: ("IQ4_NL", 32, 18),
  21: ("IQ3_S", 256, 110),
  22: ("IQ2_S", 256, 82),
  23: ("IQ4_XS", 256, 136),
  29: ("IQ1_M", 256, 56),
  34: ("TQ1_0", 256, 54),
  35: ("TQ2_0", 256, 66),
  39: ("MXFP4", 32, 17),
}


class GgufCheckpoint(BytesCheckpoint):
  """A checkpoint in GGUF files. Its metadata includes the configuration and the tokenizer."""

  @property
  def format(self) -> Format:
    """The GGUF format."""
    return GGUF


def read_gguf(files: Files) -> GgufCheckpoint:
  """Reads the headers of a GGUF checkpoint: one file, or all parts of a split one.

  Shapes have the slowest axis first, unlike in the files. A quantised tensor has dtype float32 and a codec. The
  metadata includes every key: numbers, strings and booleans as Python values, arrays of strings as tuples, other arrays
  as NumPy arrays. If the parts of a split checkpoint give a key different values, the first part's value counts.

  Args:
    files: a directory that holds one checkpoint, or one file. Any part of a split file stands for all of them. The
      projector of a vision tower and other files without a language model are left out, with a note.

  Raises:
    CheckpointError: if files are missing, ambiguous, truncated or malformed in any way.
  """
  files = _with_other_parts(files)
  parts = _parts(files)
  if "/" in parts[0] and not files.path.endswith(parts[0]):
    # The path of the file itself, by which its tokenizer is found.
    files = show(files, files.names(), file=parts[0])
  tensors: dict[str, TensorInfo] = {}
  metadata: dict[str, object] = {}
  headers: dict[str, Header] = {}
  problems: list[str] = []
  for number, name in enumerate(parts):
    keys, found, headers[name] = _read_header(files, name)
    problems += _split_problems(name, keys, number, len(parts))
    metadata = keys | metadata
    for info in found:
      if (twin := tensors.setdefault(info.name, info)) is not info:
        problems.append(f"{name}: the tensor {info.name} is also in {twin.file}: download both files again")
  if not problems and (kind := _OTHER_MODELS.get(str(metadata.get("general.type")))):
    problems.append(f"{parts[0]} is {kind}, not a language model: load the GGUF file of the model")
  total = metadata.get("split.tensors.count", len(tensors))
  if not problems and total != len(tensors):
    problems.append(
      f"{parts[0]}: split.tensors.count is {total!r}, but the number of tensors is {len(tensors)}: "
      "download the checkpoint again"
    )
  if problems:
    raise CheckpointError(files.path, problems)
  return GgufCheckpoint(files, tensors, metadata, notes=tuple(left_out(files, parts)), headers=headers)


def _with_other_parts(files: Files) -> Files:
  """The given files, or if they are one part of a split file on this machine, all of its parts."""
  names = files.names()
  part = PART_NAME.fullmatch(names[0]) if len(names) == 1 else None
  if part is None or not os.path.isfile(files.path):
    return files
  directory = LocalFiles(os.path.dirname(os.path.abspath(files.path)))
  group = next(group for group in split_groups(directory.names()) if names[0] in group)
  return show(directory, group, file=names[0])


def _parts(files: Files) -> Sequence[str]:
  """Names of the files of the only checkpoint, in the order of their numbers."""
  checkpoints = [_numbered(group) for group in split_groups(_candidates(files))]
  if not checkpoints:
    raise CheckpointError(
      files.path, ["there is no .gguf file: pass the path of a GGUF file or of its directory"]
    )
  if len(checkpoints) > 1:
    left = [one for one in checkpoints if not is_projector(_first(one))]
    checkpoints = left if len(left) == 1 else [one for one in left if not _is_other_model(files, _first(one))]
  if len(checkpoints) != 1:
    firsts = listed(map(_first, checkpoints))
    raise CheckpointError(
      files.path,
      [f"it holds several checkpoints ({firsts}): choose one with file=, or pass the path of one file"],
    )
  ((stem, count, numbers),) = checkpoints
  if not count:
    return list(numbers.values())
  # Only the numbers of existing files are compared, since a file name may claim 99999 parts.
  here = sum(1 <= number <= count for number in numbers)
  if here != count:
    missing = next(n for n in range(1, count + 1) if n not in numbers)
    name = f"{stem}-{missing:05}-of-{count:05}.gguf"
    remedy = "the download or copy is incomplete; all parts must lie in one directory"
    raise CheckpointError(files.path, [f"{here} of {count} parts are here, but {name} is missing: {remedy}"])
  if len(numbers) != count:
    surplus = next(name for number, name in numbers.items() if not 1 <= number <= count)
    raise CheckpointError(files.path, [f"{surplus} is not one of {count} parts: remove it"])
  return [numbers[n] for n in sorted(numbers)]


def _candidates(files: Files) -> list[str]:
  """Names of the GGUF files at the top level; if there are none, of those in folders."""
  return named(files, _SUFFIX, is_gguf) or [name for name in files.names() if _is_gguf(name)]


# The stem of a checkpoint's file names, its number of parts (0 if it is not split), and the name of each part.
_Numbered = tuple[str, int, dict[int, str]]


def _numbered(group: Sequence[str]) -> _Numbered:
  parts = [(PART_NAME.fullmatch(name), name) for name in group]
  numbers = {int(part["number"]) if part else 0: name for part, name in parts}
  part, name = parts[0]
  return (part["stem"], int(part["count"]), numbers) if part else (name, 0, numbers)


def _first(checkpoint: _Numbered) -> str:
  numbers = checkpoint[2]
  return numbers[min(numbers)]


def _is_other_model(files: Files, name: str) -> bool:
  """Whether the first keys of a GGUF file say that it holds no language model."""
  start = files.read(name, 0, _KEYS)
  at = start.find(b"general.type")
  # A string: the key, the type 8, its length, its bytes.
  value = start[at + len(b"general.type") + 12 :][:16] if at >= 0 else b""
  return any(value.startswith(kind.encode()) for kind in _OTHER_MODELS)


def _split_problems(name: str, metadata: dict[str, object], number: int, count: int) -> list[str]:
  """Contradictions between the `split` keys of a part and the file names."""
  stated = metadata.get("split.count", 1 if count == 1 else None)
  if stated != count and not (count == 1 and stated == 0):
    return [f"{name}: split.count is {stated!r}, but the file names give {count}: restore the original names"]
  if count > 1 and metadata.get("split.no") != number:
    return [
      f"{name}: split.no is {metadata.get('split.no')!r}, but the file name says {number} (counted from 0): "
      "restore the original names"
    ]
  return []


class _Cursor:
  """A position in a file's header, which is fetched in chunks of increasing size."""

  def __init__(self, read: ReadRange, size: int, name: str, where: str):
    self.read, self.size, self.name, self.where = read, size, name, where
    self.buffer = b""
    self.position = 0

  def fail(self, problem: str) -> NoReturn:
    raise CheckpointError(self.where, [f"{self.name}: {problem}"])

  def need(self, count: int, what: str) -> None:
    """Makes sure that `count` bytes from the position on are in the buffer; an error calls them `what`."""
    stop = self.position + count
    if stop <= len(self.buffer):
      return
    if stop > self.size:
      self.fail(
        f"truncated or malformed: {what} at byte {self.position} needs {count} bytes, but the file has "
        f"{self.size} in all; download it again"
      )
    if stop > _MAX_HEADER:
      self.fail(
        f"malformed: {what} at byte {self.position} makes the header longer than {_MAX_HEADER} bytes, "
        "the most that is read"
      )
    target = min(max(stop, 2 * len(self.buffer), _FIRST_READ), self.size)
    self.buffer += self.read(len(self.buffer), target)
    if len(self.buffer) < stop:
      self.fail(
        f"truncated: the file has {self.size} bytes, but reading ends at byte {len(self.buffer)}; download it again"
      )

  def take(self, count: int, what: str) -> bytes:
    self.need(count, what)
    start, self.position = self.position, self.position + count
    return self.buffer[start : self.position]

  def scalar(self, letter: str, what: str) -> Any:
    (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))
    return value

  def count(self, least: int, what: str) -> int:
    """Reads a number of items, and checks that the file has room for so many of at least `least` bytes each."""
    count = self.scalar("Q", f"the number of {what}")
    if count * least > self.size - self.position:
      self.fail(
        f"truncated or malformed: the header announces {count} {what}, more than the file's {self.size} bytes can "
        "hold; download it again"
      )
    return count

  def string(self, what: str) -> str:
    data = self.take(self.count(1, f"bytes of {what}"), what)
    try:
      return data.decode()
    except UnicodeDecodeError:
      self.fail(f"malformed: {what}, ending at byte {self.position}, is not UTF-8: {data[:40]!r}")

  def strings(self, count: int, what: str) -> tuple[str, ...]:
    # The loop calls no method for most strings, since a vocabulary has hundreds of thousands of them.
    unpack, values = struct.Struct("<Q").unpack_from, []
    buffer, position = self.buffer, self.position
    try:
      for _ in range(count):
        if position + 8 > len(buffer):
          self.position = position
          self.need(8, what)
          buffer = self.buffer
        start = position + 8
        position = start + unpack(buffer, position)[0]
        if position > len(buffer):
          self.position = start
          self.need(position - start, what)
          buffer = self.buffer
        values.append(buffer[start:position].decode())
    except UnicodeDecodeError as error:
      self.fail(f"malformed: string {len(values)} of {what} is not UTF-8: {error.object[:40]!r}")
    self.position = position
    return tuple(values)

  def value(self, kind: int, what: str) -> object:
    if kind == _STRING:
      return self.string(what)
    if kind == _ARRAY:
      return self.array(what)
    if kind == _BOOL:
      return self.booleans(1, what)[0] == 1
    if kind not in _SCALARS:
      self.fail(f"malformed: {what} has the unknown type {kind}")
    return self.scalar(_SCALARS[kind], what)

  def array(self, what: str) -> tuple[str, ...] | np.ndarray:
    kind = self.scalar("I", what)
    if kind == _STRING:
      return self.strings(self.count(8, f"strings of {what}"), what)
    if kind not in _SCALARS:
      self.fail(f"malformed: {what} is an array of the unknown type {kind}")
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    count = self.count(dtype.itemsize, f"elements of {what}")
    if kind == _BOOL:
      return np.frombuffer(self.booleans(count, what), np.bool_)
    return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

  def booleans(self, count: int, what: str) -> bytes:
    data = self.take(count, what)
    if data.strip(b"\0\1"):
      self.fail(
        f"malformed: {what}, ending at byte {self.position}, has a value that is neither true nor false"
      )
    return data


def _read_header(files: Files, name: str) -> tuple[dict[str, object], list[TensorInfo], Header]:
  """The metadata, the tensors and the header's fingerprint of one file."""
  with reading(f"{files.path}/{name}"), open_file(files, name) as read:
    return _parse(_Cursor(read, files.size(name), name, files.path))


def _parse(cursor: _Cursor) -> tuple[dict[str, object], list[TensorInfo], Header]:
  _check_version(cursor)
  tensor_count = cursor.count(24, "tensors")
  key_count = cursor.count(13, "keys")
  metadata: dict[str, object] = {}
  for _ in range(key_count):
    key = cursor.string("a key")
    if key in metadata:
      cursor.fail(f"malformed: the key {key} occurs twice")
    metadata[key] = cursor.value(cursor.scalar("I", f"the type of {key}"), key)
  raw = [_read_tensor(cursor) for _ in range(tensor_count)]
  alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
  if (
    not isinstance(alignment, int)
    or isinstance(alignment, bool)
    or alignment < 1
    or alignment & (alignment - 1)
  ):
    cursor.fail(f"malformed: {_ALIGNMENT} is {alignment!r}, expected a power of two")
  data_start = -(-cursor.position // alignment) * alignment
  problems, tensors = [], []
  for tensor, shape, kind, offset in raw:
    try:
      tensors.append(_locate(cursor.name, tensor, shape, kind, data_start, offset, alignment))
    except ValueError as error:
      problems.append(f"{cursor.name}: the tensor {tensor} {error}")
  if beyond := [info for info in tensors if info.stop > cursor.size]:
    first, more = beyond[0], f", as {len(beyond) - 1} more tensors do" if len(beyond) > 1 else ""
    problems.append(
      f"{cursor.name}: the tensor {first.name} of shape {first.shape} ends at byte {first.stop}, but the file has "
      f"{cursor.size} bytes{more}: download it again"
    )
  problems += [f"{cursor.name}: {problem}" for problem in _clashes([t for t in tensors if t not in beyond])]
  if problems:
    raise CheckpointError(cursor.where, problems)
  return metadata, tensors, Header.of(cursor.buffer[: cursor.position])


def _check_version(cursor: _Cursor) -> None:
  magic = cursor.take(4, "the magic number")
  if magic != GGUF_MAGIC:
    if what := strangeness(cursor.buffer[:FIRST]):
      raise CheckpointError(cursor.where, [f"{cursor.name} {what}"])
    cursor.fail(f"not a GGUF file: it begins with {magic!r}, not with {GGUF_MAGIC!r}")
  version = cursor.scalar("I", "the version")
  if version and not version & 0xFFFF:
    cursor.fail(
      "the file is big-endian, but only little-endian GGUF files are read: convert it with gguf-convert-endian"
    )
  if version not in _VERSIONS:
    versions = " and ".join(map(str, _VERSIONS))
    cursor.fail(f"GGUF version {version} is not supported, only {versions}: convert the model again")


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
  """Reads the name, shape, type and offset of the next tensor."""
  name = cursor.string("a tensor's name")
  rank = cursor.scalar("I", f"the rank of {name}")
  if rank > _MAX_DIMENSIONS:
    cursor.fail(f"malformed: the tensor {name} has {rank} axes, but GGUF allows at most {_MAX_DIMENSIONS}")
  # The file lists the fastest axis first.
  shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, f"the shape of {name}"))[::-1]
  kind, offset = struct.unpack("<IQ", cursor.take(12, f"the place of {name}"))
  return name, shape, kind, offset


def _locate(
  file: str,
  name: str,
  shape: tuple[int, ...],
  kind: int,
  data_start: int,
  offset: int,
  alignment: int,
) -> TensorInfo:
  """Checks the header's entry of a tensor and computes which bytes of the file it takes.

  Raises:
    ValueError: with the end of a sentence that begins with the tensor's name.
  """
  if kind not in _PLAIN and kind not in _QUANTISED:
    known = ", ".join([str(d) for d in _PLAIN.values()] + [n for n, _, _ in _QUANTISED.values()])
    raise ValueError(f"has the unknown type {kind}; the known types are {known}")
  dtype, codec = _PLAIN.get(kind, np.dtype(np.float32)), _codec(kind) if kind in _QUANTISED else None
  if 0 in shape:
    raise ValueError(f"is empty: its shape is {shape}")
  count = math.prod(shape)
  if codec is None:
    length = count * dtype.itemsize
  elif not shape or shape[-1] % codec.block_size:
    raise ValueError(
      f"has shape {shape}, but {codec.name} stores the last axis in blocks of {codec.block_size} elements"
    )
  else:
    length = count // codec.block_size * codec.block_bytes
  start = data_start + offset
  if offset % alignment:
    raise ValueError(f"is misaligned: its offset {offset} is not a multiple of {alignment}")
  return TensorInfo(
    name=name, dtype=dtype, shape=shape, file=file, start=start, stop=start + length, codec=codec
  )


def _clashes(tensors: Sequence[TensorInfo]) -> list[str]:
  """Problems of tensors of one file that have the same name or overlap."""
  problems, names = [], set()
  for info in tensors:
    if info.name in names:
      problems.append(f"the tensor {info.name} occurs twice")
    names.add(info.name)
  placed = sorted(tensors, key=lambda info: info.start)
  problems += [
    f"the tensors {a.name} (bytes {a.start} to {a.stop}) and {b.name} ({b.start} to {b.stop}) overlap"
    for a, b in itertools.pairwise(placed)
    if b.start < a.stop
  ]
  return problems


@functools.cache
def _codec(kind: int) -> Codec:
  name, block_size, block_bytes = _QUANTISED[kind]
  return Codec(name, block_size, block_bytes, _decoder(kind, name, block_size, block_bytes))


def _decoder(kind: int, name: str, block_size: int, block_bytes: int) -> Callable[[np.ndarray], np.ndarray]:
  """A function that decodes blocks: uint8 [n * block_bytes] -> float32 [n * block_size]."""

  def decode(data: np.ndarray) -> np.ndarray:
    quants = require("gguf.quants", "models-core[gguf]", f"Decoding {name} tensors")
    encoding = quants.GGMLQuantizationType(kind)
    out = np.empty(data.size // block_bytes * block_size, np.float32)
    step = _DECODED_AT_ONCE // block_size
    for block in range(0, data.size // block_bytes, step):
      encoded = data[block * block_bytes : (block + step) * block_bytes]
      out[block * block_size : (block + step) * block_size] = quants.dequantize(encoded, encoding)
    return out

  return decode


def _is_gguf(name: str) -> bool:
  return name.endswith(_SUFFIX)


GGUF = Format(
  name="gguf",
  naming="gguf",
  owns=_is_gguf,
  is_in=lambda files: bool(_candidates(files)),
  read=read_gguf,
  # No saver writes GGUF, so a new checkpoint replaces no GGUF files: it is saved beside them.
  entries=lambda directory: frozenset(),
)
