"""Identifies a checkpoint: from a model id, a path or an address to files, a family and a configuration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

from models_automodel.errors import source_errors
from models_automodel.families import check_installed, family_of_config, family_of_model_type, load_family
from models_automodel.presets import by_name, preset_of
from models_automodel.where import Where
from models_core.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, factor_names
from models_core.config import HEADER_CONFIGS, collect_notes
from models_core.errors import CheckpointError, ConfigError
from models_core.family import Family
from models_core.formats import (
  ORBAX,
  SAFETENSORS,
  Checkpoint,
  Files,
  Format,
  dead_entries,
  formats_in,
  read_json,
  select,
  weight_files,
)
from models_core.saving import CONFIG, WEIGHTS_KEY


@dataclasses.dataclass(frozen=True)
class Found:
  """An identified checkpoint. Its headers are read on demand, unless the configuration had to be read from them.

  Attributes:
    files: of the checkpoint.
    family: the family that reads it.
    config: of the model.
    format: of the files; None if no format recognises them.
    read: the checkpoint's headers, if they have been read.
    guess: how the configuration was found if no file states it, for messages; "" otherwise.
    notes: on keys of the configuration that were not read, one sentence each.
    raw: config.json, or what a header says in its place, without the keys to ignore; None if there is neither.
  """

  files: Files
  family: Family
  config: Any
  format: Format | None
  read: Checkpoint | None = None
  guess: str = ""
  notes: tuple[str, ...] = ()
  raw: Mapping[str, Any] | None = None

  @functools.cached_property
  def checkpoint(self) -> Checkpoint:
    """The checkpoint's headers, with the notes on its configuration.

    Raises:
      CheckpointError: if there are no headers, or they are broken.
    """
    read = self.read or _read(self.format or SAFETENSORS, self.files)
    return dataclasses.replace(read, notes=(*self.notes, *read.notes)) if self.notes else read


def find(where: Where, config: Any = None, ignore_config_keys: Collection[str] = ()) -> Found:
  """Finds the files, the family and the configuration of a checkpoint.

  Args:
    where: the place of the checkpoint.
    config: a configuration to use instead of the checkpoint's.
    ignore_config_keys: keys of config.json that are left out, as `AutoModel.from_pretrained` takes them.

  Raises:
    ModelsError: as `AutoModel.from_pretrained` raises it.
    TypeError: if `ignore_config_keys` is a single text.
  """
  with source_errors():
    name = where.name
  check_installed(name)
  with source_errors():
    files = where.open_files()
    names = set(files.names())
    refuse_adapter(files, names)
    format, read = next(formats_in(files), None), None
    raw: Mapping[str, Any] | None = None
    if format is not None and format.name in HEADER_CONFIGS:
      read = _read(format, files)
      raw = HEADER_CONFIGS[format.name](read)
      if CONFIG in names:
        note = f"{CONFIG} is not read: the {format.name.upper()} file states its own configuration"
        read = dataclasses.replace(read, notes=(*read.notes, note))
    elif CONFIG in names:
      raw = read_json(files, CONFIG)
      if isinstance(stated := raw.get(WEIGHTS_KEY), str) and (where.file, where.variant) == (None, None):
        files = select(files, file=stated)
        format = next(formats_in(files), None)
      raw = {key: value for key, value in raw.items() if key != WEIGHTS_KEY}
    elif (described := next((f for f in formats_in(files) if f.name in HEADER_CONFIGS), None)) is not None:
      format, read = described, _read(described, files)
      raw = HEADER_CONFIGS[format.name](read)
    elif format is not SAFETENSORS:
      read = _read(format or SAFETENSORS, files)
  if config is not None:
    return Found(files, family_of_config(config, name), config, format, read, raw=raw)
  if raw is None:
    if what := dead_entries(files).get(CONFIG):
      raise ConfigError(f"{files.path}/{CONFIG} {what}: put the model's {CONFIG} in its place")
    guess = (
      f"there is no {CONFIG}, and the preset of the name {name!r} does not fit: put the {CONFIG} beside the weights, or "
      "pass config="
    )
    if read is not None and format is not None:
      return Found(files, *preset_of(name, read), format, read, guess)
    category, config = by_name(name, files.path)
    return Found(files, load_family(category, name), config, format, read, guess)
  model_type = raw.get("model_type")
  if not isinstance(model_type, str):
    raise ConfigError(f"{files.path}/{CONFIG} has no model_type: add it, or pass config=")
  family = family_of_model_type(model_type, name)
  raw, left_out = without(raw, ignore_config_keys)
  with collect_notes() as notes:
    found = family.read_config(raw)
  if left_out:
    notes.insert(0, f"{CONFIG}: not read, as ignore_config_keys asks: {', '.join(left_out)}")
  return Found(files, family, found, format, read, notes=tuple(notes), raw=raw)


def without(raw: Mapping[str, Any], keys: Collection[str]) -> tuple[Mapping[str, Any], list[str]]:
  """Leaves keys out of a configuration, and out of its `text_config`.

  Args:
    raw: as config.json has it.
    keys: such as "residual_multiplier", or "rope_scaling.factor" for a key of an object.

  Returns:
    The configuration without the keys, and those that it had.

  Raises:
    TypeError: if `keys` is a single text.
  """
  if isinstance(keys, str):
    raise TypeError(f"ignore_config_keys={keys!r}, expected a list of keys: write [{keys!r}]")
  left_out = []
  for key in keys:
    shorter = _without_one(raw, key.split("."))
    if isinstance(text := shorter.get("text_config"), Mapping):
      shorter = {**shorter, "text_config": _without_one(text, key.split("."))}
    if shorter != raw:
      left_out.append(key)
    raw = shorter
  return raw, left_out


def _without_one(raw: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
  shorter, (key, *inner) = dict(raw), path
  if not inner:
    shorter.pop(key, None)
  elif isinstance(value := shorter.get(key), Mapping):
    shorter[key] = _without_one(value, inner)
  return shorter


def _read(format: Format, files: Files) -> Checkpoint:
  """Reads the headers of a checkpoint.

  Raises:
    CheckpointError: if it holds LoRA factors, also beside weights; the message says how to load them.
  """
  checkpoint = format.read(files)
  if format is ORBAX and (factors := factor_names(checkpoint.tensors)):
    beside = "" if len(factors) == len(checkpoint.tensors) else " beside the weights that they change"
    raise CheckpointError(
      files.path,
      [
        f"it holds LoRA factors{beside}, such as {factors[0]}: load the model that was trained, read the factors with "
        "models_core.adapters.load_orbax_adapter, and merge the two with models_core.adapters.merge_into"
      ],
    )
  return checkpoint


class AdapterFoundError(CheckpointError):
  """A directory holds an adapter of peft, where a model is expected."""


def refuse_adapter(files: Files, names: set[str]) -> None:
  """Refuses a directory that holds an adapter of peft and no model.

  Raises:
    AdapterFoundError: the message says how to load the adapter.
  """
  if ADAPTER_CONFIG not in names or set(weight_files(files)) - {ADAPTER_WEIGHTS}:
    return
  base = read_json(files, ADAPTER_CONFIG).get("base_model_name_or_path") or "another model"
  raise AdapterFoundError(
    files.path,
    [
      f"it is a LoRA adapter of {base}, not a model: AutoModel.from_pretrained merges it into this base; for another one, "
      "load the base, read the adapter with models_automodel.load_adapter and merge it with "
      "models_automodel.merge_adapter"
    ],
  )
