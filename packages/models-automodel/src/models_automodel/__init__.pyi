from .adapters import load_adapter, merge_adapter
from .automodel import AutoModel, LoadPlan
from .digest import Digest, digest
from .errors import (
  AdapterError,
  CacheError,
  CheckpointError,
  ConfigError,
  MissingFamilyError,
  ModelNameError,
  ModelsError,
  SaveError,
  ShardingError,
  SourceFilesError,
)
from .hub import push_to_hub, upload
from .presets import ModelModule, call_model_config, get_model_module
from .rollout import from_checkpoint, iter_checkpoint, lazy_checkpoint, to_checkpoint
from .text import TextModel
from .text_models import load_text_model
from .where import ModelSource, Where

__version__: str

__all__ = [
  "AdapterError",
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
  "TextModel",
  "Where",
  "call_model_config",
  "digest",
  "from_checkpoint",
  "get_model_module",
  "iter_checkpoint",
  "lazy_checkpoint",
  "load_adapter",
  "load_text_model",
  "merge_adapter",
  "push_to_hub",
  "to_checkpoint",
  "upload",
]
