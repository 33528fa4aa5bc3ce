"""Executing a load plan: every byte is read once and lands in the buffer that a device keeps.

A run of bytes that a shard takes as it is goes from the file straight into that shard's buffer. What must be
cast, decoded, split over columns or reordered passes through a scratch buffer of a few MB that stays in the
processor's cache. On a CPU the arrays alias the buffers; elsewhere they are transferred and let go.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from models_core.checkpoint import Files, LocalFiles, TensorInfo
from models_core.errors import CheckpointError
from models_core.plan import LoadPlan, PlannedParameter
from models_core.safetensors_headers import read_header
from models_core.weights import Piece, arrange, part_shape

# XLA's CPU client aliases host memory that starts at such a multiple, in bytes.
_ALIGNMENT = 64
# Scratch that stays in a core's cache, and the unit of parallel work, in bytes.
_CHUNK = 2 << 20
_TASK = 32 << 20
# Host memory of transfers under way to an accelerator, in bytes.
_IN_FLIGHT = 2 << 30

OnBytes = Callable[[int], None]
Index = tuple[slice, ...]


def load(plan: LoadPlan, *, on_bytes: OnBytes | None = None) -> nnx.Module:
  """Reads the tensors of a plan and places them.

  Args:
    plan: made by `plan_load`.
    on_bytes: called with the number of bytes that were read, from several threads.

  Returns:
    The model. Its parameters carry the sharding that the mesh holds.

  Raises:
    CheckpointError: if a file changed since its header was read, or a tied head differs from its twin.
  """
  return plan.model.fill(load_arrays(plan, on_bytes=on_bytes))


def load_arrays(plan: LoadPlan, *, on_bytes: OnBytes | None = None) -> dict[str, jax.Array]:
  """The arrays of a plan by parameter name. As `load`."""
  reader = _Reader(plan.checkpoint.files, plan.checkpoint.tensors, plan.files, on_bytes or (lambda count: None))
  try:
    # Leaving the pool waits for its threads: no file is closed under a read.
    with concurrent.futures.ThreadPoolExecutor(max(2, min(os.cpu_count() or 1, 16))) as pool:
      try:
        for tie in plan.ties:
          reader.check_equal(tie.tensor, tie.twin)
        return _place(plan, reader, pool)
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  finally:
    reader.close()


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A part of a parameter, the devices that hold it, and its host buffer."""

  index: Index
  devices: tuple[jax.Device, ...]
  buffer: np.ndarray


def _place(plan: LoadPlan, reader: _Reader, pool: concurrent.futures.Executor) -> dict[str, jax.Array]:
  arrays: dict[str, jax.Array] = {}
  # Parameters whose bytes are being read, first in first placed.
  reading: collections.deque = collections.deque()
  in_flight = 0
  on_cpu = _is_cpu(plan)

  def place_first() -> None:
    nonlocal in_flight
    planned, shards, tasks = reading.popleft()
    for task in tasks:
      task.result()
    arrays[planned.parameter.name] = _assemble(planned, shards)
    if not on_cpu:
      # The buffers are let go once the devices have their bytes.
      arrays[planned.parameter.name].block_until_ready()
    in_flight -= sum(shard.buffer.nbytes for shard in shards)

  for planned in plan.parameters:
    shards = _shards(planned)
    size = sum(shard.buffer.nbytes for shard in shards)
    while reading and not on_cpu and in_flight + size > _IN_FLIGHT:
      place_first()
    tasks = [pool.submit(task) for task in _tasks(planned, shards, reader)]
    reading.append((planned, shards, tasks))
    in_flight += size
  while reading:
    place_first()
  return arrays


