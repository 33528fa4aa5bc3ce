"""`intermediate_ckpt_dir`: a loaded model, kept as a directory of safetensors that later calls load.

The directory holds config.json, weights under Hugging Face's names, and `origin.json`: the arguments of the call that
wrote it.
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

from models_automodel.where import Where
from models_core.dtypes import as_dtype
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.formats import LocalFiles, read_json
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import write_texts

ORIGIN = "origin.json"
# Arguments that do not change the weights of the model.
_NO_MATTER = ("strict_sharding", "remat_config")


def is_kept(directory: str, origin: Mapping[str, Any]) -> bool:
  """Whether a directory holds the result of the call that `origin` describes; False if it is missing or empty.

  Raises:
    ConfigError: if the directory holds anything else.
  """
  if not os.path.exists(directory) or (os.path.isdir(directory) and not os.listdir(directory)):
    return False
  remedy = "it stays as it is: give intermediate_ckpt_dir another directory, or remove this one"
  try:
    found = read_json(LocalFiles(directory), ORIGIN)
  except (OSError, ConfigError):
    raise ConfigError(
      f"{directory} was not written by from_pretrained, because it has no readable {ORIGIN}; {remedy}"
    ) from None
  if found != json.loads(json.dumps(origin)):
    differing = [
      f"{key}={found.get(key)!r} instead of {value!r}"
      for key, value in origin.items()
      if found.get(key) != value
    ]
    raise ConfigError(
      f"{directory} holds the result of another call, with {', '.join(differing) or 'more arguments'}; {remedy}"
    )
  return True


def origin_of(where: Where, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of a call as JSON values, which can be compared with those of another call."""
  place = {"model_id": where.model_id, "model_source": where.source, "model_path": where.path}
  chosen = {"file": where.file, "subfolder": where.subfolder, "variant": where.variant}
  arguments = {**arguments, **chosen, "revision": where.revision}
  asked = {key: str(value) for key, value in arguments.items() if key not in _NO_MATTER and value is not None}
  if "dtype" in asked:
    asked["dtype"] = str(as_dtype(arguments["dtype"]))
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


def keep(directory: str, model: nnx.Module, family: Family, config: Any, origin: Mapping[str, Any]) -> None:
  """Writes a temporary directory and renames it to `directory`; if another process was faster, its result stays."""
  directory = os.path.abspath(os.path.expanduser(directory))
  draft = f"{directory}.{uuid.uuid4().hex}.tmp"
  try:
    save_model_to_safetensors(nnx.state(model, nnx.Param), draft, family=family, config=config)
    write_texts(draft, {ORIGIN: json.dumps(origin, indent=1).encode()})
    try:
      os.rename(draft, directory)
    except OSError:
      if not is_kept(directory, origin):
        raise
  finally:
    # Removes the draft if it was not renamed.
    shutil.rmtree(draft, ignore_errors=True)
