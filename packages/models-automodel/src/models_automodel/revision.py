"""One revision for all processes of a mesh: a branch may move between two questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from models_automodel.where import Where
from models_core.formats import Files
from models_core.processes import exchange, processes_of, together

# Longer than the hash of a commit.
_LONGEST = 256


def agree_on_revision(mesh: Mesh | None, where: Where, open_files: Callable[[], Files]) -> Where:
  """The same place at the revision that all processes take: what the first one of the mesh finds it to be.

  Args:
    mesh: whose processes load together.
    where: with the revision that was asked for; one process alone keeps it.
    open_files: asks the source; the files tell by an attribute `revision` what they are of.

  Raises:
    ProcessError: where another process failed.
  """
  processes = processes_of(mesh)
  if mesh is None or len(processes) == 1:
    return where
  pinned = None
  with together(mesh):
    if jax.process_index() == processes[0]:
      pinned = getattr(open_files(), "revision", None)
  row = (pinned or "").encode().ljust(_LONGEST, b"\0")
  agreed = exchange(mesh, row)[processes[0]].rstrip(b"\0").decode()
  return dataclasses.replace(where, revision=agreed or where.revision)
