"""Writes planned tensors into safetensors files, straight from the memory of the devices; in a target as streams."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
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
from models_core.saving.target import Draft
from models_core.threads import THREADS
from models_core.weights import Piece, part_shape

# Bytes that one task of a thread writes.
_TASK = 8 << 20
# Bytes that may wait to be written before more are fetched from the devices.
_IN_FLIGHT = 128 << 20
# The same for a stream, which holds parts of its own.
_STREAMED = 32 << 20

# The offset of a block in the tensor's bytes, its number of bytes, and a function that returns them.
_Block = tuple[int, int, Callable[[], np.ndarray]]
# The tensors of a file, each with the parameters that fill it.
_Tensors = Iterator[tuple[SavedTensor, Mapping[str, HostArray]]]


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
  syncing: list[concurrent.futures.Future] = []
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:

    def write(file: SavedFile, tensors: _Tensors) -> None:
      # One file is flushed to the disk while the next one is written.
      descriptor = _write_file(os.path.join(directory, file.name), file, tensors, pool, reader, on_bytes)
      syncing.append(pool.submit(_sync, descriptor))

    failure = _each_own(files, get, write)
    for task in syncing:
      try:
        task.result()
      except OSError as error:
        failure = failure or error
  if failure is not None:
    raise failure


def write_own_file(path: str, file: SavedFile, get: Callable[[str], Any]) -> None:
  """Writes one file of arrays that this process holds, whatever other processes do. It is not flushed to the disk.

  Args:
    path: of the new file.
    file: its tensors.
    get: a parameter's name -> its array.

  Raises:
    OSError: if the file system refuses.
  """
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    os.close(_write_file(path, file, with_arrays(file.tensors, get), pool, None, None))


def stream_files(
  draft: Draft,
  files: Sequence[SavedFile],
  get: Callable[[str], Any],
  *,
  reader: TensorReader | None = None,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
) -> None:
  """Writes files to a draft, each as one stream. Takes the other arguments of `write_files`, and raises the same errors.

  Host memory holds the parameters of one tensor, the pieces that threads make at a time, and what the draft holds.
  """
  if on_total is not None:
    own = files[jax.process_index() :: jax.process_count()]
    on_total(sum(tensor.nbytes for file in own for tensor in file.tensors))
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:

    def write(file: SavedFile, tensors: _Tensors) -> None:
      with draft.create(file.name, file.nbytes) as put:
        _stream_file(put, file, tensors, pool, reader, on_bytes)

    # A stream has no places to jump to: tensors come in the order of the file.
    ordered = [
      dataclasses.replace(file, tensors=tuple(sorted(file.tensors, key=lambda tensor: starts[tensor.name])))
      for file in files
      for starts in [file.layout[1]]
    ]
    failure = _each_own(ordered, get, write)
  if failure is not None:
    raise failure


def _piece(make: Callable[[], np.ndarray], copied: bool) -> memoryview:
  """Bytes that stay as they are. What a reader returns is valid until its next call only."""
  data = make().copy() if copied else make()
  return data.reshape(-1).view(np.uint8).data


def file_bytes(file: SavedFile, get: Callable[[str], Any]) -> bytes:
  """The contents of a small file, such as an adapter's. Takes the arguments of `write_files`."""
  starts, pieces = file.layout[1], list[bytes | memoryview]()
  ordered = sorted(file.tensors, key=lambda tensor: starts[tensor.name])
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    _stream_file(pieces.append, file, with_arrays(ordered, get), pool, None, None)
  return b"".join(pieces)


def _each_own(
  files: Sequence[SavedFile], get: Callable[[str], Any], write: Callable[[SavedFile, _Tensors], None]
) -> OSError | None:
  """Writes the files of this process, and gathers the parameters of all files with the other processes.

  Returns:
    The error of a file, under several processes only; after it no further file is written.
  """
  failure: OSError | None = None
  for number, file in enumerate(files):
    tensors = with_arrays(file.tensors, get)
    if number % jax.process_count() == jax.process_index() and failure is None:
      try:
        write(file, tensors)
      except OSError as error:
        if jax.process_count() == 1:
          raise
        failure = error
    for _ in tensors:
      pass  # gathering needs all processes
  return failure


def _stream_file(
  put: Callable[[bytes | memoryview], None],
  file: SavedFile,
  tensors: _Tensors,
  pool: concurrent.futures.Executor,
  reader: TensorReader | None,
  on_bytes: OnBytes | None,
) -> None:
  """Writes a file in order, while threads make the pieces that come next."""
  put(file.layout[0])
  pending: collections.deque[tuple[int, concurrent.futures.Future[memoryview]]] = collections.deque()
  waiting = 0

  def put_first() -> int:
    nbytes, task = pending.popleft()
    put(task.result())
    if on_bytes is not None:
      on_bytes(nbytes)
    return nbytes

  try:
    for tensor, held in tensors:
      for _, nbytes, make in _blocks(tensor, held, reader):
        while pending and waiting + nbytes > _STREAMED:
          waiting -= put_first()
        pending.append((nbytes, pool.submit(_piece, make, tensor.copied is not None)))
        waiting += nbytes
    while pending:
      put_first()
  finally:
    # The parameters may be changed, and the reader closed, once this has returned.
    for _, task in pending:
      task.cancel()
    concurrent.futures.wait([task for _, task in pending])


def _write_file(
  path: str,
  file: SavedFile,
  tensors: _Tensors,
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
