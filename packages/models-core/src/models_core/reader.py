"""Byte ranges of a checkpoint's files, for many threads at once."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from models_core.checkpoint import Checkpoint, Files, LocalFiles, TensorInfo
from models_core.errors import CheckpointError
from models_core.safetensors_headers import read_header

# XLA's CPU client aliases host memory that starts at such a multiple, in bytes.
ALIGNMENT = 64
# Scratch that stays in a core's cache, in bytes.
CHUNK = 2 << 20

# From this many bytes on, memory is pages of its own, which go back to the system one by one.
_OWN_PAGES = 1 << 20

OnBytes = Callable[[int], None]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device can alias."""
  nbytes = math.prod(shape) * dtype.itemsize
  if nbytes < _OWN_PAGES or not hasattr(mmap, "MAP_POPULATE"):
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
  else:
    # Pages that are asked for at once cost half of those that are touched one by one.
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    memory, start = np.frombuffer(pages, np.uint8), 0
  return memory[start : start + nbytes].view(dtype).reshape(shape)


def open_reader(checkpoint: Checkpoint, names: Sequence[str], on_bytes: OnBytes) -> TensorReader:
  """A reader of some of a checkpoint's files: the dialect's own where it has one.

  Args:
    checkpoint: whose headers were read.
    names: of the files that will be read.
    on_bytes: called with the number of bytes that were read, from several threads.

  Raises:
    CheckpointError: if a file is not what its header described.
  """
  if checkpoint.open_reader is not None:
    return checkpoint.open_reader(checkpoint, names, on_bytes)
  return TensorReader(checkpoint.files, checkpoint.tensors, names, on_bytes)


class TensorReader:
  """The tensors of some files.

  Args:
    files: of the checkpoint.
    tensors: as the headers described them.
    names: of the files that will be read. They are fetched and stay open until `close`.
    on_bytes: called with the number of bytes that were read.

  Raises:
    CheckpointError: if a file is not what its header described.
  """

  def __init__(
    self, files: Files, tensors: Mapping[str, TensorInfo], names: Sequence[str], on_bytes: OnBytes
  ):
    self.tensors = tensors
    self._on_bytes = on_bytes
    self._scratch = threading.local()
    self._where = files.fetch(names)
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

  @property
  def chunk(self) -> int:
    """Bytes of a read that passes through scratch memory."""
    return CHUNK

  def close(self) -> None:
    """Closes the files. Mapped memory lives as long as an array refers to it."""
    self._maps.clear()
    for descriptor in self._open.values():
      os.close(descriptor)
    self._open.clear()

  def _pread(self, info: TensorInfo, start: int, buffer: np.ndarray) -> None:
    """Fills a uint8 buffer from byte `start` of a tensor."""
    view = buffer.data
    offset, done = info.start + start, 0
    while done < len(view):
      count = os.preadv(self._open[info.file], [view[done : done + (1 << 30)]], offset + done)
      if not count:
        raise CheckpointError(
          f"{self._where}/{info.file}", [f"{info.name}: the file ended early; it changed meanwhile"]
        )
      done += count

  def read_into(self, info: TensorInfo, element: int, target: np.ndarray) -> None:
    """Elements from `element` on, into contiguous memory of the same dtype."""
    self._pread(info, element * info.dtype.itemsize, target.reshape(-1).view(np.uint8))
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
      scratch = self._scratch.buffer = aligned_empty((max(nbytes, CHUNK),), np.dtype(np.uint8))
    self._pread(info, start, scratch[:nbytes])
    self._on_bytes(nbytes)
    return scratch[:nbytes].view(info.dtype) if codec is None else codec.decode(scratch[:nbytes])

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

  def check_equal(self, name: str, twin: str) -> None:
    """Compares two tensors' bytes.

    Raises:
      CheckpointError: if they differ.
    """
    a, b = self.tensors[name], self.tensors[twin]
    nbytes = a.stop - a.start
    same = (a.shape, a.dtype, nbytes) == (b.shape, b.dtype, b.stop - b.start)
    left, right = (np.empty(min(nbytes, CHUNK), np.uint8) for _ in range(2))
    for start in range(0, nbytes if same else 0, CHUNK):
      size = min(CHUNK, nbytes - start)
      self._pread(a, start, left[:size])
      self._pread(b, start, right[:size])
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
