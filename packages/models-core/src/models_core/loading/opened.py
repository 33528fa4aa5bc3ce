"""Reads the parameters of a load plan: every byte is read once, into the buffer that a device keeps.

On CPUs the arrays alias the buffers that were filled; on accelerators the buffers are transferred, then freed.

Under several processes, each reads its own part (`models_core.loading.process_split`). After each batch the processes
check that all of them succeeded, before their devices exchange what was read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import jax

from models_core.errors import CheckpointError
from models_core.formats import Checkpoint, OnBytes, TensorReader, bounds_of
from models_core.loading.fill import Shard, shards_of, tasks
from models_core.loading.planned import PlannedParameter, mesh_of
from models_core.loading.process_split import files_of_process, part_to_read, redistribute
from models_core.loading.ties import are_equal, differing
from models_core.processes import check_same, processes_of, together
from models_core.weights import Tied

# Bytes that a process reads before it synchronises with the others.
_BATCH = 128 << 20
# Bytes of parameters whose tensors are read side by side.
_WINDOW = 64 << 20
# Bytes of host memory that wait for their transfer to an accelerator.
_IN_FLIGHT = 2 << 30


class OpenedPlan:
  """A plan whose parameters are read on request, through one reader: `with plan.open() as opened`.

  The first read opens the files and compares tied tensors. Under several processes, all must make the same reads in the
  same order.

  Args:
    checkpoint: the headers of the checkpoint.
    parameters: the parameters of the plan.
    ties: pairs of tensors that must be equal.
    on_bytes: called with the number of bytes of each read, from several threads.
    config: of the model, for messages.
  """

  def __init__(
    self,
    checkpoint: Checkpoint,
    parameters: Sequence[PlannedParameter],
    ties: Sequence[Tied],
    on_bytes: OnBytes | None = None,
    config: Any = None,
  ):
    self._checkpoint = checkpoint
    self._parameters = {planned.parameter.name: planned for planned in parameters}
    self._ties = ties
    self._config = config
    self._on_bytes = on_bytes or (lambda count: None)
    self._mesh = mesh_of(parameters)
    self._processes = processes_of(self._mesh)
    self._reader: TensorReader | None = None
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._lock = threading.Lock()
    self._is_closed = False

  def __enter__(self) -> OpenedPlan:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._is_closed = True
    # Files may be closed only after all reads have ended.
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
    if self._reader is not None:
      self._reader.close()

  @property
  def reader(self) -> TensorReader:
    """The reader of the checkpoint, for tensors that belong to no parameter. The first use opens the files.

    Raises:
      CheckpointError: if a file changed since its header was read, or a stored tied head differs from the embedding.
      ProcessError: if another process failed or sees a different checkpoint.
      ValueError: after the `with` block.
    """
    with self._lock:
      if self._is_closed:
        raise ValueError("the opened plan is closed: read its parameters within `with plan.open() as opened`")
      if self._reader is None:
        self._reader = self._open()
        self._pool = concurrent.futures.ThreadPoolExecutor(self._reader.threads)
      return self._reader

  def _open(self) -> TensorReader:
    check_same(self._mesh, "checkpoint", functools.partial(_fingerprint, self._checkpoint))
    with together(self._mesh):
      files = files_of_process(self._checkpoint, self._parameters.values(), self._ties)
      reader = self._checkpoint.open(files, self._on_bytes)
    try:
      with together(self._mesh):
        part = self._processes.index(jax.process_index())
        dtypes = {
          piece.tensor: planned.dtype for planned in self._parameters.values() for piece in planned.pieces
        }
        problems = [
          differing(tie.tensor, tie.twin, self._config)
          for tie in self._ties
          if not are_equal(reader, tie, dtypes.get(tie.twin), part, len(self._processes))
        ]
        if problems:
          raise CheckpointError(reader.where, problems)
    except BaseException:
      reader.close()
      raise
    return reader

  def read(self, name: str) -> jax.Array:
    """Reads one parameter, by name.

    Raises:
      CheckpointError: if a file changed since its header was read, or a stored tied head differs from the embedding.
      KeyError: if the plan has no such parameter.
      ProcessError: if another process failed or sees a different checkpoint.
      ValueError: after the `with` block.
    """
    return self.read_all([name])[name]

  def read_all(self, names: Iterable[str] | None = None) -> dict[str, jax.Array]:
    """Reads several parameters, as `read` does, and returns them by name.

    Args:
      names: names of the parameters; None reads all.
    """
    chosen = self._parameters.values() if names is None else [self._parameters[name] for name in names]
    reader = self.reader
    assert self._pool is not None
    arrays: dict[str, jax.Array] = {}
    for batch in _batches(chosen, len(self._processes)):
      with together(self._mesh):
        ways = [part_to_read(planned, reader.tensors) for planned in batch]
        read = _place(ways, reader, self._pool, on_cpu=_is_cpu(batch))
      for planned in batch:
        parameter = planned.parameter
        arrays[parameter.name] = redistribute(read.pop(parameter.name), parameter.shape, parameter.sharding)
    return arrays


def _fingerprint(checkpoint: Checkpoint) -> bytes:
  """A hash of the headers, by which processes notice that they see different versions of a checkpoint."""
  whole = checkpoint.tensors.values()
  tensors = [*whole, *(part for info in whole for part in info.stored)]
  said = [f"{t.name} {t.dtype} {t.shape} {t.file} {t.start} {t.stop} {t.encoding}" for t in tensors]
  return hashlib.sha256("\n".join(said).encode()).digest()


def _batches(parameters: Iterable[PlannedParameter], processes: int) -> Iterator[list[PlannedParameter]]:
  """Batches of parameters, after each of which the processes synchronise. A single process has a single batch."""
  batch: list[PlannedParameter] = []
  size = 0
  for planned in parameters:
    batch.append(planned)
    size += planned.nbytes // processes
    if size > _BATCH and processes > 1:
      yield batch
      batch, size = [], 0
  yield batch


def _place(
  parameters: Sequence[PlannedParameter],
  reader: TensorReader,
  pool: concurrent.futures.Executor,
  *,
  on_cpu: bool,
) -> dict[str, jax.Array]:
  """Reads parameters and puts them on this process's devices; arrays by name."""
  arrays: dict[str, jax.Array] = {}
  # Parameters whose bytes are being read, in the order in which they are placed.
  under_way: collections.deque = collections.deque()
  in_flight = 0

  def place_first() -> None:
    nonlocal in_flight
    planned, shards, submitted = under_way.popleft()
    for task in submitted:
      task.result()
    arrays[planned.parameter.name] = _assemble(planned, shards)
    if not on_cpu:
      # The buffers are freed once the devices have their bytes.
      arrays[planned.parameter.name].block_until_ready()
    in_flight -= sum(shard.buffer.nbytes for shard in shards)

  for window in _windows(_groups(parameters, reader)):
    filled = [(planned, shards_of(planned, reader, alias=on_cpu)) for planned in window]
    size = sum(shard.buffer.nbytes for _, shards in filled for shard in shards)
    while under_way and not on_cpu and in_flight + size > _IN_FLIGHT:
      place_first()
    submitted = [pool.submit(task) for task in tasks(filled, reader)]
    under_way.extend((planned, shards, submitted) for planned, shards in filled)
    in_flight += size
  while under_way:
    place_first()
  return arrays


