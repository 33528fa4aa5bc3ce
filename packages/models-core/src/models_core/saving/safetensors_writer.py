"""Writing planned tensors into safetensors files, straight from the memory in which the devices hold them."""

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

# The unit of parallel work, in bytes.
_TASK = 8 << 20
# Bytes that may wait to be written before more is asked of the devices.
_IN_FLIGHT = 128 << 20

# Where the bytes of a block lie in the tensor, how many they are, and what makes them.
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
  """Writes files and puts them on the disk. Under several processes each writes files of its own; all must call it.

  Args:
    directory: to write into; holds none of the files.
    files: of the whole checkpoint.
    get: a parameter's name -> its array, on whatever sharding. Asked when it is needed, again for another file.
    reader: of the checkpoint that copied tensors come from.
    on_total: called once with the number of bytes that this process is going to write.
    on_bytes: called with the number of bytes that were written, from several threads.

  Raises:
    OSError: if the file system refuses, or a number does not fit into the dtype that it is written in. Under
      several processes it is raised when all parameters were gathered, so that no process waits for another.
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
          # The disk takes a file while the next one is being written.
          descriptor = _write_file(os.path.join(directory, file.name), file, tensors, pool, reader, on_bytes)
          syncing.append(pool.submit(_sync, descriptor))
        except OSError as error:
          if jax.process_count() == 1:
            raise
          failure = error
      for _ in tensors:
        pass  # Gathering takes all processes.
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
  """Writes a file. Returns its descriptor, which is still open."""
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
    # No thread may write once the descriptor is another file's.
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
  """A tensor's bytes in units that threads share."""
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
  """How many rows the tensor and all parts of parameters in it have in common; None where they share no such axis."""
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
