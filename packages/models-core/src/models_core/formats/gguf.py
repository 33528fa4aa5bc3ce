"""GGUF files: the header, read by byte ranges, and the codecs of quantised tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from models_core.errors import CheckpointError
from models_core.extras import require
from models_core.formats.byte_reader import BytesCheckpoint
from models_core.formats.checkpoint import Format, Header
from models_core.formats.files import Files, ReadRange, open_file
from models_core.formats.tensors import Codec, TensorInfo

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FIRST_READ = 256 * 1024
# The largest vocabularies make headers of some 20 MB.
_MAX_HEADER = 128 * 1024 * 1024
_MAX_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
# Elements decoded at a time: 1 MiB of float32 stays in the cache, and the interpreter's share is small.
_DECODED_AT_ONCE = 1 << 18
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

# Metadata's scalar types: struct's letter, which is numpy's too.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Tensor types whose bytes are the elements.
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

# Quantised tensor types: name, elements of a block, bytes of a block.
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
  """The tensors of GGUF files, whose metadata hold the configuration and the tokenizer."""

  @property
  def format(self) -> Format:
    """GGUF."""
    return GGUF


def read_gguf(files: Files) -> GgufCheckpoint:
  """Reads the headers of a GGUF checkpoint: one file, or all parts of a split one.

  Shapes are slowest axis first. A quantised tensor has dtype float32 and a codec. Metadata holds every key: numbers,
  strings and booleans as Python's, arrays of strings as tuples, other arrays as numpy's. Of a split checkpoint, the
  first part's value counts.

  Args:
    files: a directory with one checkpoint, or one file.

  Raises:
    CheckpointError: for files that are missing, ambiguous, cut off or malformed in any way.
  """
  parts = _parts(files)
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
        problems.append(f"{name}: the tensor {info.name} is in {twin.file} already")
  total = metadata.get("split.tensors.count", len(tensors))
  if not problems and total != len(tensors):
    problems.append(
      f"{parts[0]}: split.tensors.count is {total!r}, but the parts hold {len(tensors)} tensors"
    )
  if problems:
    raise CheckpointError(files.path, problems)
  return GgufCheckpoint(files, tensors, metadata, headers=headers)


def _parts(files: Files) -> Sequence[str]:
  """The names of the one checkpoint's files, in order."""
  checkpoints: dict[tuple[str, int], dict[int, str]] = {}
  for name in sorted(filter(_is_gguf, files.names())):
    part = _PART.fullmatch(name)
    key = (part["stem"], int(part["count"])) if part else (name, 0)
    checkpoints.setdefault(key, {})[int(part["number"]) if part else 0] = name
  if not checkpoints:
    raise CheckpointError(files.path, ["there is no .gguf file"])
  if len(checkpoints) > 1:
    firsts = ", ".join(numbers[min(numbers)] for numbers in checkpoints.values())
    raise CheckpointError(files.path, [f"several checkpoints lie here ({firsts}): pass the path of one file"])
  (((stem, count), numbers),) = checkpoints.items()
  if not count:
    return list(numbers.values())
  # Compared as sets of what is there, so that an absurd count allocates nothing.
  if len(numbers) != count or min(numbers) != 1 or max(numbers) != count:
    missing = next(n for n in range(1, len(numbers) + 2) if n not in numbers)
    name = f"{stem}-{missing:05}-of-{count:05}.gguf"
    raise CheckpointError(
      files.path,
      [
        f"{len(numbers)} of {count} parts are here, {name} is missing: pass the directory that holds all parts"
      ],
    )
  return [numbers[n] for n in sorted(numbers)]


def _split_problems(name: str, metadata: dict[str, object], number: int, count: int) -> list[str]:
  """Where a part's own account of the split differs from the file names."""
  stated = metadata.get("split.count", 1 if count == 1 else None)
  if stated != count and not (count == 1 and stated == 0):
    return [f"{name}: split.count is {stated!r}, but by the file names there are {count} parts"]
  if count > 1 and metadata.get("split.no") != number:
    return [
      f"{name}: split.no is {metadata.get('split.no')!r}, but by its name it is part {number}, counted from 0"
    ]
  return []


class _Cursor:
  """A position in a file's header; bytes are fetched in chunks that grow."""

  def __init__(self, read: ReadRange, size: int, name: str, where: str):
    self.read, self.size, self.name, self.where = read, size, name, where
    self.buffer = b""
    self.position = 0

  def fail(self, problem: str) -> NoReturn:
    raise CheckpointError(self.where, [f"{self.name}: {problem}"])

  def need(self, count: int, what: str) -> None:
    """Makes `count` bytes from the position on available."""
    stop = self.position + count
    if stop <= len(self.buffer):
      return
    if stop > self.size:
      self.fail(
        f"cut off or malformed: {what} at byte {self.position} needs {count} bytes, the file has {self.size}"
      )
    if stop > _MAX_HEADER:
      self.fail(f"malformed: {what} at byte {self.position} makes the header longer than {_MAX_HEADER} bytes")
    target = min(max(stop, 2 * len(self.buffer), _FIRST_READ), self.size)
    self.buffer += self.read(len(self.buffer), target)
    if len(self.buffer) < stop:
      self.fail(f"cut off: its size is {self.size} bytes, reading ends at byte {len(self.buffer)}")

  def take(self, count: int, what: str) -> bytes:
    self.need(count, what)
    start, self.position = self.position, self.position + count
    return self.buffer[start : self.position]

  def scalar(self, letter: str, what: str) -> Any:
    (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))
    return value

  def count(self, least: int, what: str) -> int:
    """A number of items that take at least `least` bytes each."""
    count = self.scalar("Q", f"the number of {what}")
    if count * least > self.size - self.position:
      self.fail(
        f"cut off or malformed: it announces {count} {what}, more than its {self.size} bytes can hold"
      )
    return count

  def string(self, what: str) -> str:
    data = self.take(self.count(1, f"bytes of {what}"), what)
    try:
      return data.decode()
    except UnicodeDecodeError:
      self.fail(f"malformed: {what} before byte {self.position} is not UTF-8: {data[:40]!r}")

  def strings(self, count: int, what: str) -> tuple[str, ...]:
    # A loop without calls, since vocabularies hold hundreds of thousands.
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
      self.fail(f"malformed: {what}: string {len(values)} is not UTF-8: {error.object[:40]!r}")
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
      self.fail(f"malformed: {what} before byte {self.position} is neither true nor false")
    return data


