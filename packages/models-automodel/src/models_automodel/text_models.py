"""A model that takes and gives texts, from one call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from models_automodel.automodel import as_where, prepare
from models_automodel.text import TextModel, TextSettings
from models_automodel.where import Where
from models_core.loading import LoadPlan


def load_text_model(
  model_id: str | os.PathLike | Where,
  mesh: Mesh | None = None,
  *,
  before_weights: Callable[[LoadPlan, TextSettings], Any] | None = None,
  **kwargs: Any,
) -> TextModel:
  """Loads a pretrained model with its tokenizer, for texts and conversations.

  Args:
    model_id: as `AutoModel.from_pretrained` takes it.
    mesh: as `AutoModel.from_pretrained` takes it.
    before_weights: is called when all but the weights is read, with what will be loaded and what the checkpoint says
      about texts; an error of its own ends the call before any weights are read.
    **kwargs: all others of `AutoModel.from_pretrained`, but `intermediate_ckpt_dir`.

  Raises:
    CheckpointError: as `AutoModel.from_pretrained`, or if there is no tokenizer.
    MissingExtraError: if the package tokenizers is not installed: `pip install "models-automodel[generate]"`.
    ModelsError: as `AutoModel.from_pretrained`.
  """
  fields = {name: kwargs.pop(name) for name in inspect.signature(Where.of).parameters if name in kwargs}
  prepared = prepare(as_where(model_id, **fields), mesh, **kwargs)
  settings = TextSettings.read(prepared.plan.checkpoint)
  if before_weights is not None:
    before_weights(prepared.plan, settings)
  return TextModel(prepared.load(), settings)
