"""The one way into the shard cache: a load that is looked up first, and kept afterwards.

Whatever fails in the cache is told as a note. The load goes on without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from models_core.errors import CheckpointError
from models_core.layers import dotted
from models_core.loading import AbstractModel, LoadPlan
from models_core.processes import exchange, processes_of
from models_core.saving import local_path, parse_size, replace_directory
from models_core.shard_cache.bound import make_room, mark_used, remove
from models_core.shard_cache.entry import can_keep, planned_file, read_entry, shards_of, write_entry
from models_core.shard_cache.identity import (
  NotKeptError,
  Versions,
  key_of,
  versions_of,
  wait_until_settled,
)
from models_core.shard_cache.worth import is_as_stored

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardCache:
  """A directory that keeps loaded parameters as they lie on this process's devices.

  An entry is found by the versions of the checkpoint's files, the mesh, and the sharding, the dtype and the pieces of each
  parameter. All of its bytes are verified before it is used. A CPU uses the mapped file itself. Several processes use an
  entry only if each of them has one.

  Attributes:
    directory: that holds the entries. Other files in it stay.
    limit: bytes that all entries may have; entries that were not used for longest are removed for a new one.
  """

  directory: str
  limit: int

  @classmethod
  def of(cls, directory: str | os.PathLike, max_size: int | str) -> ShardCache:
    """Takes a directory and a size such as "100GB".

    Raises:
      SaveError: if the directory is an address.
      ValueError: if the size is none.
    """
    return cls(local_path(os.fspath(directory)), parse_size(max_size))

  def helps(self, plan: LoadPlan) -> bool:
    """Whether an entry would load faster than the checkpoint; if not, this is noted."""
    if as_stored := is_as_stored(plan):
      self._note("not used, because the checkpoint's own files hold the parameters as the devices take them")
    return not as_stored

  def load(
    self, plan: LoadPlan, model: AbstractModel, make: Callable[[], nnx.Module], *, also: bytes = b""
  ) -> nnx.Module:
    """The model of a plan: from its entry, if there is one, otherwise newly made and then kept.

    Under several processes all must call this.

    Args:
      plan: of the checkpoint, whose files are fetched.
      model: that is filled.
      make: loads the plan, and does to its model whatever else is to be kept.
      also: whatever else than the plan decides the numbers, such as an adapter.

    Raises:
      Exception: whatever `make` raises. What fails in the cache is noted.
    """
    entry, versions = self._entry_of(plan, also)
    arrays = None if entry is None else self._read(entry, plan.mesh, model)
    if _by_all(plan.mesh, arrays is not None):
      assert arrays is not None
      assert entry is not None
      mark_used(entry)
      return model.fill(arrays)
    del arrays
    if entry is None:
      return make()
    settled = False
    with self._noted():
      wait_until_settled(versions)
      settled = True
    made = make()
    with self._noted():
      if settled and versions_of(plan) != versions:
        raise NotKeptError("a file of the checkpoint changed while it was loaded")
      if settled:
        self._keep(entry, made, plan.mesh)
    return made

  def _entry_of(self, plan: LoadPlan, also: bytes) -> tuple[str | None, Versions]:
    """The directory of an entry, and the versions of the files that it is made of; None if nothing tells them."""
    with self._noted():
      versions = versions_of(plan)
      return os.path.join(self.directory, key_of(plan, versions, also)), versions
    return None, ()

  def _read(self, entry: str, mesh: Mesh | None, model: AbstractModel) -> dict[str, jax.Array] | None:
    """The arrays of an entry; None if there is none. One that is broken is removed."""
    if not os.path.lexists(entry):
      return None
    try:
      arrays = read_entry(entry, mesh)
      if _shapes(arrays) == _shapes(model.parameters):
        return arrays
      reason = "it holds other parameters"
    except Exception as error:
      reason = _said(error)
    self._note(f"an entry is broken, and is made anew: {reason}")
    remove(entry)
    return None

  def _keep(self, entry: str, model: nnx.Module, mesh: Mesh | None) -> None:
    """Writes an entry, unless another process was faster."""
    if os.path.lexists(entry):
      return
    arrays = {
      dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    if not all(can_keep(array, mesh) for array in arrays.values()):
      raise NotKeptError("an array lies on another mesh than the plan's")
    shards = shards_of(arrays)
    file = planned_file(shards)
    os.makedirs(self.directory, exist_ok=True)
    make_room(self.directory, file.nbytes, self.limit)
    with replace_directory(entry, nbytes=file.nbytes) as building:
      write_entry(building, arrays, shards, file)

  @contextlib.contextmanager
  def _noted(self) -> Iterator[None]:
    """Notes why a load is not kept, in the place of an error."""
    try:
      yield
    except Exception as error:
      self._note(f"the load is not kept: {_said(error)}")

  def _note(self, what: str) -> None:
    _log.warning("cache_dir %s: %s", self.directory, what)


def _said(error: Exception) -> str:
  if isinstance(error, CheckpointError):
    return "; ".join(error.problems)
  return str(error) if isinstance(error, NotKeptError | OSError) else f"{type(error).__name__}: {error}"


def _shapes(parameters: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


def _by_all(mesh: Mesh | None, succeeded: bool) -> bool:
  """Whether all processes of a mesh succeeded. All of them must call this."""
  if mesh is None or len(processes_of(mesh)) == 1:
    return succeeded
  return all(row == b"\1" for row in exchange(mesh, b"\1" if succeeded else b"\0").values())