def _read_header(files: Files, name: str) -> tuple[dict[str, object], list[TensorInfo], Header]:
  """Metadata and tensors of one file, and what its header is recognised by."""
  with open_file(files, name) as read:
    return _parse(_Cursor(read, files.size(name), name, files.path))


def _parse(cursor: _Cursor) -> tuple[dict[str, object], list[TensorInfo], Header]:
  _check_version(cursor)
  tensor_count = cursor.count(24, "tensors")
  key_count = cursor.count(13, "keys")
  metadata: dict[str, object] = {}
  for _ in range(key_count):
    key = cursor.string("a key")
    if key in metadata:
      cursor.fail(f"malformed: the key {key} is doubled")
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
      tensors.append(_locate(cursor.name, tensor, shape, kind, data_start, offset, alignment, cursor.size))
    except ValueError as error:
      problems.append(f"{cursor.name}: the tensor {tensor} {error}")
  problems += [f"{cursor.name}: {problem}" for problem in _clashes(tensors)]
  if problems:
    raise CheckpointError(cursor.where, problems)
  return metadata, tensors, Header.of(cursor.buffer[: cursor.position])


def _check_version(cursor: _Cursor) -> None:
  magic = cursor.take(4, "the magic number")
  if magic != _MAGIC:
    cursor.fail(f"not a GGUF file: it begins with {magic!r}")
  version = cursor.scalar("I", "the version")
  if version and not version & 0xFFFF:
    cursor.fail(
      "a big-endian GGUF file; only little-endian ones are read: convert it with gguf-convert-endian"
    )
  if version not in _VERSIONS:
    cursor.fail(f"GGUF version {version}; only {' and '.join(map(str, _VERSIONS))} are read")


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
  """Name, shape, type and offset."""
  name = cursor.string("a tensor's name")
  rank = cursor.scalar("I", f"the rank of {name}")
  if rank > _MAX_DIMENSIONS:
    cursor.fail(f"malformed: the tensor {name} has {rank} axes, at most {_MAX_DIMENSIONS} are possible")
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
  size: int,
) -> TensorInfo:
  """A tensor with its place in the file, checked. Raises ValueError with the rest of a sentence."""
  if kind not in _PLAIN and kind not in _QUANTISED:
    known = ", ".join([str(d) for d in _PLAIN.values()] + [n for n, _, _ in _QUANTISED.values()])
    raise ValueError(f"has the unknown type {kind}; known are {known}")
  dtype, codec = _PLAIN.get(kind, np.dtype(np.float32)), _codec(kind) if kind in _QUANTISED else None
  if 0 in shape:
    raise ValueError(f"is empty: its shape is {shape}")
  count = math.prod(shape)
  if codec is None:
    length = count * dtype.itemsize
  elif not shape or shape[-1] % codec.block_size:
    raise ValueError(f"of shape {shape} does not consist of {codec.name}'s blocks of {codec.block_size}")
  else:
    length = count // codec.block_size * codec.block_bytes
  start = data_start + offset
  if offset % alignment:
    raise ValueError(f"is misaligned: its offset {offset} is no multiple of {alignment}")
  if start + length > size:
    raise ValueError(
      f"of shape {shape} ends at byte {start + length}, beyond the file's {size}: the file is cut off"
    )
  return TensorInfo(
    name=name, dtype=dtype, shape=shape, file=file, start=start, stop=start + length, codec=codec
  )


def _clashes(tensors: Sequence[TensorInfo]) -> list[str]:
  """Tensors of one file with one name or with common bytes."""
  problems, names = [], set()
  for info in tensors:
    if info.name in names:
      problems.append(f"the tensor {info.name} is doubled")
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
  """uint8 [n * block_bytes] -> float32 [n * block_size]."""

  def decode(data: np.ndarray) -> np.ndarray:
    quants = require("gguf.quants", "models-core[gguf]", f"Decoding {name} tensors")
    encoding = quants.GGMLQuantizationType(kind)
    out = np.empty(data.size // block_bytes * block_size, np.float32)
    step = _DECODED_AT_ONCE // block_size
    for block in range(0, data.size // block_bytes, step):
      piece = data[block * block_bytes : (block + step) * block_bytes]
      out[block * block_size : (block + step) * block_size] = quants.dequantize(piece, encoding)
    return out

  return decode


def _is_gguf(name: str) -> bool:
  return name.endswith(".gguf")


GGUF = Format(
  name="gguf",
  naming="gguf",
  owns=_is_gguf,
  is_in=lambda files: any(map(_is_gguf, files.names())),
  read=read_gguf,
  # Files of whatever name, which no saver writes: a checkpoint in another format lies beside them.
  entries=lambda directory: frozenset(),
)
