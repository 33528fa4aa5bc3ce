"""The formats and naming schemes in which checkpoints are written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from models_core.formats import ORBAX, SAFETENSORS, Format
from models_core.saving.orbax_saver import save_parameters_to_orbax
from models_core.saving.parameters import save_parameters_to_safetensors


@dataclasses.dataclass(frozen=True)
class Writer:
  """How checkpoints are written in one naming scheme.

  Attributes:
    format: the format.
    save: called as `save(parameters, get, save_dir, *, family, config, base, dtype, overwrite, on_total,
      on_bytes)`.
    has_shards: whether `save` also takes `max_shard_size`.
    has_targets: whether `save_dir` may be a target; otherwise it is a directory of this machine.
  """

  format: Format
  save: Callable[..., None]
  has_shards: bool = False
  has_targets: bool = False


# The writers, by the naming scheme that they write.
WRITERS = {
  SAFETENSORS.naming: Writer(SAFETENSORS, save_parameters_to_safetensors, has_shards=True, has_targets=True),
  ORBAX.naming: Writer(ORBAX, save_parameters_to_orbax),
  # MaxText keeps the parameters of a Flax module in a state of its own.
  "maxtext": Writer(
    ORBAX, functools.partial(save_parameters_to_orbax, naming="maxtext", wrapping="params.params.")
  ),
}
