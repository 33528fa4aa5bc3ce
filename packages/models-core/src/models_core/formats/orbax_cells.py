"""Cells of zarr arrays as streams: read by byte ranges, and decoded straight into the caller's memory.

TensorStore decodes each cell into newly allocated memory, and the allocation costs more than the decoding. It still
reads the arrays that this module cannot: those of zarr 3, and those with other compressors, filters, column-major axes,
big-endian elements or fill values other than zero.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np

from models_core.extras import require

# Bytes of a request to local files and to a store: large enough to make its cost negligible. Each thread holds the
# data of two requests.
_LOCAL, _REMOTE = 1 << 20, 8 << 20
# Where bytes of a cell are skipped, they are decoded this many at a time.
_PASSED = 256 << 10

# Fills memory from its start on and returns the number of bytes, which is 0 at the end of the stream.
_ReadInto = Callable[[memoryview], int]


def is_stream(driver: str, metadata: Mapping[str, Any]) -> bool:
  """Whether this module can read an array's cells as streams.

  Args:
    driver: TensorStore's driver for the array.
    metadata: of the array, as the driver reports it.
  """
  if driver != "zarr" or metadata["order"] != "C" or metadata.get("filters"):
    return False
  # A cell that is not stored has the fill value everywhere; CellStream makes zeros of it.
  zeros = str(metadata.get("fill_value")) in ("None", "0", "0.0")
  native = isinstance(metadata["dtype"], str) and not metadata["dtype"].startswith(">")
  compressor = _compressor(metadata)
  installed = compressor != "zstd" or importlib.util.find_spec("zstandard") is not None
  return zeros and native and compressor in _DECODERS and installed


def _compressor(metadata: Mapping[str, Any]) -> str | None:
  return (metadata.get("compressor") or {}).get("id")


def cell_key(metadata: Mapping[str, Any], position: tuple[int, ...]) -> str:
  """The key of a cell within its array, such as `0.2`."""
  return str(metadata.get("dimension_separator", ".")).join(map(str, position)) or "0"


@final
class KeyValues:
  """The values of a key-value store, at least as recent as this object.

  Args:
    kvstore: TensorStore's open store, with a cache for its own metadata.
    is_local: whether the store is on this machine, so that a request costs no more than a system call.
  """

  def __init__(self, kvstore: Any, *, is_local: bool):
    self._kvstore = kvstore
    self._since = time.time()
    self.step = _LOCAL if is_local else _REMOTE

  def ask(self, key: str, start: int, stop: int | None) -> Any:
    """Requests the bytes `[start, stop)` of a value, to its end if `stop` is None.

    Returns:
      TensorStore's future. Its result raises a ValueError if the value ends before `stop`.
    """
    return self._kvstore.read(key, byte_range=slice(start, stop), staleness_bound=self._since)


@final
class CellStream:
  """The decoded bytes of one cell, read front to back.

  Args:
    values: of the store that holds the cell.
    key: of the cell; None for a cell that is not stored, whose elements are zeros.
    metadata: of the array.
    nbytes: size of the decoded cell in bytes.
    errors: makes a context that turns a ValueError into a CheckpointError, which says what cannot be read.
    on_bytes: called with the number of bytes that were just read.
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
    """Fills contiguous memory with the bytes from `start` on, which must not be before the end of the last read.

    Raises:
      CheckpointError: if the cell cannot be decoded, or its size is not the one that the array's metadata state.
    """
    with self._errors():
      while self._at < start:
        self._fill(memoryview(bytearray(min(_PASSED, start - self._at))))
      self._fill(target.reshape(-1).view(np.uint8).data)
      if self._at == self._nbytes and self._readinto(memoryview(bytearray(1))):
        raise ValueError(f"a chunk has more than the {self._nbytes} bytes that the array's metadata state")
    self._on_bytes(target.nbytes)

  def _fill(self, view: memoryview) -> None:
    while view:
      count = self._readinto(view)
      if not count:
        raise ValueError(
          f"a chunk has {self._at} bytes, not the {self._nbytes} that the array's metadata state"
        )
      self._at += count
      view = view[count:]


class _Stored:
  """The bytes of a stored value, front to back, in parts. The next part is always requested in advance.

  Args:
    values: of the store that holds the value.
    key: of the value.
    nbytes: size of the decoded value in bytes. Few values are larger than that before they are decoded.
  """

  def __init__(self, values: KeyValues, key: str, nbytes: int):
    self._values = values
    self._key = key
    self._at = 0
    # A request beyond the end of the value fails and must be repeated, so small values are requested to their end.
    self._is_last = nbytes <= values.step
    self._next = values.ask(key, 0, None if self._is_last else values.step)
    self._part = memoryview(b"")

  def read(self, size: int = -1) -> bytes:
    """Returns the next part, of any size: `size` has no effect. Returns b"" at the end."""
    if self._next is None:
      return b""
    try:
      part: bytes = self._next.result().value
      self._at += len(part)
      self._next = (
        None if self._is_last else self._values.ask(self._key, self._at, self._at + self._values.step)
      )
    except ValueError:
      # The value ends within the requested part.
      part = self._values.ask(self._key, self._at, None).result().value
      self._next = None
    return part

  def readinto(self, target: memoryview) -> int:
    """Fills memory with bytes of the current part, or of the next one if it is used up."""
    self._part = self._part or memoryview(self.read())
    count = min(len(target), len(self._part))
    target[:count] = self._part[:count]
    self._part = self._part[count:]
    return count


class _Zeros:
  """A stream of `nbytes` zeros."""

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
