"""`intermediate_ckpt_dir`: a loaded model, kept as a directory of safetensors that later calls load.

The directory may be in an object store. It holds config.json, weights under Hugging Face's names, and `origin.json`: the
arguments of the call that wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

import models_sources
from models_automodel.errors import CheckpointError, ConfigError, SaveError, SourceFilesError, source_errors
from models_automodel.targets import files_at, open_target
from models_automodel.where import Where
from models_core.dtypes import as_dtype
from models_core.family import Family
from models_core.formats import Files, LocalFiles, read_json
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import Place, local_path

ORIGIN = "origin.json"
# Arguments that do not change the weights of the model.
_NO_MATTER = ("strict_sharding", "remat_config", "scan_layers", "attn_implementation", "use_flash_attention")


def place_of(directory: str | os.PathLike) -> Place:
  """The place that a path or an address names.

  Raises:
    SaveError: if it is an address of no source that can be written to.
  """
  place = open_target(directory)
  return local_path(os.fspath(place)) if isinstance(place, str | os.PathLike) else place


def is_kept(place: Place, origin: Mapping[str, Any]) -> bool:
  """Whether a place holds the result of the call that `origin` describes; False if it is missing or empty.

  Raises:
    ConfigError: if the place holds anything else.
    SourceFilesError: if an object store cannot be asked.
  """
  if (files := _files(place)) is None:
    return False
  remedy = "it stays as it is: give intermediate_ckpt_dir another directory, or remove this one"
  try:
    with source_errors():
      found = read_json(files, ORIGIN)
  except (OSError, ConfigError, CheckpointError):
    raise ConfigError(
      f"{files.path} was not written by from_pretrained, because it has no readable {ORIGIN}; {remedy}"
    ) from None
  if found != json.loads(json.dumps(origin)):
    differing = [
      f"{key}={found.get(key)!r} instead of {value!r}"
      for key, value in origin.items()
      if found.get(key) != value
    ]
    raise ConfigError(
      f"{files.path} holds the result of another call, with {', '.join(differing) or 'more arguments'}; {remedy}"
    )
  return True


def _files(place: Place) -> Files | None:
  """The files at a place; None if it is missing or empty, or an object store holds no whole checkpoint there."""
  if isinstance(place, str | os.PathLike):
    directory = os.fspath(place)
    if not os.path.exists(directory) or (os.path.isdir(directory) and not os.listdir(directory)):
      return None
    return LocalFiles(directory)
  try:
    return files_at(place.path)
  except SourceFilesError as error:
    # Where a save is under way, beginning another one says so.
    if isinstance(error.__cause__, models_sources.FilesNotFoundError):
      return None
    raise


def origin_of(where: Where, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of a call as JSON values, which can be compared with those of another call."""
  place = {"model_id": where.model_id, "model_source": where.source, "model_path": where.path}
  chosen = {"file": where.file, "subfolder": where.subfolder, "variant": where.variant}
  arguments = {**arguments, **chosen, "revision": where.revision}
  asked = {
    key: str(value)
    for key, value in arguments.items()
    if key not in _NO_MATTER and value not in (None, [], ())
  }
  if "dtype" in asked:
    asked["dtype"] = str(as_dtype(arguments["dtype"]))
  if keys := arguments.get("ignore_config_keys"):
    asked["ignore_config_keys"] = ", ".join(sorted(keys))
  return place | dict(sorted(asked.items()))


def check_alone() -> None:
  """Checks that there is only one process.

  Raises:
    ConfigError: if there are several.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      "intermediate_ckpt_dir works in a single process only: save the model with save_pretrained and load that "
      "directory instead"
    )


def keep(place: Place, model: nnx.Module, family: Family, config: Any, origin: Mapping[str, Any]) -> None:
  """Writes a model to a place; if another process was faster, its result stays.

  Raises:
    SaveError: if the file system or the store refuses.
  """
  state = nnx.state(model, nnx.Param)
  more = {ORIGIN: json.dumps(origin, indent=1).encode()}
  if not isinstance(place, str | os.PathLike):
    try:
      save_model_to_safetensors(state, place, family=family, config=config, more=more)
    except SaveError:
      if not is_kept(place, origin):
        raise
    return
  directory = os.fspath(place)
  draft = f"{directory}.{uuid.uuid4().hex}.tmp"
  try:
    try:
      save_model_to_safetensors(state, draft, family=family, config=config, more=more)
    except SaveError as error:
      raise SaveError(str(error).replace(draft, directory), error.errno) from error
    try:
      os.rename(draft, directory)
    except OSError as error:
      if not is_kept(directory, origin):
        raise SaveError(f"{directory} cannot be written: {error.strerror}", error.errno) from error
  finally:
    # Removes the draft if it was not renamed.
    shutil.rmtree(draft, ignore_errors=True)
