"""Agreement between the processes of a mesh under `jax.distributed`: all go on, or all fail.

A process that fails alone would leave the others waiting in a collective operation for it. All that is exchanged
travels as an array over the mesh's own devices, so that processes outside the mesh need not take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models_core.errors import ModelsError


class ProcessError(ModelsError, RuntimeError):
  """Another process of the mesh failed, or holds something else than this one."""


def processes_of(mesh: Mesh | None) -> list[int]:
  """Indices of the processes whose devices a mesh has; without a mesh, this one."""
  if mesh is None:
    return [jax.process_index()]
  return sorted({device.process_index for device in mesh.devices.flat})


def exchange(mesh: Mesh, row: bytes) -> dict[int, bytes]:
  """Gives every process of the mesh what each of them passes.

  Args:
    mesh: all of its processes must call this, with rows of one length.
    row: of this process.

  Returns:
    Rows by the index of the process.
  """
  devices = mesh.devices.reshape(-1)
  flat = Mesh(devices, ("devices",))
  values = np.frombuffer(row, np.uint8)[None]
  parts = [
    jax.device_put(values, device) for device in devices if device.process_index == jax.process_index()
  ]
  rows = jax.make_array_from_single_device_arrays(
    (len(devices), len(row)), NamedSharding(flat, PartitionSpec("devices")), parts
  )
  everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(flat, PartitionSpec()))(rows)
  gathered = np.asarray(everywhere.addressable_data(0))
  return {device.process_index: bytes(gathered[i]) for i, device in enumerate(devices)}


@contextlib.contextmanager
def together(mesh: Mesh | None) -> Iterator[None]:
  """Runs a block in every process of a mesh; where one fails, the others fail, too, instead of waiting for it.

  The block must contain no collective operation.

  Raises:
    ProcessError: where this process did well and another one failed.
  """
  if mesh is None or len(processes_of(mesh)) == 1:
    yield
    return
  try:
    yield
  except BaseException:
    exchange(mesh, b"\0")
    raise
  failed = [str(process) for process, flag in exchange(mesh, b"\1").items() if flag != b"\1"]
  if failed:
    raise ProcessError(f"process {', '.join(failed)} failed: its own error says why")


def check_same(mesh: Mesh | None, what: str, fingerprint: bytes) -> None:
  """Compares a fingerprint over the processes of a mesh.

  Raises:
    ProcessError: in all of them, if it is not the same everywhere.
  """
  if mesh is None or len(processes_of(mesh)) == 1:
    return
  found = exchange(mesh, fingerprint)
  first = min(found)
  if others := [str(process) for process, theirs in found.items() if theirs != found[first]]:
    raise ProcessError(f"process {', '.join(others)} sees another {what} than process {first}")
