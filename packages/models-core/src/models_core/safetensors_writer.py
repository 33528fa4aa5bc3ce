"""Writing planned tensors into safetensors files, straight from the memory in which the devices hold them."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from models_core.checkpoint import Files, TensorInfo
from models_core.dtypes import common_dtype
from models_core.errors import SaveError
from models_core.reader import OnBytes
from models_core.save_plan import SavedFile, SavedTensor
from models_core.weights import Piece, part_shape, put_back

# The unit of parallel work, in bytes.
_TASK = 8 << 20
# Bytes that may wait to be written before more is asked of the devices.
_IN_FLIGHT = 128 << 20

Bounds = tuple[slice, ...]
# Where the bytes of a block lie in the tensor, how many they are, and what makes them.
_Block = tuple[int, int, Callable[[], np.ndarray]]


def write_files(
  directory: str,
  files: Sequence[SavedFile],
  get: Callable[[str], Any],
  *,
  base: Files | None = None,
  on_bytes: OnBytes | None = None,
) -> None:
  """Writes files and puts them on the disk. Under several processes each writes files of its own; all must call it.

  Args:
    directory: to write into; holds none of the files.
    files: of the whole checkpoint.
    get: a parameter's name -> its array, on whatever sharding. Asked when it is needed, again for another file.
    base: that copied tensors are read from.
    on_bytes: called with the number of bytes that were written, from several threads.

  Raises:
    OSError: if the file system refuses, or a number does not fit into the dtype that it is written in. Under
      several processes it is raised when all parameters were gathered, so that no process waits for another.
  """
  failure: OSError | None = None
  syncing: list[concurrent.futures.Future] = []
  with concurrent.futures.ThreadPoolExecutor(max(2, min(os.cpu_count() or 1, 16))) as pool:
    for number, file in enumerate(files):
      tensors = _with_arrays(file, get)
      if number % jax.process_count() == jax.process_index() and failure is None:
        try:
          # The disk takes a file while the next one is being written.
          descriptor = _write_file(os.path.join(directory, file.name), file, tensors, pool, base, on_bytes)
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


def _with_arrays(
  file: SavedFile, get: Callable[[str], Any]
) -> Iterator[tuple[SavedTensor, Mapping[str, _HostArray]]]:
  """Each tensor with the parameters that it takes, which are held no longer than needed."""
  last = {name: tensor.name for tensor in file.tensors for name, _ in tensor.parts}
  held: dict[str, _HostArray] = {}
  for tensor in file.tensors:
    for name, _ in tensor.parts:
      if name not in held:
        held[name] = _HostArray(_gathered(get(name)))
    yield tensor, held
    for name in [name for name in held if last[name] == tensor.name]:
      del held[name]


def _write_file(
  path: str,
  file: SavedFile,
  tensors: Iterator[tuple[SavedTensor, Mapping[str, _HostArray]]],
  pool: concurrent.futures.Executor,
  base: Files | None,
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
      for start, nbytes, make in _blocks(tensor, held, base):
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


def _blocks(tensor: SavedTensor, held: Mapping[str, _HostArray], base: Files | None) -> Iterator[_Block]:
  """A tensor's bytes in units that threads share."""
  if tensor.copied is not None:
    assert base is not None
    for start in range(0, tensor.nbytes, _TASK):
      stop = min(start + _TASK, tensor.nbytes)
      yield start, stop - start, functools.partial(_read, base, tensor.copied, start, stop)
    return
  sources = [(held[name], piece) for name, piece in tensor.parts]
  for host, _ in sources:
    host.fetch()
  rows = _rows(sources)
  if rows is None:
    yield 0, tensor.nbytes, functools.partial(_assemble, tensor, sources, None)
    return
  row = tensor.nbytes // max(1, rows)
  step = max(1, _TASK // max(1, row))
  for start in range(0, rows, step):
    stop = min(start + step, rows)
    yield start * row, (stop - start) * row, functools.partial(_assemble, tensor, sources, slice(start, stop))


def _read(base: Files, info: TensorInfo, start: int, stop: int) -> np.ndarray:
  data = base.read(info.file, info.start + start, info.start + stop)
  if len(data) != stop - start:
    raise SaveError(f"{base.path}/{info.file}: {info.name}: the file ended early; it changed meanwhile")
  return np.frombuffer(data, np.uint8)


def _rows(sources: Sequence[tuple[_HostArray, Piece]]) -> int | None:
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


def _assemble(
  tensor: SavedTensor, sources: Sequence[tuple[_HostArray, Piece]], rows: slice | None
) -> np.ndarray:
  """Some rows of a tensor, or all of it, contiguous and in the dtype of the file."""
  host, piece = sources[0]
  if len(sources) == 1 and piece.run is not None:
    return _cast(np.ascontiguousarray(host.part(piece, rows)), tensor)
  shape = tensor.shape
  if rows is not None:
    count = rows.stop - rows.start
    shape = (tensor.shape[0] // piece.split[0] * count, *tensor.shape[1:])
  block = np.empty(shape, functools.reduce(common_dtype, (host.dtype for host, _ in sources)))
  for host, piece in sources:
    cut = piece if rows is None else dataclasses.replace(piece, split=(count, *piece.split[1:]))
    put_back(host.part(piece, rows), cut, block)
  return _cast(block, tensor)


def _cast(data: np.ndarray, tensor: SavedTensor) -> np.ndarray:
  """Rounds to nearest even.

  Raises:
    SaveError: if a finite number becomes an infinite one.
  """
  if data.dtype == tensor.dtype:
    return data
  with np.errstate(over="ignore"):
    cast = data.astype(tensor.dtype)
  if jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
    # Types without infinities have NaN instead.
    lost = ~np.isfinite(cast) & np.isfinite(data)
    if lost.any():
      raise SaveError(
        f"{tensor.name}: {data[lost][0]} does not fit into {tensor.dtype}: write it in another dtype"
      )
  return cast


class _HostArray:
  """The parts of an array that this process's devices hold."""

  def __init__(self, array: Any):
    self.shape, self.dtype, self._array = tuple(array.shape), np.dtype(array.dtype), array
    self.parts: list[tuple[Bounds, np.ndarray]] = []

  def fetch(self) -> None:
    """Has the parts in host memory, each once: bounds and elements. On a CPU without a copy."""
    if self.parts:
      return
    if not isinstance(self._array, jax.Array):
      self.parts = [(tuple(slice(0, size) for size in self.shape), np.asarray(self._array))]
      return
    parts = {}
    for shard in self._array.addressable_shards:
      bounds = _bounds(shard.index, self.shape)
      if bounds not in parts:
        # A handle of its own: an array keeps what it once copied to the host.
        handle = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
        parts[bounds] = np.asarray(handle)
    self.parts = [(tuple(slice(*bound) for bound in bounds), data) for bounds, data in parts.items()]

  def part(self, piece: Piece, rows: slice | None) -> np.ndarray:
    """What fills a piece, or rows of it: elements of one shard as they lie, of several put together."""
    index, dropped, cut = [], [], rows
    for at, size in zip(piece.target, self.shape, strict=True):
      if isinstance(at, int):
        index.append(slice(at, at + 1))
      else:
        index.append(cut or slice(0, size))
        cut = None
      dropped.append(0 if isinstance(at, int) else slice(None))
    return self._region(tuple(index))[(*dropped, ...)]

  def _region(self, index: Bounds) -> np.ndarray:
    whole = None
    for bounds, data in self.parts:
      common = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index, bounds, strict=True)
      )
      if any(c.start >= c.stop for c in common):
        continue
      part = data[_within(bounds, common)]
      if common == index:
        return part
      if whole is None:
        whole = np.empty([i.stop - i.start for i in index], self.dtype)
      whole[_within(index, common)] = part
    return np.empty([i.stop - i.start for i in index], self.dtype) if whole is None else whole


def _within(outer: Bounds, inner: Bounds) -> Any:
  """An index of an array that covers `outer`; the ellipsis makes a view also of a single element."""
  return *(slice(i.start - o.start, i.stop - o.start) for o, i in zip(outer, inner, strict=True)), ...


def _bounds(index: Bounds, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
  return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _gathered(array: Any) -> Any:
  """The array, with every part of it in every process. All processes must call it."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable or _is_everywhere(array):
    return array
  if not isinstance(array.sharding, NamedSharding):
    return multihost_utils.process_allgather(array, tiled=True)
  return _gather(NamedSharding(array.sharding.mesh, PartitionSpec()))(array)


@functools.cache
def _gather(replicated: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=replicated)


def _is_everywhere(array: jax.Array) -> bool:
  """Whether each process holds all parts. The same answer in all of them."""
  held: dict[int, set] = collections.defaultdict(set)
  device: Any
  for device, index in array.sharding.devices_indices_map(array.shape).items():
    held[device.process_index].add(_bounds(index, array.shape))
  return len(held) == jax.process_count() and all(
    len(parts) == len(set.union(*held.values())) for parts in held.values()
  )
