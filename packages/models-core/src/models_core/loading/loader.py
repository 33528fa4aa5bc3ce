"""Executes a load plan: from the headers of a checkpoint to a model on its devices."""

from __future__ import annotations

import logging

import jax
from flax import nnx

from models_core.formats import OnBytes
from models_core.loading.plan import LoadPlan

_log = logging.getLogger(__name__)


def load(plan: LoadPlan, *, on_bytes: OnBytes | None = None) -> nnx.Module:
  """Reads the tensors of a plan and creates the model.

  Under several processes all must call this.

  Args:
    plan: made by `plan_load`.
    on_bytes: called with the number of bytes of each read, from several threads.

  Returns:
    The model. Its parameters have the shardings of the plan's abstract model.

  Raises:
    CheckpointError: if a file changed since its header was read, or a stored tied head differs from the embedding.
    ProcessError: if another process failed or sees a different checkpoint.
  """
  log_notes(plan)
  return plan.model.fill(load_arrays(plan, on_bytes=on_bytes))


def log_notes(plan: LoadPlan) -> None:
  """Logs what a user of a plan's model may not expect."""
  if notes := plan.notes():
    _log.warning("\n".join([f"{plan.checkpoint.files.path}:", *notes]))


def load_arrays(plan: LoadPlan, *, on_bytes: OnBytes | None = None) -> dict[str, jax.Array]:
  """Reads the tensors of a plan, as `load` does, and returns the arrays by parameter name."""
  with plan.open(on_bytes) as opened:
    return opened.read_all()
