"""Writes planned tensors into safetensors files, straight from the memory of the devices."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models_core.formats import OnBytes, TensorReader
from models_core.saving.host_arrays import HostArray, assemble, with_arrays
from models_core.saving.plan import SavedFile, SavedTensor
from models_core.threads import THREADS
from models_core.weights import Piece, part_shape

# Bytes that one task of a thread writes.
_TASK = 8 << 20
# Bytes that may wait to be written before more are fetched from the devices.
_IN_FLIGHT = 128 << 20

# The offset of a block in the tensor's bytes, its number of bytes, and a function that returns them.
_Block = tuple[int, int, Callable[[], np.ndarray]]


def write_files(
  directory: str,
  files: Sequence[SavedFile],
  get: Callable[[str], Any],
  *,
  reader: TensorReader | None = None,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
) -> None:
  """Writes files and flushes them to the disk.

  Under several processes all must call this, and each of them writes some of the files.

  Args:
    directory: directory to write into; it holds none of the files.
    files: all files of the checkpoint.
    get: a parameter's name -> its array, in any sharding. Called when the parameter is needed, again for each file.
    reader: reader of the checkpoint that tensors are copied from.
    on_total: called once with the number of bytes that this process will write.
    on_bytes: called with the number of bytes of each write, from several threads.

  Raises:
    OSError: if the file system refuses; as a SaveError, if a finite value is infinite in the dtype of the file. Under
      several processes it is raised only after all parameters were gathered, so that no process waits for another.
  """
  if on_total is not None:
    own = files[jax.process_index() :: jax.process_count()]
    on_total(sum(tensor.nbytes for file in own for tensor in file.tensors))
  failure: OSError | None = None
  syncing: list[concurrent.futures.Future] = []
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for number, file in enumerate(files):
      tensors = with_arrays(file.tensors, get)
      if number % jax.process_count() == jax.process_index() and failure is None:
        try:
          # One file is flushed to the disk while the next one is written.
          descriptor = _write_file(os.path.join(directory, file.name), file, tensors, pool, reader, on_bytes)
          syncing.append(pool.submit(_sync, descriptor))
        except OSError as error:
          if jax.process_count() == 1:
            raise
          failure = error
      for _ in tensors:
        pass  # gathering needs all processes
    for task in syncing:
      try:
        task.result()
      except OSError as error:
        failure = failure or error
  if failure is not None:
    raise failure


def _write_file(
  path: str,
  file: SavedFile,
  tensors: Iterator[tuple[SavedTensor, Mapping[str, HostArray]]],
  pool: concurrent.futures.Executor,
  reader: TensorReader | None,
  on_bytes: OnBytes | None,
) -> int:
  """Writes a file. Returns its descriptor, for the caller to close."""
  beginning, starts = file.layout
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
  pending: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()
  waiting = 0

  def write(offset: int, make: Callable[[], np.ndarray]) -> None:
    data = make().reshape(-1).view(np.uint8)
    _pwrite(descriptor, data.data, offset)
    if on_bytes is not None:
      on_bytes(data.nbytes)

  try:
    _pwrite(descriptor, memoryview(beginning), 0)
    for tensor, held in tensors:
      for start, nbytes, make in _blocks(tensor, held, reader):
        while pending and waiting + nbytes > _IN_FLIGHT:
          size, task = pending.popleft()
          waiting -= size
          task.result()
        pending.append((nbytes, pool.submit(write, starts[tensor.name] + start, make)))
        waiting += nbytes
    for _, task in pending:
      task.result()
  except BaseException:
    # After the close, another file may get the number of this descriptor: no thread may write to it then.
    for _, task in pending:
      task.cancel()
    concurrent.futures.wait([task for _, task in pending])
    os.close(descriptor)
    raise
  return descriptor


def _sync(descriptor: int) -> None:
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
  done = 0
  while done < len(data):
    done += os.pwrite(descriptor, data[done:], offset + done)


def _blocks(
  tensor: SavedTensor, held: Mapping[str, HostArray], reader: TensorReader | None
) -> Iterator[_Block]:
  """The bytes of a tensor as blocks, each for one task."""
  if tensor.copied is not None:
    assert reader is not None
    assert reader.runs is not None
    size = tensor.dtype.itemsize
    count, step = math.prod(tensor.shape), _TASK // size
    for first in range(0, count, step):
      part = min(step, count - first)
      make = functools.partial(reader.runs.read_elements, tensor.copied, first, part)
      yield first * size, part * size, make
    return
  sources = [(held[name], piece) for name, piece in tensor.parts]
  for host, _ in sources:
    host.fetch()
  rows = _rows(sources)
  if rows is None:
    yield 0, tensor.nbytes, functools.partial(assemble, tensor, sources, None)
    return
  row = tensor.nbytes // max(1, rows)
  step = max(1, _TASK // max(1, row))
  for start in range(0, rows, step):
    stop = min(start + step, rows)
    yield start * row, (stop - start) * row, functools.partial(assemble, tensor, sources, slice(start, stop))


def _rows(sources: Sequence[tuple[HostArray, Piece]]) -> int | None:
  """The number of rows of a tensor if these are rows of all parameters that fill it, otherwise None."""
  counts = {
    piece.split[0]
    if piece.order
    and piece.order[0] == 0
    and part_shape(piece, host.shape)[0] == piece.split[0]
    and isinstance(piece.select[0], slice)
    else None
    for host, piece in sources
  }
  return counts.pop() if len(counts) == 1 else None
