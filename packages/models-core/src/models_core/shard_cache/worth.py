"""Whether an entry is worth its room: not where the checkpoint's own files hold what the devices take."""

from __future__ import annotations

import math
from typing import Any

from models_core.formats import ALIGNMENT, RangeFiles
from models_core.loading import LoadPlan, PlannedParameter

# The part of a model's bytes that must change on their way to the devices.
_WORTH = 0.01


def is_as_stored(plan: LoadPlan) -> bool:
  """Whether a load reads parameters as they are in files of this machine; a CPU maps them.

  A second copy of them would load no faster.
  """
  if isinstance(plan.checkpoint.files, RangeFiles) or "://" in plan.checkpoint.files.path:
    return False
  changed = sum(planned.nbytes for planned in plan.parameters if not _is_as_stored(planned, plan))
  return changed <= _WORTH * sum(planned.nbytes for planned in plan.parameters)


def _is_as_stored(planned: PlannedParameter, plan: LoadPlan) -> bool:
  infos = [plan.checkpoint.tensors[piece.tensor] for piece in planned.pieces]
  if any(piece.run is None for piece in planned.pieces) or any(
    info.dtype != planned.dtype or info.encoding is not None or info.cell is not None for info in infos
  ):
    return False
  devices: Any = planned.parameter.sharding.device_set
  if any(device.platform != "cpu" for device in devices):
    return True
  # A CPU maps whole rows of a single tensor, from an aligned byte on.
  shape, (piece, *others), (info, *_) = planned.parameter.shape, planned.pieces, infos
  shard = planned.parameter.sharding.shard_shape(shape)
  start = info.start + (piece.run or 0) * info.dtype.itemsize
  nbytes = math.prod(shard) * info.dtype.itemsize
  steps = (start,) if shard == shape else (start, nbytes)
  return not others and shard[1:] == shape[1:] and all(step % ALIGNMENT == 0 for step in steps)
