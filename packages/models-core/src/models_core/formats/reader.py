"""Byte ranges of a checkpoint's files, for many threads at once."""

from __future__ import annotations

import abc
import concurrent.futures
import itertools
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, final, runtime_checkable

import numpy as np

from models_core.errors import CheckpointError
from models_core.formats.checkpoint import Checkpoint, Files, LocalFiles, RangeFiles, TensorInfo
from models_core.formats.safetensors import read_header
from models_core.threads import THREADS

# XLA's CPU client aliases host memory that starts at such a multiple, in bytes.
ALIGNMENT = 64
# Bytes of one request to a store: large enough that its latency does not count.
RANGE = 8 << 20
# Requests to a store at a time. They wait for the network, not for a core.
_REQUESTS = 32

# From this many bytes on, memory is pages of its own, which go back to the system one by one.
_OWN_PAGES = 1 << 20

OnBytes = Callable[[int], None]
# One slice an axis.
Index = tuple[slice, ...]


def bounds_of(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
  """The first element of an index and the one past its last, along each axis of an array.

  Args:
    index: without steps; `slice(None)` is the whole axis.
    shape: of the array.
  """
  return tuple(along.indices(size)[:2] for along, size in zip(index, shape, strict=True))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device can alias."""
  nbytes = math.prod(shape) * dtype.itemsize
  if nbytes < _OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
  else:
    # The system gives the pages, which costs more than reading into them, to the threads that read.
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory, start = np.frombuffer(pages, np.uint8), 0
  return memory[start : start + nbytes].view(dtype).reshape(shape)


class _Tensors(Protocol):
  """The tensors of a checkpoint, for many threads at once.

  Attributes:
    tensors: as the headers described them, by name.
    chunk: bytes of a read that passes through scratch memory.
    threads: that keep it busy.
  """

  tensors: Mapping[str, TensorInfo]
  chunk: int
  threads: int

  def check_equal(self, name: str, twin: str, part: int = 0, parts: int = 1) -> None:
    """Compares two tensors' numbers, or one of some parts of them.

    Raises:
      CheckpointError: if they differ.
    """

  def close(self) -> None:
    """Lets go of files and threads. No read may be under way."""


class RunReader(_Tensors, Protocol):
  """Tensors whose elements are a run of bytes each."""

  def read_into(self, info: TensorInfo, element: int, target: np.ndarray) -> None:
    """Elements from `element` on, into contiguous memory of the same dtype."""

  def read_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray:
    """Elements, decoded; valid until this thread's next call."""

  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Elements as read-only memory that lives as long as an array refers to it; None where there is no such memory."""


class Cell(Protocol):
  """The elements of a cell as bytes, front to back."""

  def read_into(self, start: int, target: np.ndarray) -> None:
    """Fills contiguous memory from byte `start` on, which lies behind all that was read."""


@runtime_checkable
class BoxReader(_Tensors, Protocol):
  """Tensors that are stored as grids of cells.

  Attributes:
    run: bytes of a cell that are read at a time.
  """

  run: int

  def read_box(self, info: TensorInfo, index: tuple[slice, ...]) -> np.ndarray:
    """The elements of a tensor within an index of one slice an axis."""

  def has_streams(self, info: TensorInfo) -> bool:
    """Whether the cells of a tensor can be read by `open_cell`."""

  def open_cell(self, info: TensorInfo, position: tuple[int, ...]) -> Cell:
    """The cell at a position of a tensor's grid, for one thread."""


TensorReader = RunReader | BoxReader


def open_reader(checkpoint: Checkpoint, names: Sequence[str], on_bytes: OnBytes) -> TensorReader:
  """A reader of some of a checkpoint's files: the dialect's own, by ranges, or of fetched files.

  Args:
    checkpoint: whose headers were read.
    names: of the files that will be read.
    on_bytes: called with the number of bytes that were read, from several threads.

  Raises:
    CheckpointError: if a file is not what its header described.
  """
  if checkpoint.open_reader is not None:
    return checkpoint.open_reader(checkpoint, names, on_bytes)
  if isinstance(checkpoint.files, RangeFiles):
    return RangeReader(checkpoint.files, checkpoint.tensors, on_bytes)
  return LocalReader(checkpoint.files, checkpoint.tensors, names, on_bytes)


class _ByteReader(abc.ABC):
  """What readers of bytes share: decoding, scratch memory and the comparison of twins."""

  tensors: Mapping[str, TensorInfo]
  chunk: int
  threads: int

  def __init__(self, where: str, tensors: Mapping[str, TensorInfo], on_bytes: OnBytes):
    self.tensors = tensors
    self._where = where
    self._on_bytes = on_bytes
    self._scratch = threading.local()

  @abc.abstractmethod
  def _fill(self, info: TensorInfo, start: int, buffer: np.ndarray) -> None:
    """Fills a uint8 buffer from byte `start` of a tensor."""

  def read_into(self, info: TensorInfo, element: int, target: np.ndarray) -> None:
    """Elements from `element` on, into contiguous memory of the same dtype."""
    self._fill(info, element * info.dtype.itemsize, target.reshape(-1).view(np.uint8))
    self._on_bytes(target.nbytes)

  def read_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray:
    """Elements, decoded; valid until this thread's next call."""
    codec = info.codec
    if codec is None:
      start, nbytes = element * info.dtype.itemsize, count * info.dtype.itemsize
    else:
      start, nbytes = (n // codec.block_size * codec.block_bytes for n in (element, count))
    scratch = getattr(self._scratch, "buffer", None)
    if scratch is None or scratch.nbytes < nbytes:
      scratch = self._scratch.buffer = aligned_empty((max(nbytes, self.chunk),), np.dtype(np.uint8))
    self._fill(info, start, scratch[:nbytes])
    self._on_bytes(nbytes)
    return scratch[:nbytes].view(info.dtype) if codec is None else codec.decode(scratch[:nbytes])

  def check_equal(self, name: str, twin: str, part: int = 0, parts: int = 1) -> None:
    """Compares two tensors' bytes, or one of some parts of them.

    Raises:
      CheckpointError: if they differ.
    """
    a, b = self.tensors[name], self.tensors[twin]
    nbytes = a.stop - a.start
    same = (a.shape, a.dtype, nbytes) == (b.shape, b.dtype, b.stop - b.start)
    first, last = nbytes * part // parts, nbytes * (part + 1) // parts if same else 0
    left, right = (np.empty(min(nbytes, self.chunk), np.uint8) for _ in range(2))
    for start in range(first, last, self.chunk):
      size = min(self.chunk, last - start)
      self._fill(a, start, left[:size])
      self._fill(b, start, right[:size])
      if not (same := np.array_equal(left[:size], right[:size])):
        break
    if not same:
      raise CheckpointError(
        self._where,
        [
          f"the config ties the head to the embedding, but {name} differs from {twin}: untie it in the config to load "
          f"both, or remove {name} from the checkpoint"
        ],
      )


@final
class LocalReader(_ByteReader):
  """The tensors of files of this machine.

  Args:
    files: of the checkpoint.
    tensors: as the headers described them.
    names: of the files that will be read. They are fetched and stay open until `close`.
    on_bytes: called with the number of bytes that were read.

  Raises:
    CheckpointError: if a file is not what its header described.
  """

  # Scratch that stays in a core's cache.
  chunk = 2 << 20

  def __init__(
    self, files: Files, tensors: Mapping[str, TensorInfo], names: Sequence[str], on_bytes: OnBytes
  ):
    super().__init__(files.fetch(names), tensors, on_bytes)
    self.threads = THREADS
    self._open: dict[str, int] = {}
    self._maps: dict[str, mmap.mmap] = {}
    try:
      for name in names:
        path = self._where if os.path.isfile(self._where) else os.path.join(self._where, name)
        self._open[name] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        described = {t.name: t for t in tensors.values() if t.file == name}
        size, last = os.fstat(self._open[name]).st_size, max(t.stop for t in described.values())
        if size < last:
          raise CheckpointError(
            path, [f"it has {size} bytes, but its header described {last}: it changed meanwhile"]
          )
        if name.endswith(".safetensors"):
          found = {t.name: t for t in read_header(LocalFiles(self._where), name)[0]}
          if changed := next((t for t in described if found.get(t) != described[t]), None):
            raise CheckpointError(
              path, [f"{changed} is not where its header described it: it changed meanwhile"]
            )
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Closes the files. Mapped memory lives as long as an array refers to it."""
    self._maps.clear()
    for descriptor in self._open.values():
      os.close(descriptor)
    self._open.clear()

  def _fill(self, info: TensorInfo, start: int, buffer: np.ndarray) -> None:
    view = buffer.data
    offset, done = info.start + start, 0
    while done < len(view):
      count = os.preadv(self._open[info.file], [view[done : done + (1 << 30)]], offset + done)
      if not count:
        raise CheckpointError(
          f"{self._where}/{info.file}", [f"{info.name}: the file ended early; it changed meanwhile"]
        )
      done += count

  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Elements as read-only memory of the mapped file; None where a CPU device could not alias it."""
    start = info.start + element * info.dtype.itemsize
    if start % ALIGNMENT or not count or info.codec is not None:
      return None
    if info.file not in self._maps:
      self._maps[info.file] = mmap.mmap(self._open[info.file], 0, prot=mmap.PROT_READ)
      self._maps[info.file].madvise(mmap.MADV_WILLNEED)
    self._on_bytes(count * info.dtype.itemsize)
    return np.frombuffer(self._maps[info.file], info.dtype, count, start)


@final
class RangeReader(_ByteReader):
  """The tensors of files elsewhere, of which only the bytes that are asked for travel, many ranges at a time.

  Args:
    files: of the checkpoint, pinned to one version by themselves.
    tensors: as the headers described them.
    on_bytes: called with the number of bytes that were read.
  """

  chunk = RANGE
  threads = _REQUESTS

  def __init__(self, files: RangeFiles, tensors: Mapping[str, TensorInfo], on_bytes: OnBytes):
    super().__init__(files.path, tensors, on_bytes)
    self._files = files
    self._pool = concurrent.futures.ThreadPoolExecutor(_REQUESTS, "ranges")

  def close(self) -> None:
    """Ends the threads."""
    self._pool.shutdown(cancel_futures=True)

  def _fill(self, info: TensorInfo, start: int, buffer: np.ndarray) -> None:
    view, offset = buffer.data, info.start + start
    if len(view) <= RANGE:
      if view:
        self._files.read_into(info.file, offset, view)
      return
    reads = [
      self._pool.submit(self._files.read_into, info.file, offset + at, view[at : at + RANGE])
      for at in range(0, len(view), RANGE)
    ]
    try:
      for read in reads:
        read.result()
    finally:
      # After an error nothing may be written into memory that others use by then.
      for read in reads:
        read.cancel()
      concurrent.futures.wait(reads)

  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """None: there is no file to map."""
    return None


def read_box(reader: TensorReader, info: TensorInfo, index: Index) -> np.ndarray:
  """The elements of a tensor within an index of one slice an axis; valid until this thread's next call.

  Of a tensor that is a run of bytes, the run that spans the box is read: nothing else where all axes behind the first
  one that is longer than 1 are whole.
  """
  if isinstance(reader, BoxReader):
    return reader.read_box(info, index)
  shape = info.shape
  if not shape:
    return reader.read_elements(info, 0, 1).reshape(())
  outer = next((a for a, s in enumerate(index) if s.stop - s.start > 1), len(shape) - 1)
  # A codec's blocks lie along the last axis.
  unit = info.codec.block_size if info.codec and outer == len(shape) - 1 else 1
  low, high = index[outer].start // unit * unit, -(-index[outer].stop // unit) * unit
  row = math.prod(shape[outer + 1 :])
  start = 0
  for bounds, size in zip(index[:outer], shape, strict=False):
    start = start * size + bounds.start
  rows = reader.read_elements(info, (start * shape[outer] + low) * row, (high - low) * row)
  rows = rows.reshape((1,) * outer + (high - low, *shape[outer + 1 :]))
  within: tuple[Any, ...] = (slice(index[outer].start - low, index[outer].stop - low), *index[outer + 1 :])
  return rows[(..., *within)]


def cells(shape: Sequence[int], cell: Sequence[int]) -> Iterator[Index]:
  """The cells of a tensor, those at its ends cut off.

  Args:
    shape: of the tensor.
    cell: of all others.
  """
  steps = [range(0, size, max(1, step)) for size, step in zip(shape, cell, strict=True)]
  for corner in itertools.product(*steps):
    yield tuple(slice(at, min(at + axis.step, axis.stop)) for at, axis in zip(corner, steps, strict=True))
