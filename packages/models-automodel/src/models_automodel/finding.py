"""From a model id, a path or an address to files, a family and a configuration."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import functools
import os
from collections.abc import Mapping
from typing import Any

import models_naming
import models_sources
from models_automodel.errors import name_errors, source_errors
from models_automodel.families import check_installed, family_of_config, family_of_model_type, load_family
from models_automodel.presets import by_name, preset_of
from models_core.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models_core.config import HEADER_CONFIGS
from models_core.errors import CheckpointError, ConfigError
from models_core.family import Family
from models_core.formats import SAFETENSORS, Checkpoint, Files, Format, formats_in, read_json, weight_files
from models_core.saving import recover

CONFIG = "config.json"


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
  """A checkpoint that was identified. Its headers are read when they are wanted, unless its configuration is in them.

  Attributes:
    files: of the checkpoint.
    family: that reads it.
    config: of the model.
    format: of the files; None where no format recognises them.
    read: what its headers say, where they were read.
  """

  files: Files
  family: Family
  config: Any
  format: Format | None
  read: Checkpoint | None = None

  @functools.cached_property
  def checkpoint(self) -> Checkpoint:
    """What the headers say.

    Raises:
      CheckpointError: if there are none, or they are broken.
    """
    return self.read or (self.format or SAFETENSORS).read(self.files)


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
    format, read = next(formats_in(files), None), None
    raw: Mapping[str, Any] | None = None
    if CONFIG in names:
      raw = read_json(files, CONFIG)
    elif (described := next((f for f in formats_in(files) if f.name in HEADER_CONFIGS), None)) is not None:
      format, read = described, described.read(files)
      raw = HEADER_CONFIGS[format.name](read)
    elif format not in (None, SAFETENSORS):
      read = format.read(files)
  if config is not None:
    return Found(files, family_of_config(config, name), config, format, read)
  if raw is None and read is not None:
    return Found(files, *preset_of(name, read), format, read)
  if raw is None:
    category, config = by_name(name, files.path)
    return Found(files, load_family(category, name), config, format)
  model_type = raw.get("model_type")
  if not isinstance(model_type, str):
    raise ConfigError(f"{files.path}/{CONFIG} has no model_type: add it, or pass config=")
  family = family_of_model_type(model_type, name)
  return Found(files, family, family.read_config(raw), format, read)


def refuse_adapter(files: Files, names: set[str]) -> None:
  """Says what to do with what peft wrote.

  Raises:
    CheckpointError: if there is an adapter and no model.
  """
  if ADAPTER_CONFIG not in names or set(weight_files(files)) - {ADAPTER_WEIGHTS}:
    return
  base = read_json(files, ADAPTER_CONFIG).get("base_model_name_or_path") or "another model"
  raise CheckpointError(
    files.path,
    [
      f"it is an adapter of {base}, no model: load that one, then the adapter with "
      "models_core.adapters.load_peft_adapter, and put them together with models_core.adapters.merge_into"
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
