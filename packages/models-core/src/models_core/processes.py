"""Agreement between the processes of a mesh under `jax.distributed`: either all of them continue, or all raise.

If one process failed alone, the others would wait for it forever in a collective operation. The processes exchange
bytes as an array on the mesh's own devices, so that processes outside the mesh need not take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from models_core.errors import ModelsError


class ProcessError(ModelsError, RuntimeError):
  """Another process of the mesh failed, or sees something different from this one."""


def processes_of(mesh: Mesh | AbstractMesh | None) -> list[int]:
  """Sorted indices of the processes that own the devices of a mesh; without devices, this process alone."""
  if mesh is None or isinstance(mesh, AbstractMesh):
    return [jax.process_index()]
  return sorted({device.process_index for device in mesh.devices.flat})


def exchange(mesh: Mesh, row: bytes) -> dict[int, bytes]:
  """Sends the bytes of each process of a mesh to all of its processes.

  Args:
    mesh: all of its processes must call this, with rows of equal length.
    row: the bytes that this process sends.

  Returns:
    The row of each process, by process index.
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
def together(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
  """Runs a block in every process of a mesh. If it fails in one process, the others raise instead of waiting for it.

  The block must not contain collective operations.

  Args:
    mesh: all of its processes must enter the block; None is this process alone.

  Raises:
    ProcessError: if the block succeeded in this process and failed in another one.
  """
  if not isinstance(mesh, Mesh) or len(processes_of(mesh)) == 1:
    yield
    return
  try:
    yield
  except BaseException:
    exchange(mesh, b"\0")
    raise
  failed = [str(process) for process, flag in exchange(mesh, b"\1").items() if flag != b"\1"]
  if failed:
    raise ProcessError(f"process {', '.join(failed)} failed: the error raised there says why")


def check_same(mesh: Mesh | None, what: str, fingerprint: Callable[[], bytes]) -> None:
  """Checks that all processes of a mesh see the same thing.

  Args:
    mesh: all of its processes must call this; None is this process alone.
    what: the thing, for the error message, such as "checkpoint".
    fingerprint: returns bytes that identify it, of the same length in all processes. It is called if there are several.

  Raises:
    ProcessError: in all processes, if the fingerprints differ.
  """
  if mesh is None or len(processes_of(mesh)) == 1:
    return
  found = exchange(mesh, fingerprint())
  first = min(found)
  if others := [str(process) for process, theirs in found.items() if theirs != found[first]]:
    raise ProcessError(
      f"process {', '.join(others)} sees a different {what} from process {first}: give all processes the same one"
    )
