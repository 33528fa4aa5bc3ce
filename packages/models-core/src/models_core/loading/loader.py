"""Executing a load plan: every byte is read once and lands in the buffer that a device keeps.

On a CPU the arrays alias the buffers that were filled; elsewhere the buffers are transferred and let go.

Over several processes each reads its own part (`models_core.loading.process_split`), and after every batch they make
sure that all succeeded before the devices exchange what they hold.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

import jax
from flax import nnx

from models_core.formats import OnBytes, TensorReader
from models_core.loading.fill import Shard, shards_of, tasks
from models_core.loading.plan import LoadPlan, PlannedParameter
from models_core.loading.process_split import files_of_process, part_to_read, redistribute
from models_core.processes import check_same, processes_of, together

_log = logging.getLogger(__name__)

# What a process reads before it meets the others, in bytes.
_BATCH = 1 << 30
# Host memory of transfers under way to an accelerator, in bytes.
_IN_FLIGHT = 2 << 30


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
  if notes := plan.notes():
    _log.warning("\n".join([f"{plan.checkpoint.files.path}:", *notes]))
  return plan.model.fill(load_arrays(plan, on_bytes=on_bytes))


def load_arrays(plan: LoadPlan, *, on_bytes: OnBytes | None = None) -> dict[str, jax.Array]:
  """The arrays of a plan by parameter name. As `load`."""
  with OpenedPlan(plan, on_bytes) as opened:
    return opened.read_all()


class OpenedPlan:
  """A plan whose parameters are read as they are asked for, through one reader: `with plan.open() as opened`.

  The files are opened, and tied tensors compared, by the first read. Under several processes all of them make the same
  reads in the same order.

  Args:
    plan: made by `plan_load`.
    on_bytes: called with the number of bytes that were read, from several threads.
  """

  def __init__(self, plan: LoadPlan, on_bytes: OnBytes | None = None):
    self.plan = plan
    self._on_bytes = on_bytes or (lambda count: None)
    self._parameters = {planned.parameter.name: planned for planned in plan.parameters}
    self._processes = processes_of(plan.mesh)
    self._reader: TensorReader | None = None
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None

  def __enter__(self) -> OpenedPlan:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    # No file is closed under a read.
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
    if self._reader is not None:
      self._reader.close()

  @property
  def reader(self) -> TensorReader:
    """The reader of the checkpoint, for tensors that no parameter takes."""
    if self._reader is None:
      mesh, ties = self.plan.mesh, self.plan.ties
      check_same(mesh, "checkpoint", _fingerprint(self.plan))
      with together(mesh):
        reader = self.plan.checkpoint.open(files_of_process(self.plan), self._on_bytes)
      try:
        with together(mesh):
          for tie in ties:
            part = self._processes.index(jax.process_index())
            reader.check_equal(tie.tensor, tie.twin, part, len(self._processes))
      except BaseException:
        reader.close()
        raise
      self._reader = reader
      self._pool = concurrent.futures.ThreadPoolExecutor(reader.threads)
    return self._reader

  def read(self, name: str) -> jax.Array:
    """One parameter.

    Raises:
      CheckpointError: if a file changed since its header was read, or a tied head differs from its twin.
    """
    return self.read_all([name])[name]

  def read_all(self, names: Iterable[str] | None = None) -> dict[str, jax.Array]:
    """Parameters by name; all of them where no names are given. As `read`."""
    chosen = self._parameters.values() if names is None else [self._parameters[name] for name in names]
    reader, mesh = self.reader, self.plan.mesh
    assert self._pool is not None
    arrays: dict[str, jax.Array] = {}
    for batch in _batches(chosen, len(self._processes)):
      with together(mesh):
        ways = [part_to_read(planned, reader.tensors) for planned in batch]
        read = _place(ways, reader, self._pool, on_cpu=_is_cpu(batch))
      for planned in batch:
        parameter = planned.parameter
        arrays[parameter.name] = redistribute(read.pop(parameter.name), parameter.shape, parameter.sharding)
    return arrays


def _fingerprint(plan: LoadPlan) -> bytes:
  """Of all that the headers say, so that processes that see different versions of a checkpoint find out."""
  tensors = plan.checkpoint.tensors.values()
  said = [f"{t.name} {t.dtype} {t.shape} {t.file} {t.start} {t.stop}" for t in tensors]
  return hashlib.sha256("\n".join(said).encode()).digest()


def _batches(parameters: Iterable[PlannedParameter], processes: int) -> Iterator[list[PlannedParameter]]:
  """Parameters that are read before the processes meet; all of them where there is one process."""
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
  arrays: dict[str, jax.Array] = {}
  # Parameters whose bytes are being read, first in first placed.
  under_way: collections.deque = collections.deque()
  in_flight = 0

  def place_first() -> None:
    nonlocal in_flight
    planned, shards, submitted = under_way.popleft()
    for task in submitted:
      task.result()
    arrays[planned.parameter.name] = _assemble(planned, shards)
    if not on_cpu:
      # The buffers are let go once the devices have their bytes.
      arrays[planned.parameter.name].block_until_ready()
    in_flight -= sum(shard.buffer.nbytes for shard in shards)

  for group in _groups(parameters, reader):
    filled = [(planned, shards_of(planned, reader, alias=on_cpu)) for planned in group]
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
  """Parameters that are read together: those of one tensor, where it is read cell by cell."""
  groups: dict[str, list[PlannedParameter]] = {}
  for planned in parameters:
    is_fused = reader.cells is not None and len(planned.pieces) == 1
    groups.setdefault(planned.pieces[0].tensor if is_fused else planned.parameter.name, []).append(planned)
  return list(groups.values())


def _is_cpu(parameters: Iterable[PlannedParameter]) -> bool:
  devices: set[jax.Device] = set()
  for planned in parameters:
    devices |= planned.parameter.sharding.device_set
  return all(device.platform == "cpu" for device in devices)


def _assemble(planned: PlannedParameter, shards: list[Shard]) -> jax.Array:
  """The global array of this process's shards. Never `device_put` to a sharding of several processes: it compares."""
  parts = [jax.device_put(shard.buffer, device) for shard in shards for device in shard.devices]
  parameter = planned.parameter
  return jax.make_array_from_single_device_arrays(
    parameter.shape, parameter.sharding, parts, dtype=planned.dtype
  )
