"""Presets: configurations of published models, found by name or by the shapes of a checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import importlib
from types import ModuleType
from typing import Any

import models_naming
from models_automodel.errors import ModelNameError, name_errors
from models_automodel.families import family_module, load_family, loadable
from models_core.errors import CheckpointError, ConfigError
from models_core.family import Family
from models_core.formats import Checkpoint
from models_core.loading import AbstractModel, abstract_model, plan_load
from models_core.weights import WeightTable


class ModelModule(enum.Enum):
  """A module of an architecture's package, for `get_model_module`."""

  MODEL = "model"
  PARAMS = "params"
  PARAMS_SAFETENSORS = "params_safetensors"


def get_model_module(model_name: str, module_type: ModelModule) -> ModuleType:
  """Imports a module of a model's architecture, such as `models_llama.llama3.model`.

  Raises:
    MissingFamilyError: the package is missing; the message holds the command that installs it.
    ModelNameError: if the name is unknown.
  """
  with name_errors():
    category = models_naming.get_model_config_category(model_name)
  package = family_module(category, model_name)
  return importlib.import_module(f"{package.__name__}.{module_type.value}")


# Suffixes of variants that share the configuration of their size, unless they have a preset of their own.
_QAT = ("_it_qat_q4_0_unquantized", "_it_qat_int4_unquantized")
_VARIANTS = ("_instruct", "_it", "_base", "_pt", "_jpn_it", *_QAT)


def call_model_config(model_name: str) -> Any:
  """The preset of a model's name: "llama-3.1-8b" -> `ModelConfig.llama3p1_8b()`.

  Raises:
    MissingFamilyError: the architecture's package is missing.
    ModelNameError: if the name is unknown or its size has no preset; the message lists those that exist.
  """
  with name_errors():
    config_id = models_naming.get_model_config_id(model_name)
  config_class = get_model_module(model_name, ModelModule.MODEL).ModelConfig
  candidates = [config_id, *(config_id.removesuffix(v) for v in _VARIANTS if config_id.endswith(v))]
  for candidate in candidates:
    if preset := getattr(config_class, candidate, None):
      return preset()
  raise ModelNameError(
    f"{model_name}: {config_class.__module__}.ModelConfig has no preset {config_id}; it has "
    f"{', '.join(presets(config_class))}. A checkpoint with a config.json loads whatever its name"
  )


def presets(config_class: type) -> list[str]:
  """Names of the presets of a configuration class."""
  return [name for name, member in vars(config_class).items() if isinstance(member, classmethod)]


def by_name(model_id: str, where: str) -> tuple[str, Any]:
  """The config category and the preset of a checkpoint without config.json, from its name.

  Args:
    model_id: names the model.
    where: path of the checkpoint, for messages.

  Raises:
    ModelNameError: if the name is unknown or has no preset.
  """
  try:
    with name_errors():
      naming = models_naming.ModelNaming(model_id=model_id)
    return naming.model_config_category, call_model_config(naming.model_name)
  except ModelNameError as error:
    raise ModelNameError(
      f"{where} has no config.json, so its configuration is taken from the name, but {error}"
    ) from error


def preset_of(model_id: str, checkpoint: Checkpoint) -> tuple[Family, Any]:
  """The family and the configuration of a checkpoint without config.json: the preset of its name, else of its shapes.

  Raises:
    ConfigError: if the name is unknown and not exactly one preset has the checkpoint's shapes.
    MissingFamilyError: if the architecture's package is not installed.
  """
  try:
    category, config = by_name(model_id, checkpoint.files.path)
    family = load_family(category, model_id)
    # If the preset does not fit, planning lists the differences.
    return family, _fit(family, config, checkpoint) or config
  except ModelNameError:
    pass
  # A fine-tune with a name of its own: its shapes decide, unless published sizes share them.
  fitting: list[tuple[Family, str, Any]] = []
  tried: list[str] = []
  for category, family in loadable(model_id):
    if checkpoint.format.keeps_own_names or checkpoint.format.naming in family.weights:
      tried.append(category)
      for name in presets(family.config_class):
        config = _fit(family, getattr(family.config_class, name)(), checkpoint)
        if config is None or any(config == known for _, _, known in fitting):
          continue
        if _fits(family, config, checkpoint):
          fitting.append((family, name, config))
  if len(fitting) == 1:
    ((family, _, config),) = fitting
    return family, config
  found = (
    f"the presets {', '.join(name for _, name, _ in fitting)} all have"
    if fitting
    else f"no preset of {', '.join(tried)} has"
  )
  raise ConfigError(
    f"{checkpoint.files.path} has no config.json, {model_id!r} is not a known model, and {found} its shapes: put the "
    "config.json beside it, or pass config="
  )


def _fit(family: Family, config: Any, checkpoint: Checkpoint) -> Any:
  return family.fit_config(config, checkpoint.tensors) if family.fit_config else config


def _fits(family: Family, config: Any, checkpoint: Checkpoint) -> bool:
  # A model of one layer tells the naming scheme, and so the checkpoint's number of layers: most presets differ in it.
  _, table = _model(family, dataclasses.replace(config, num_layers=1), checkpoint)
  layers = {layer for name in checkpoint.tensors if (layer := table.layer_of(name)) is not None}
  if len(layers) != config.num_layers:
    return False
  try:
    plan_load(checkpoint, *_model(family, config, checkpoint))
  except CheckpointError:
    return False
  return True


def _model(family: Family, config: Any, checkpoint: Checkpoint) -> tuple[AbstractModel, WeightTable]:
  model = abstract_model(family.model_class, config)
  shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
  return model, family.tables_for(checkpoint.format, checkpoint.tensors, shapes)[0]
