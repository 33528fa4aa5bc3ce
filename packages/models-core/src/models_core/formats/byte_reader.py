"""Readers of tensors whose bytes are contiguous in files: in local files, or by byte ranges in a store."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import dataclasses
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from models_core.errors import CheckpointError
from models_core.formats.checkpoint import Checkpoint, Header
from models_core.formats.files import Files, RangeFiles, read_errors
from models_core.formats.memory import ALIGNMENT, aligned_empty
from models_core.formats.reader import Extent, OnBytes, RunReader
from models_core.formats.tensors import Index, TensorInfo
from models_core.threads import THREADS

# Bytes of one request to a store: large enough to make its latency negligible.
RANGE = 8 << 20
# Buffers and bytes that one call of the system fills: what both Linux and macOS allow.
_MOST_BUFFERS, _MOST_BYTES = 1024, 1 << 30
# Concurrent requests to a store. They wait for the network, so there may be more of them than cores.
_REQUESTS = 32


@dataclasses.dataclass(frozen=True)
class BytesCheckpoint(Checkpoint):
  """A checkpoint whose tensors are contiguous bytes of its files.

  Attributes:
    headers: fingerprints of the files' headers, by file name.
  """

  headers: Mapping[str, Header] = dataclasses.field(default_factory=dict, repr=False)

  def open(self, names: Sequence[str], on_bytes: OnBytes = lambda count: None) -> ByteReader:
    """Opens a reader by byte ranges where the files support them, otherwise one of fetched files."""
    if isinstance(self.files, RangeFiles):
      return RangeReader(self.files, self.tensors, on_bytes)
    return LocalReader(self.files, self.tensors, self.headers, names, on_bytes)


class ByteReader(abc.ABC):
  """The common part of both readers: decoding, scratch memory and the comparison of tied tensors."""

  tensors: Mapping[str, TensorInfo]
  chunk: int
  threads: int

  def __init__(self, where: str, tensors: Mapping[str, TensorInfo], on_bytes: OnBytes):
    self.tensors = tensors
    self.where = where
    self._on_bytes = on_bytes
    self._scratch = threading.local()

  @abc.abstractmethod
  def _fill(self, extents: Sequence[Extent]) -> None:
    """Fills the buffers of some extents."""

  @abc.abstractmethod
  def close(self) -> None:
    """Closes the files and stops the threads. No read may be running."""

  @abc.abstractmethod
  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Maps elements as read-only memory, valid as long as an array refers to it; None where that is not possible."""

  def read_into(self, info: TensorInfo, element: int, target: np.ndarray) -> None:
    """Fills `target`, contiguous memory of the tensor's dtype, with the elements from `element` on."""
    self.read_extents([Extent(info, element * info.dtype.itemsize, target.reshape(-1).view(np.uint8))])

  def read_extents(self, extents: Sequence[Extent]) -> None:
    """Fills the buffers of some extents, in the order in which they lie in files. Neighbours are read together."""
    self._fill(extents)
    self._on_bytes(sum(extent.buffer.nbytes for extent in extents))

  def read_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray:
    """Reads and decodes elements, whole blocks where there is a codec; valid until this thread's next call."""
    codec = info.codec
    if codec is None:
      start, nbytes = element * info.dtype.itemsize, count * info.dtype.itemsize
    else:
      start, nbytes = (n // codec.block_size * codec.block_bytes for n in (element, count))
    scratch = getattr(self._scratch, "buffer", None)
    if scratch is None or scratch.nbytes < nbytes:
      scratch = self._scratch.buffer = aligned_empty((max(nbytes, self.chunk),), np.dtype(np.uint8))
    self._fill([Extent(info, start, scratch[:nbytes])])
    self._on_bytes(nbytes)
    return scratch[:nbytes].view(info.dtype) if codec is None else codec.decode(scratch[:nbytes])

  @property
  def runs(self) -> RunReader:
    """The reader itself: elements are contiguous in the file."""
    return self

  # The formats of these readers do not store tensors in cells.
  cells: None = None

  def read_box(self, info: TensorInfo, index: Index) -> np.ndarray:
    """Reads one box of a tensor; the array is valid until this thread's next call.

    This reads the contiguous elements that span the box. Of a tensor [8, 16], for example, it reads 32 elements for
    rows 2:4, but all 128 for columns 2:4. Only the box itself is read if it spans the whole of each axis that follows
    the first axis on which it is longer than 1.
    """
    shape = info.shape
    if not shape:
      return self.read_elements(info, 0, 1).reshape(())
    outer = next((a for a, s in enumerate(index) if s.stop - s.start > 1), len(shape) - 1)
    # A codec's blocks run along the last axis, so bounds along it are widened to whole blocks.
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
    """Yields all elements of a tensor in order, a few megabytes at a time. Each array is valid until the next one."""
    count = math.prod(info.shape)
    unit = info.codec.block_size if info.codec else 1
    step = max(1, self.chunk // info.dtype.itemsize // unit) * unit
    for element in range(0, count, step):
      yield self.read_elements(info, element, min(step, count - element))


class _File:
  """An open file.

  It is closed by `close`, or else when nothing refers to it: neither the reader nor a read under way.

  Attributes:
    descriptor: of the system.
    pages: the whole file as read-only memory; None until it is mapped.
  """

  def __init__(self, path: str):
    try:
      with read_errors(path):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
      raise CheckpointError(path, ["it was removed after its header was read: load it again"]) from error
    self.pages: mmap.mmap | None = None
    self.close = weakref.finalize(self, os.close, self.descriptor)


def _most_files() -> int:
  """How many files a reader keeps open: a quarter of the process's limit, as a mapped file takes two descriptors."""
  import resource  # only where there is preadv, too

  limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // 4)


def _neighbours(extents: Sequence[Extent], most: int) -> Iterator[list[Extent]]:
  """Yields groups of at most `most` extents, each of which begins where the one before it ends. Empty ones are left out."""
  group: list[Extent] = []
  end = None
  for extent in extents:
    if not extent.buffer.nbytes:
      continue
    if group and ((extent.info.file, extent.offset) != end or len(group) == most):
      yield group
      group = []
    group.append(extent)
    end = (extent.info.file, extent.offset + extent.buffer.nbytes)
  if group:
    yield group


def _ranges(neighbours: Sequence[Extent]) -> Iterator[tuple[int, list[memoryview]]]:
  """Yields the ranges of a file that one request each reads: where they begin, and the memory that they go to."""
  start, views, room = neighbours[0].offset, [], RANGE
  for extent in neighbours:
    view = extent.buffer.data
    while view:
      views.append(view[:room])
      view, room = view[room:], room - len(views[-1])
      if not room:
        yield start, views
        start, views, room = start + RANGE, [], RANGE
  if views:
    yield start, views


def _after(views: Sequence[memoryview], count: int) -> list[memoryview]:
  """What is left of some memory after its first `count` bytes."""
  rest = []
  for view in views:
    skipped = min(count, len(view))
    count -= skipped
    if skipped < len(view):
      rest.append(view[skipped:])
  return rest


@final
class LocalReader(ByteReader):
  """Reads tensors of files on this machine.

  Each time a file is opened, its header is compared with the fingerprint of the header that described the tensors. A
  file is opened once, unless there are so many that the oldest one must be closed for another.

  Args:
    files: of the checkpoint.
    tensors: by name, as the headers describe them.
    headers: fingerprints of the files' headers, by file name.
    names: of the files to fetch and open immediately. Any other file is fetched and opened when it is first read.
    on_bytes: called with the number of bytes that were just read.

  Raises:
    CheckpointError: if a file has changed since its header was read.
  """

  # Scratch memory of this size stays in a core's cache.
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
    self._most = _most_files()
    # The oldest first.
    self._open: dict[str, _File] = {}
    # Maps that an array or a file refers to: each holds a descriptor of its own.
    self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
    self._lock = threading.Lock()
    try:
      for name in names:
        self._file(name)
    except BaseException:
      self.close()
      raise

  def _file(self, name: str) -> _File:
    """An open file, which is opened if it is not open yet."""
    if (file := self._open.get(name)) is not None:
      return file
    with self._lock:
      if (file := self._open.get(name)) is None:
        while len(self._open) >= self._most:
          del self._open[next(iter(self._open))]
        file = self._open[name] = self._open_file(name)
      return file

  def _open_file(self, name: str) -> _File:
    if name not in self._fetched:
      self._files.fetch([name])
    path = os.path.join(self.where, name)
    file = _File(path)
    try:
      size = os.fstat(file.descriptor).st_size
      if size < self._ends[name]:
        raise CheckpointError(
          path,
          [
            f"the file has {size} bytes, but its header describes {self._ends[name]}: the file has changed since its "
            "header was read; load it again"
          ],
        )
      header = self._headers[name]
      if Header.of(os.pread(file.descriptor, header.nbytes, 0)) != header:
        raise CheckpointError(path, ["the file has changed since its header was read: load it again"])
    except BaseException:
      file.close()
      raise
    return file

  def close(self) -> None:
    """Closes the files. Mapped memory stays valid as long as an array refers to it."""
    for file in self._open.values():
      file.close()
    self._open.clear()

  def _fill(self, extents: Sequence[Extent]) -> None:
    groups = list(_neighbours(extents, _MOST_BUFFERS))
    if len(groups) > 1 and hasattr(os, "posix_fadvise"):
      # A disk reads several places at a time, if it is asked for all of them. A system that refuses reads them anyway.
      for first, *_ in groups:
        if (opened := self._open.get(first.info.file)) is not None:
          with contextlib.suppress(OSError):
            nbytes = first.buffer.nbytes
            os.posix_fadvise(opened.descriptor, first.offset, nbytes, os.POSIX_FADV_WILLNEED)
    for neighbours in groups:
      first = neighbours[0]
      views = [extent.buffer.data for extent in neighbours]
      file, done, nbytes = self._file(first.info.file), 0, sum(map(len, views))
      while True:
        with read_errors(f"{self.where}/{first.info.file}"):
          at_once = views if nbytes - done <= _MOST_BYTES else [views[0][:_MOST_BYTES]]
          count = os.preadv(file.descriptor, at_once, first.offset + done)
        done += count
        if done == nbytes:
          break
        views = _after(views, count)
        if not count:
          ends = next(e for e in neighbours if e.offset + e.buffer.nbytes > first.offset + done)
          raise CheckpointError(
            f"{self.where}/{first.info.file}",
            [
              f"the file ends within {ends.info.name}: it has changed since its header was read; load it again"
            ],
          )

  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Maps elements of the file as read-only memory.

    None if they are quantised, not aligned for a CPU device, or in one more file than may be mapped.
    """
    start = info.start + element * info.dtype.itemsize
    if start % ALIGNMENT or not count or info.codec is not None:
      return None
    file = self._file(info.file)
    if file.pages is None:
      if len(self._maps) >= self._most:
        return None
      try:
        file.pages = mmap.mmap(file.descriptor, 0, prot=mmap.PROT_READ)
      except OSError:
        return None  # out of descriptors, or a file system that maps no files: the elements are read
      file.pages.madvise(mmap.MADV_WILLNEED)
      self._maps.add(file.pages)
    self._on_bytes(count * info.dtype.itemsize)
    return np.frombuffer(file.pages, info.dtype, count, start)


@final
class RangeReader(ByteReader):
  """Reads tensors of files in a store. Transfers only the bytes that are needed, many ranges at a time.

  Args:
    files: of the checkpoint. All ranges that they read belong to one version.
    tensors: by name, as the headers describe them.
    on_bytes: called with the number of bytes that were just read.
  """

  chunk = RANGE
  threads = _REQUESTS

  def __init__(self, files: RangeFiles, tensors: Mapping[str, TensorInfo], on_bytes: OnBytes):
    super().__init__(files.path, tensors, on_bytes)
    self._files = files
    self._pool = concurrent.futures.ThreadPoolExecutor(_REQUESTS, "ranges")

  def close(self) -> None:
    """Stops the threads."""
    self._pool.shutdown(cancel_futures=True)

  def _fill(self, extents: Sequence[Extent]) -> None:
    ranges = [
      (neighbours[0].info.file, *part)
      for neighbours in _neighbours(extents, len(extents))
      for part in _ranges(neighbours)
    ]
    if len(ranges) == 1:
      self._read_range(*ranges[0])
      return
    reads = [self._pool.submit(self._read_range, *one) for one in ranges]
    try:
      for read in reads:
        read.result()
    finally:
      # After an error the caller may reuse the buffer, so no request may still write into it.
      for read in reads:
        read.cancel()
      concurrent.futures.wait(reads)

  def _read_range(self, name: str, start: int, views: Sequence[memoryview]) -> None:
    """Fills memory with the bytes of a file from `start` on, by one request."""
    if len(views) == 1:
      self._files.read_into(name, start, views[0])
      return
    whole = memoryview(bytearray(sum(map(len, views))))
    self._files.read_into(name, start, whole)
    for view in views:
      view[:], whole = whole[: len(view)], whole[len(view) :]

  def map_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray | None:
    """Returns None: there is no local file to map."""
    return None
