"""Agreement on one revision: a branch may move between the requests of two processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh

from models_automodel.where import Where
from models_core.formats import Files
from models_core.processes import exchange, processes_of, together

# Bytes of a revision that are exchanged; a commit hash is shorter.
_LONGEST = 256


def agree_on_revision(
  mesh: Mesh | AbstractMesh | None, where: Where, open_files: Callable[[], Files]
) -> Where:
  """Pins the revision for all processes of a mesh: the first process asks the source, the others take its answer.

  Args:
    mesh: whose processes load together.
    where: with the requested revision; returned unchanged if there is only one process.
    open_files: asks the source; the attribute `revision` of the files it returns is the pinned version.

  Raises:
    ProcessError: if another process failed.
  """
  processes = processes_of(mesh)
  if not isinstance(mesh, Mesh) or len(processes) == 1:
    return where
  pinned = None
  with together(mesh):
    if jax.process_index() == processes[0]:
      pinned = getattr(open_files(), "revision", None)
  row = (pinned or "").encode().ljust(_LONGEST, b"\0")
  agreed = exchange(mesh, row)[processes[0]].rstrip(b"\0").decode()
  return dataclasses.replace(where, revision=agreed or where.revision)
