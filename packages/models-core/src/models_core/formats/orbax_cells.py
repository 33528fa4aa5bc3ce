"""Cells of zarr arrays as streams: read by ranges, and decoded straight into memory that the caller has.

TensorStore decodes a cell into memory that it asks the system for anew, which costs more than decoding it. It stays the
way to read what is stored in any other manner: other compressors, filters, shards, orders of axes or of bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np

from models_core.extras import require

# Bytes of a request: enough that its cost does not count. Each thread holds two at a time.
_LOCAL, _REMOTE = 1 << 20, 8 << 20
# What is passed over is decoded so many bytes at a time.
_PASSED = 256 << 10

# Fills memory from its front on, and says how many bytes that were; 0 at the end.
_ReadInto = Callable[[memoryview], int]


def is_stream(driver: str, metadata: Mapping[str, Any]) -> bool:
  """Whether an array's cells can be read as streams here.

  Args:
    driver: TensorStore's, of the array.
    metadata: of the array, as that driver gives them.
  """
  if driver != "zarr" or metadata["order"] != "C" or metadata.get("filters"):
    return False
  # A cell that is not stored is the fill value.
  zeros = str(metadata.get("fill_value")) in ("None", "0", "0.0")
  native = isinstance(metadata["dtype"], str) and not metadata["dtype"].startswith(">")
  compressor = _compressor(metadata)
  installed = compressor != "zstd" or importlib.util.find_spec("zstandard") is not None
  return zeros and native and compressor in _DECODERS and installed


def _compressor(metadata: Mapping[str, Any]) -> str | None:
  return (metadata.get("compressor") or {}).get("id")


def cell_key(metadata: Mapping[str, Any], position: tuple[int, ...]) -> str:
  """A cell's name within its array."""
  return str(metadata.get("dimension_separator", ".")).join(map(str, position)) or "0"


@final
class KeyValues:
  """The values of a key-value store, as they are when this is made.

  Args:
    kvstore: TensorStore's, open, with a cache for what it knows of itself.
    is_local: whether a request costs no more than a call of the system.
  """

  def __init__(self, kvstore: Any, *, is_local: bool):
    self._kvstore = kvstore
    self._since = time.time()
    self.step = _LOCAL if is_local else _REMOTE

  def ask(self, key: str, start: int, stop: int | None) -> Any:
    """The future of a part of a value: of a ValueError, where the value ends in front of `stop`."""
    return self._kvstore.read(key, byte_range=slice(start, stop), staleness_bound=self._since)


@final
class CellStream:
  """The elements of one cell as bytes, front to back.

  Args:
    values: that hold the cell.
    key: of the cell; None for one that is not stored, whose elements are zeros.
    metadata: of the array.
    nbytes: that the cell has, decoded.
    errors: a context that says of a ValueError what could not be read.
    on_bytes: called with the number of bytes that were read.
  """

  def __init__(
    self,
    values: KeyValues,
    key: str | None,
    metadata: Mapping[str, Any],
    nbytes: int,
    errors: Callable[[], contextlib.AbstractContextManager[None]],
    on_bytes: Callable[[int], None],
  ):
    self._errors = errors
    self._on_bytes = on_bytes
    decode = _DECODERS[_compressor(metadata)]
    self._readinto = decode(_Stored(values, key, nbytes)) if key else _Zeros(nbytes).readinto
    self._nbytes = nbytes
    self._at = 0

  def read_into(self, start: int, target: np.ndarray) -> None:
    """Fills contiguous memory from byte `start` on, which lies behind all that was read.

    Raises:
      CheckpointError: if the cell cannot be decoded, or has not as many bytes as its array's metadata say.
    """
    with self._errors():
      while self._at < start:
        self._fill(memoryview(bytearray(min(_PASSED, start - self._at))))
      self._fill(target.reshape(-1).view(np.uint8).data)
      if self._at == self._nbytes and self._readinto(memoryview(bytearray(1))):
        raise ValueError(f"a cell has more than the {self._nbytes} bytes that the metadata say")
    self._on_bytes(target.nbytes)

  def _fill(self, view: memoryview) -> None:
    while view:
      count = self._readinto(view)
      if not count:
        raise ValueError(f"a cell has {self._at} bytes, not the {self._nbytes} that the metadata say")
      self._at += count
      view = view[count:]


class _Stored:
  """A value, front to back, in parts of which the next one is always under way.

  Args:
    values: that hold it.
    key: of the value.
    nbytes: that it decodes to: most values are no longer.
  """

  def __init__(self, values: KeyValues, key: str, nbytes: int):
    self._values = values
    self._key = key
    self._at = 0
    # A request past the end fails, and has to be repeated.
    self._is_last = nbytes <= values.step
    self._next = values.ask(key, 0, None if self._is_last else values.step)
    self._part = memoryview(b"")

  def read(self, size: int = -1) -> bytes:
    """The next part, of whatever size; nothing at the end."""
    if self._next is None:
      return b""
    try:
      part: bytes = self._next.result().value
      self._at += len(part)
      self._next = (
        None if self._is_last else self._values.ask(self._key, self._at, self._at + self._values.step)
      )
    except ValueError:
      # The value ends within this part.
      part = self._values.ask(self._key, self._at, None).result().value
      self._next = None
    return part

  def readinto(self, target: memoryview) -> int:
    """Fills memory with what is left of a part, or of the next one."""
    self._part = self._part or memoryview(self.read())
    count = min(len(target), len(self._part))
    target[:count] = self._part[:count]
    self._part = self._part[count:]
    return count


class _Zeros:
  """As many zeros."""

  def __init__(self, nbytes: int):
    self._left = nbytes

  def readinto(self, target: memoryview) -> int:
    """Fills memory with zeros."""
    count = min(len(target), self._left)
    target[:count] = bytes(count)
    self._left -= count
    return count


def _zstd(stored: _Stored) -> _ReadInto:
  zstandard = require("zstandard", "models-core[orbax]", "Decoding zstd")
  reader = zstandard.ZstdDecompressor().stream_reader(stored, read_size=_LOCAL, read_across_frames=True)

  def readinto(target: memoryview) -> int:
    try:
      return reader.readinto(target)
    except zstandard.ZstdError as error:
      raise ValueError(str(error)) from None

  return readinto


_DECODERS: dict[str | None, Callable[[_Stored], _ReadInto]] = {
  None: lambda stored: stored.readinto,
  "zstd": _zstd,
}
