"""Tensors that are contiguous bytes of files: read from local files, or by ranges where the files lie elsewhere."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import math
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from models_core.errors import CheckpointError
from models_core.formats.checkpoint import Checkpoint, Header
from models_core.formats.files import Files, RangeFiles
from models_core.formats.memory import ALIGNMENT, aligned_empty
from models_core.formats.reader import OnBytes, RunReader
from models_core.formats.tensors import Index, TensorInfo
from models_core.threads import THREADS

# Bytes of one request to a store: large enough that its latency does not count.
RANGE = 8 << 20
# Requests to a store at a time. They wait for the network, not for a core.
_REQUESTS = 32


@dataclasses.dataclass(frozen=True)
class BytesCheckpoint(Checkpoint):
  """A checkpoint whose tensors are contiguous bytes of its files.

  Attributes:
    headers: of the files, by name.
  """

  headers: Mapping[str, Header] = dataclasses.field(default_factory=dict, repr=False)

  def open(self, names: Sequence[str], on_bytes: OnBytes = lambda count: None) -> ByteReader:
    """A reader by ranges where the files offer them, else of fetched files."""
    if isinstance(self.files, RangeFiles):
      return RangeReader(self.files, self.tensors, on_bytes)
    return LocalReader(self.files, self.tensors, self.headers, names, on_bytes)


class ByteReader(abc.ABC):
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

  @abc.abstractmethod
  def close(self) -> None:
    """Lets go of files and threads. No read may be under way."""

  @abc.abstractmethod
  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Elements as read-only memory that lives as long as an array refers to it; None where there is no such memory."""

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

  @property
  def runs(self) -> RunReader:
    """Itself: elements are contiguous."""
    return self

  # There are no cells.
  cells: None = None

  def read_box(self, info: TensorInfo, index: Index) -> np.ndarray:
    """The elements of a tensor within an index of one slice an axis; valid until this thread's next call.

    The contiguous elements that span the box are read: nothing else where all axes behind the first one that is longer
    than 1 are whole.
    """
    shape = info.shape
    if not shape:
      return self.read_elements(info, 0, 1).reshape(())
    outer = next((a for a, s in enumerate(index) if s.stop - s.start > 1), len(shape) - 1)
    # A codec's blocks lie along the last axis.
    unit = info.codec.block_size if info.codec and outer == len(shape) - 1 else 1
    low, high = index[outer].start // unit * unit, -(-index[outer].stop // unit) * unit
    row = math.prod(shape[outer + 1 :])
    start = 0
    for bounds, size in zip(index[:outer], shape, strict=False):
      start = start * size + bounds.start
    rows = self.read_elements(info, (start * shape[outer] + low) * row, (high - low) * row)
    rows = rows.reshape((1,) * outer + (high - low, *shape[outer + 1 :]))
    within: tuple[Any, ...] = (slice(index[outer].start - low, index[outer].stop - low), *index[outer + 1 :])
    return rows[(..., *within)]

  def parts(self, info: TensorInfo) -> Iterator[np.ndarray]:
    """All elements of a tensor, a few megabytes at a time; each part is valid until the next one."""
    count = math.prod(info.shape)
    unit = info.codec.block_size if info.codec else 1
    step = max(1, self.chunk // info.dtype.itemsize // unit) * unit
    for element in range(0, count, step):
      yield self.read_elements(info, element, min(step, count - element))

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
class LocalReader(ByteReader):
  """The tensors of files of this machine. Each file is opened once, and its header compared with the one that was read.

  Args:
    files: of the checkpoint.
    tensors: as the headers described them.
    headers: of the files, by name.
    names: of the files that will be read: they are fetched and opened at once, any other one when it is read. All stay
      open until `close`.
    on_bytes: called with the number of bytes that were read.

  Raises:
    CheckpointError: if a file is not what its header described.
  """

  # Scratch that stays in a core's cache.
  chunk = 2 << 20

  def __init__(
    self,
    files: Files,
    tensors: Mapping[str, TensorInfo],
    headers: Mapping[str, Header],
    names: Sequence[str],
    on_bytes: OnBytes,
  ):
    super().__init__(files.fetch(names), tensors, on_bytes)
    self.threads = THREADS
    self._files = files
    self._fetched = frozenset(names)
    self._headers = headers
    self._ends: dict[str, int] = {}
    for info in tensors.values():
      self._ends[info.file] = max(self._ends.get(info.file, 0), info.stop)
    self._open: dict[str, int] = {}
    self._maps: dict[str, mmap.mmap] = {}
    self._lock = threading.Lock()
    try:
      for name in names:
        self._descriptor(name)
    except BaseException:
      self.close()
      raise

  def _descriptor(self, name: str) -> int:
    """Of an open file."""
    if (descriptor := self._open.get(name)) is not None:
      return descriptor
    with self._lock:
      if name not in self._open:
        self._open[name] = self._open_file(name)
      return self._open[name]

  def _open_file(self, name: str) -> int:
    if name not in self._fetched:
      self._files.fetch([name])
    path = os.path.join(self._where, name)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
      size = os.fstat(descriptor).st_size
      if size < self._ends[name]:
        raise CheckpointError(
          path,
          [f"it has {size} bytes, but its header described {self._ends[name]}: it changed meanwhile"],
        )
      header = self._headers[name]
      if Header.of(os.pread(descriptor, header.nbytes, 0)) != header:
        raise CheckpointError(path, ["its header is another one than was read before: it changed meanwhile"])
    except BaseException:
      os.close(descriptor)
      raise
    return descriptor

  def close(self) -> None:
    """Closes the files. Mapped memory lives as long as an array refers to it."""
    self._maps.clear()
    for descriptor in self._open.values():
      os.close(descriptor)
    self._open.clear()

  def _fill(self, info: TensorInfo, start: int, buffer: np.ndarray) -> None:
    view, descriptor = buffer.data, self._descriptor(info.file)
    offset, done = info.start + start, 0
    while done < len(view):
      count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
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
      self._maps[info.file] = mmap.mmap(self._descriptor(info.file), 0, prot=mmap.PROT_READ)
      self._maps[info.file].madvise(mmap.MADV_WILLNEED)
    self._on_bytes(count * info.dtype.itemsize)
    return np.frombuffer(self._maps[info.file], info.dtype, count, start)


@final
class RangeReader(ByteReader):
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
