"""From a model id, a path or an address to files, a family and a configuration."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import os
from typing import Any

import models_naming
import models_sources
from models_automodel.errors import name_errors, source_errors
from models_automodel.families import check_installed, family_of_config, family_of_model_type, load_family
from models_automodel.presets import by_name, preset_of
from models_core.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models_core.config import gguf_config
from models_core.errors import CheckpointError, ConfigError
from models_core.family import Family
from models_core.formats import Checkpoint, Files, find_orbax, read_gguf, read_json, read_orbax
from models_core.saving import recover


class ModelSource(enum.Enum):
  """Where a checkpoint lies."""

  HUGGINGFACE = "huggingface"
  KAGGLE = "kaggle"
  GCS = "gcs"
  S3 = "s3"
  INTERNAL = "internal"
  LOCAL = "local"


def source_name(source: ModelSource | str) -> str:
  """The name of a source; a string may name one that another package announces."""
  return source.value if isinstance(source, ModelSource) else source


# What belongs to a model besides its weights: whoever gets the directory finds them there.
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
               "vocab.json", "merges.txt", "added_tokens.json", "*.safetensors.index.json", "preprocessor_config.json",
               "processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")  # fmt: skip


def is_companion(name: str) -> bool:
  """Whether a file belongs to a model besides its weights."""
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in _COMPANIONS)


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint that was identified, of which at most the configuration and a GGUF's or Orbax tree's headers were read."""

  files: Files
  family: Family
  config: Any
  checkpoint: Checkpoint | None


def find(
  model_id: str | os.PathLike,
  *,
  model_source: ModelSource | str = ModelSource.HUGGINGFACE,
  model_path: str | os.PathLike | None = None,
  model_download_path: str | None = None,
  revision: str | None = None,
  token: str | bool | None = None,
  config: Any = None,
  progress: bool = True,
) -> Found:
  """Identifies files, family and configuration. Arguments and errors as `from_pretrained`."""
  name = os.fspath(model_id)
  if not isinstance(model_id, str):
    model_path = model_path or model_id
  check_installed(name)
  with source_errors():
    files = _open_files(name, model_source, model_path, model_download_path, revision, token, progress)
    names = set(files.names())
    refuse_adapter(files, names)
    checkpoint = None
    if "config.json" in names:
      raw = read_json(files, "config.json")
    elif any(file.endswith(".gguf") for file in names):
      checkpoint = read_gguf(files)
      raw = gguf_config(checkpoint)
    else:
      raw = None
    if (
      checkpoint is None
      and not any(file.endswith(".safetensors") for file in names)
      and find_orbax(files) is not None
    ):
      checkpoint = read_orbax(files)
  if config is not None:
    return Found(files, family_of_config(config, name), config, checkpoint)
  if raw is None and checkpoint is not None:
    return Found(files, *preset_of(name, checkpoint), checkpoint)
  if raw is None:
    category, config = by_name(name, files.path)
    return Found(files, load_family(category, name), config, None)
  model_type = raw.get("model_type")
  if not isinstance(model_type, str):
    raise ConfigError(f"{files.path}/config.json has no model_type: add it, or pass config=")
  family = family_of_model_type(model_type, name)
  return Found(files, family, family.read_config(raw), checkpoint)


def refuse_adapter(files: Files, names: set[str]) -> None:
  """Says what to do with what peft wrote.

  Raises:
    CheckpointError: if there is an adapter and no model.
  """
  weights = {name for name in names if name.endswith((".safetensors", ".gguf"))}
  if ADAPTER_CONFIG not in names or weights - {ADAPTER_WEIGHTS}:
    return
  base = read_json(files, ADAPTER_CONFIG).get("base_model_name_or_path") or "another model"
  raise CheckpointError(
    files.path,
    [
      f"it is an adapter of {base}, no model: load that one, then the adapter with "
      "models_core.adapters.peft.load_peft_adapter, and put them together with models_core.adapters.lora.merge_into"
    ],
  )


def _open_files(
  model_id: str,
  model_source: ModelSource | str,
  model_path: str | os.PathLike | None,
  download_path: str | None,
  revision: str | None,
  token: str | bool | None,
  progress: bool,
) -> Files:
  source = source_name(model_source)
  place = os.fspath(model_path) if model_path is not None else model_id
  if (named := models_sources.source_of_address(place)) is not None:
    source = named
  elif source == "kaggle" and model_path is None:
    with name_errors():
      place = models_naming.kaggle_handle(model_id)
  elif not os.path.exists(os.path.expanduser(place)):
    # A saver that was killed may have left a directory between two renames.
    recover(place)
  if source == "huggingface" and (model_path is not None or os.path.exists(os.path.expanduser(place))):
    source = "local"
  module = models_sources.get_source(source)
  return module.open_files(
    place, revision=revision, token=token, download_path=download_path, progress=progress
  )
