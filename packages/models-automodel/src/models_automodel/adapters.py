"""LoRA adapters of peft, from wherever models come from. The model names its family."""

from __future__ import annotations

import os
from typing import Any

from flax import nnx

from models_automodel.errors import source_errors
from models_automodel.families import family_of_config
from models_automodel.where import ModelSource, Where
from models_core.adapters import Adapter, load_peft_adapter, merge_into, read_peft_config
from models_core.errors import CheckpointError, ModelsError
from models_core.family import Family
from models_core.formats import Files

# What a user does whose adapter names no base that can be loaded.
REMEDY = (
  "load a base yourself, read the adapter with models_automodel.load_adapter and merge it with "
  "models_automodel.merge_adapter"
)


def load_adapter(
  model_id: str | os.PathLike | Where,
  model: nnx.Module,
  *,
  model_source: ModelSource | str = ModelSource.HUGGINGFACE,
  model_path: str | os.PathLike | None = None,
  model_download_path: str | None = None,
  revision: str | None = None,
  token: str | bool | None = None,
  progress: bool = True,
  subfolder: str | None = None,
) -> Adapter:
  """Reads a LoRA adapter that peft wrote, for a model.

  Args:
    model_id: a repository id on the hub, an address in an object store, or a local directory, as
      `AutoModel.from_pretrained` takes it. A `Where` holds this and all other arguments.
    model: the model that the adapter changes, of an installed family. It is not changed.
    model_source: the source of the adapter.
    model_path: a local directory, or an address in the source, to read instead of `model_id`.
    model_download_path: directory that downloads are kept in.
    revision: branch, tag or commit of the adapter.
    token: the user's token for the source.
    progress: whether progress bars are shown on a terminal.
    subfolder: path of the adapter's folder within the place, as in "org/repo/folder".

  Raises:
    AdapterError: if the adapter does not fit the model, is of a kind that is not supported, or its tensors are not those
      that its configuration names.
    CheckpointError: if its files are missing or broken.
    ModelsError: if the model belongs to no installed family.
    SourceFilesError: if the source cannot provide the files.
  """
  where = model_id
  if not isinstance(where, Where):
    where = Where.of(
      where,
      model_source=model_source,
      model_path=model_path,
      model_download_path=model_download_path,
      revision=revision,
      token=token,
      progress=progress,
      subfolder=subfolder,
    )
  with source_errors():
    return load_peft_adapter(where.open_files(), _family_of(model), _config_of(model))


def merge_adapter(model: nnx.Module, adapter: Adapter) -> nnx.Module:
  """Merges an adapter into the weights of a model.

  Args:
    model: a model of an installed family. It is not changed; LoRA factors of its own are ignored.
    adapter: an adapter of the model's architecture, such as `load_adapter` returns.

  Returns:
    A model without LoRA factors, on the mesh of the given model. Its configuration is that of the given model, except
    for the size of the vocabulary and a tied head if the adapter changes these.

  Raises:
    AdapterError: if the adapter does not fit.
    ModelsError: if the model belongs to no installed family.
  """
  return merge_into(model, adapter, _family_of(model))


def base_of(where: Where, files: Files) -> Where:
  """Where the base of an adapter lies.

  Args:
    where: the place of the adapter.
    files: of the adapter.

  Raises:
    AdapterError: if the adapter is of a kind that is not supported.
    CheckpointError: if it does not say which model it changes.
  """
  settings = read_peft_config(files)
  if settings.base_model is None:
    raise CheckpointError(
      files.path,
      [f"it is a LoRA adapter and does not say of which model (base_model_name_or_path): {REMEDY}"],
    )
  return Where.of(
    settings.base_model,
    model_download_path=where.download_path,
    revision=settings.revision,
    token=where.token,
    progress=where.progress,
  )


def base_error(files: Files, base: str, error: ModelsError) -> CheckpointError:
  """The error of an adapter whose base cannot be loaded."""
  why = " ".join(str(error).split("\n  - "))
  return CheckpointError(
    files.path, [f"it is a LoRA adapter of {base}, which cannot be loaded ({why}): {REMEDY}"]
  )


def _config_of(model: nnx.Module) -> Any:
  if (config := getattr(model, "config", None)) is None:
    raise ModelsError(f"{type(model).__name__} has no attribute config: give a model of an installed family")
  return config


def _family_of(model: nnx.Module) -> Family:
  return family_of_config(_config_of(model), type(model).__name__)