def _is_cpu(plan: LoadPlan) -> bool:
  return all(
    device.platform == "cpu" for planned in plan.parameters for device in planned.parameter.sharding.device_set
  )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device can alias."""
  nbytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + nbytes].view(dtype).reshape(shape)


def _shards(planned: PlannedParameter) -> list[_Shard]:
  """The parts that this process's devices hold, each once."""
  shape, sharding = planned.parameter.shape, planned.parameter.sharding
  holders: dict[tuple, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
    holders.setdefault(bounds, []).append(device)
  return [
    _Shard(
      tuple(slice(*bound) for bound in bounds),
      tuple(devices),
      aligned_empty(tuple(stop - start for start, stop in bounds), planned.dtype),
    )
    for bounds, devices in holders.items()
  ]


def _assemble(planned: PlannedParameter, shards: list[_Shard]) -> jax.Array:
  """The global array of this process's shards. Never `device_put` to a sharding of several processes: it compares."""
  parts = [jax.device_put(shard.buffer, device) for shard in shards for device in shard.devices]
  parameter = planned.parameter
  return jax.make_array_from_single_device_arrays(parameter.shape, parameter.sharding, parts)


def _tasks(planned: PlannedParameter, shards: list[_Shard], reader: _Reader) -> Iterator[Callable[[], None]]:
  """The work of filling a parameter's shards, in units that threads share."""
  for piece in planned.pieces:
    info = reader.tensors[piece.tensor]
    shape = part_shape(piece, planned.parameter.shape)
    targets = [target for shard in shards if (target := _target(piece, shard)) is not None]
    if not targets:
      continue
    if piece.run is None:
      yield lambda piece=piece, info=info, shape=shape, targets=targets: _fill_reordered(
        piece, info, shape, targets, reader
      )
      continue
    row = math.prod(shape[1:])
    rows = shape[0] if shape else 1
    step = max(1, _TASK // max(1, row * info.dtype.itemsize))
    first = min((index[0].start for index, _ in targets), default=0) if shape else 0
    last = max((index[0].stop for index, _ in targets), default=rows) if shape else 1
    for start in range(first, last, step):
      stop = min(start + step, last)
      yield lambda piece=piece, info=info, shape=shape, targets=targets, start=start, stop=stop: _fill_rows(
        piece, info, shape, targets, start, stop, reader
      )


def _target(piece: Piece, shard: _Shard) -> tuple[Index, np.ndarray] | None:
  """Which part of a piece a shard takes, and the view of its buffer that gets it."""
  index: list[slice] = []
  at: list[int | slice] = []
  for bounds, position in zip(shard.index, piece.target, strict=True):
    if isinstance(position, int):
      if not bounds.start <= position < bounds.stop:
        return None
      at.append(position - bounds.start)
    else:
      index.append(bounds)
      at.append(slice(None))
  # The ellipsis makes a view also of a single element.
  return tuple(index), shard.buffer[(*at, ...)]


def _fill_rows(piece, info, shape, targets, start, stop, reader: _Reader) -> None:
  """Rows [start, stop) of a piece whose bytes lie in the file as they lie in the parameter."""
  if not shape:  # A scalar is one row of one element.
    shape, targets, start, stop = (1,), [((slice(0, 1),), target[None]) for _, target in targets], 0, 1
  row = math.prod(shape[1:])
  base = piece.run
  straight = []
  through = []
  for index, target in targets:
    whole = all(s.stop - s.start == size for s, size in zip(index[1:], shape[1:], strict=True))
    direct = whole and info.codec is None and target.dtype == info.dtype and target.flags.c_contiguous
    (straight if direct else through).append((index, target))
  for index, target in straight:
    low, high = max(start, index[0].start), min(stop, index[0].stop)
    if low < high:
      part = target[low - index[0].start : high - index[0].start]
      reader.read_into(info, (base + low * row), part)
  if not through:
    return
  step = max(1, _CHUNK // max(1, row * info.dtype.itemsize))
  for low in range(start, stop, step):
    high = min(low + step, stop)
    wanted = [(i, t) for i, t in through if i[0].start < high and low < i[0].stop]
    if not wanted:
      continue
    data = reader.read_elements(info, base + low * row, (high - low) * row).reshape(high - low, *shape[1:])
    for index, target in wanted:
      first, last = max(low, index[0].start), min(high, index[0].stop)
      part = target[first - index[0].start : last - index[0].start]
      cast_into(part, data[first - low : last - low][(slice(None), *index[1:])])


def _fill_reordered(piece: Piece, info: TensorInfo, shape, targets, reader: _Reader) -> None:
  """A piece whose axes lie in another order than the parameter's, or whose numbers differ."""
  data = reader.read_elements(info, 0, math.prod(info.shape))
  part = arrange(data, piece, shape)
  for index, target in targets:
    cast_into(target, part[index])


_BF16, _F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def cast_into(target: np.ndarray, source: np.ndarray) -> None:
  """Copies with a cast, rounding to nearest even."""
  if source.dtype == _BF16 and target.dtype == _F32 and target.flags.c_contiguous:
    # A bfloat16 is the upper half of a float32: integer moves are several times faster than the cast.
    bits = target.view(np.uint32)
    np.copyto(bits, source.view(np.uint16))
    np.left_shift(bits, np.uint32(16), out=bits)
  else:
    np.copyto(target, source, casting="unsafe")


class _Reader:
  """Byte ranges of the plan's files, for many threads at once."""

  def __init__(self, files: Files, tensors: Mapping[str, TensorInfo], names: tuple[str, ...], on_bytes: OnBytes):
    self.tensors = tensors
    self._on_bytes = on_bytes
    self._scratch = threading.local()
    self._where = files.fetch(names)
    self._open: dict[str, int] = {}
    try:
      for name in names:
        path = self._where if os.path.isfile(self._where) else os.path.join(self._where, name)
        self._open[name] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        described = {t.name: t for t in tensors.values() if t.file == name}
        size, last = os.fstat(self._open[name]).st_size, max(t.stop for t in described.values())
        if size < last:
          raise CheckpointError(path, [f"it has {size} bytes, but its header described {last}: it changed meanwhile"])
        if name.endswith(".safetensors"):
          found = {t.name: t for t in read_header(LocalFiles(self._where), name)[0]}
          if changed := next((t for t in described if found.get(t) != described[t]), None):
            raise CheckpointError(path, [f"{changed} is not where its header described it: it changed meanwhile"])
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    for descriptor in self._open.values():
      os.close(descriptor)
    self._open.clear()

  def _pread(self, info: TensorInfo, start: int, buffer: np.ndarray) -> None:
    """Fills a uint8 buffer from byte `start` of a tensor."""
    view = memoryview(buffer)
    offset, done = info.start + start, 0
    while done < len(view):
      count = os.preadv(self._open[info.file], [view[done : done + (1 << 30)]], offset + done)
      if not count:
        raise CheckpointError(f"{self._where}/{info.file}", [f"{info.name}: the file ended early; it changed meanwhile"])
      done += count
      self._on_bytes(count)

  def read_into(self, info: TensorInfo, element: int, target: np.ndarray) -> None:
    """Elements from `element` on, into contiguous memory of the same dtype."""
    self._pread(info, element * info.dtype.itemsize, target.reshape(-1).view(np.uint8))

  def read_elements(self, info: TensorInfo, element: int, count: int) -> np.ndarray:
    """Elements, decoded; valid until this thread's next call."""
    codec = info.codec
    if codec is None:
      start, nbytes = element * info.dtype.itemsize, count * info.dtype.itemsize
    else:
      start, nbytes = (n // codec.block_size * codec.block_bytes for n in (element, count))
    scratch = getattr(self._scratch, "buffer", None)
    if scratch is None or scratch.nbytes < nbytes:
      scratch = self._scratch.buffer = aligned_empty((max(nbytes, _CHUNK),), np.dtype(np.uint8))
    self._pread(info, start, scratch[:nbytes])
    return scratch[:nbytes].view(info.dtype) if codec is None else codec.decode(scratch[:nbytes])

  def check_equal(self, name: str, twin: str) -> None:
    """Compares two tensors' bytes.

    Raises:
      CheckpointError: if they differ.
    """
    a, b = self.tensors[name], self.tensors[twin]
    nbytes = a.stop - a.start
    same = (a.shape, a.dtype, nbytes) == (b.shape, b.dtype, b.stop - b.start)
    left, right = (np.empty(min(nbytes, _CHUNK), np.uint8) for _ in range(2))
    for start in range(0, nbytes if same else 0, _CHUNK):
      size = min(_CHUNK, nbytes - start)
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
