"""A loaded model kept as a directory of safetensors, which later calls load instead of the source.

The directory is an ordinary one, of a config.json and weights in Hugging Face's names, with `origin.json`
beside them, which says what call it is the result of.
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
# What of a call does not change the numbers of its model.
_NO_MATTER = ("strict_sharding",)


def is_kept(directory: str, origin: Mapping[str, Any]) -> bool:
  """Whether a directory holds the result of this very call; False where there is none, or an empty one.

  Raises:
    ConfigError: if it holds anything else.
  """
  if not os.path.exists(directory) or (os.path.isdir(directory) and not os.listdir(directory)):
    return False
  remedy = "nothing in it is touched: give intermediate_ckpt_dir another directory, or remove it"
  try:
    found = read_json(LocalFiles(directory), ORIGIN)
  except (OSError, ConfigError):
    raise ConfigError(
      f"{directory} is not what from_pretrained keeps: it has no readable {ORIGIN}; {remedy}"
    ) from None
  if found != json.loads(json.dumps(origin)):
    differing = [
      f"{key}={found.get(key)!r} instead of {value!r}"
      for key, value in origin.items()
      if found.get(key) != value
    ]
    raise ConfigError(f"{directory} is of another call, with {', '.join(differing) or 'more'}; {remedy}")
  return True


def origin_of(where: Where, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """What a call asks for, in words that can be compared."""
  place = {"model_id": where.model_id, "model_source": where.source, "model_path": where.path}
  arguments = {**arguments, "revision": where.revision}
  asked = {key: str(value) for key, value in arguments.items() if key not in _NO_MATTER and value is not None}
  if "dtype" in asked:
    asked["dtype"] = str(as_dtype(arguments["dtype"]))
  return place | dict(sorted(asked.items()))


def check_alone() -> None:
  """Refuses several processes.

  Raises:
    ConfigError: if there are some.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      "intermediate_ckpt_dir is for one process: save the model with save_pretrained, and load that directory"
    )


def keep(directory: str, model: nnx.Module, family: Family, config: Any, origin: Mapping[str, Any]) -> None:
  """Writes the directory beside its place and moves it there. Where another process was faster, its own stays."""
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
    # Our own draft, where it was not moved.
    shutil.rmtree(draft, ignore_errors=True)
