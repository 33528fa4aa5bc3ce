"""Pretrained models by one call: `AutoModel.from_pretrained`."""

from models_automodel.automodel import AutoModel
from models_automodel.digest import Digest, digest
from models_automodel.errors import MissingFamilyError, ModelNameError, SourceFilesError
from models_automodel.finding import ModelSource
from models_automodel.presets import ModelModule, call_model_config, get_model_module
from models_core.errors import CacheError, CheckpointError, ConfigError, ModelsError, SaveError, ShardingError
from models_core.loading import LoadPlan

__all__ = [
  "AutoModel",
  "CacheError",
  "CheckpointError",
  "ConfigError",
  "Digest",
  "LoadPlan",
  "MissingFamilyError",
  "ModelModule",
  "ModelNameError",
  "ModelSource",
  "ModelsError",
  "SaveError",
  "ShardingError",
  "SourceFilesError",
  "call_model_config",
  "digest",
  "get_model_module",
]
