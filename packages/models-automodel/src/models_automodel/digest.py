"""The digest of a model's weights, in memory or in a checkpoint."""

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
  """Computes the digest of a model's weights. A checkpoint and the model that was loaded from it have equal digests.

  The digest depends on the dtype, but neither on the mesh nor on the format of the checkpoint. The weights of a
  checkpoint are read about a gigabyte at a time.

  Args:
    model: a model in memory, or what `AutoModel.from_pretrained` takes: a repository, a directory or a GGUF file.
    **kwargs: arguments of `AutoModel.plan`, for a checkpoint.

  Raises:
    ModelsError: if a parameter of a model in memory holds no array; for a checkpoint as `AutoModel.from_pretrained`.
    TypeError: if keyword arguments are given for a model in memory.
  """
  if isinstance(model, nnx.Module):
    if kwargs:
      raise TypeError(
        f"{', '.join(kwargs)}: these arguments are for checkpoints only: leave them out for a model in memory"
      )
    return digest_of_model(model)
  plan = AutoModel.plan(model, **kwargs)
  with source_errors():
    return digest_plan(plan)