def _groups(parameters: Sequence[PlannedParameter], reader: TensorReader) -> list[list[PlannedParameter]]:
  """Groups of parameters that are read together: those that share a tensor, if it is stored in cells."""
  groups: dict[str, list[PlannedParameter]] = {}
  for planned in parameters:
    is_fused = reader.cells is not None and len(planned.pieces) == 1
    groups.setdefault(planned.pieces[0].tensor if is_fused else planned.parameter.name, []).append(planned)
  return list(groups.values())


def _windows(groups: Iterable[Sequence[PlannedParameter]]) -> Iterator[list[PlannedParameter]]:
  """Joins groups, until they have the bytes of a window. Threads read the tensors of one, file by file, in large pieces.

  While a thread reads a piece it does not need Python's lock, which other threads may hold for milliseconds.
  """
  window: list[PlannedParameter] = []
  nbytes = 0
  for group in groups:
    window += group
    nbytes += sum(planned.nbytes for planned in group)
    if nbytes >= _WINDOW:
      yield window
      window, nbytes = [], 0
  if window:
    yield window


def _is_cpu(parameters: Iterable[PlannedParameter]) -> bool:
  """Whether all devices that hold some parameters are CPUs."""
  devices: set[jax.Device] = set()
  for planned in parameters:
    devices |= planned.parameter.sharding.device_set
  return all(device.platform == "cpu" for device in devices)


def _assemble(planned: PlannedParameter, shards: list[Shard]) -> jax.Array:
  """The global array of this process's shards, which one call puts on all of its devices.

  It avoids `device_put` to a sharding over several processes, which would compare the values of all processes.
  """
  shape = planned.parameter.shape
  buffers = {bounds_of(shard.index, shape): shard.buffer for shard in shards}
  return jax.make_array_from_callback(
    shape,
    planned.parameter.sharding,
    lambda index: buffers[bounds_of(index or (), shape)],
    dtype=planned.dtype,
  )
