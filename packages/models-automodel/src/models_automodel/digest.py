"""One number for a model's weights, in memory or in a checkpoint."""

from __future__ import annotations

import os
from typing import Any

from flax import nnx

from models_automodel.automodel import AutoModel
from models_automodel.errors import source_errors
from models_automodel.where import Where
from models_core.digest import Digest, digest_plan
from models_core.digest import digest as digest_of_model

__all__ = ["Digest", "digest"]


def digest(model: nnx.Module | str | os.PathLike | Where, **kwargs: Any) -> Digest:
  """What stands for the weights of a model: equal for a checkpoint and the model that was loaded from it.

  The mesh and the form of the checkpoint don't count; the dtype does. Weights of a checkpoint are read about a gigabyte
  at a time.

  Args:
    model: in memory, or what `AutoModel.from_pretrained` takes: a repository, a directory or a GGUF file.
    **kwargs: as `AutoModel.plan` takes them, for a checkpoint.

  Raises:
    CheckpointError: and all else that `AutoModel.from_pretrained` raises, for a checkpoint.
    ModelsError: if a parameter of a model holds no array.
    TypeError: for keyword arguments beside a model in memory.
  """
  if isinstance(model, nnx.Module):
    if kwargs:
      raise TypeError(f"{', '.join(kwargs)}: only a checkpoint takes these, a model in memory is as it is")
    return digest_of_model(model)
  plan = AutoModel.plan(model, **kwargs)
  with source_errors():
    return digest_plan(plan)
