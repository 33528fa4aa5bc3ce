"""Names of pretrained checkpoints: family, version and configuration of a model id."""

from typing import TYPE_CHECKING

from models_naming.categories import Distribution, category_of_model_type, distribution_of
from models_naming.errors import NamingConflictError, NamingError, UnknownModelError, UnsupportedModelError
from models_naming.families import FAMILIES, FamilyInfo
from models_naming.kaggle import kaggle_handle
from models_naming.known import known_model_ids, nearest_model_ids
from models_naming.model_naming import ModelNaming
from models_naming.names import (
  get_model_config_category,
  get_model_config_id,
  get_model_family_and_version,
  get_model_name_from_model_id,
  split,
)

__all__ = [
  "FAMILIES",
  "Distribution",
  "FamilyInfo",
  "ModelNaming",
  "NamingConflictError",
  "NamingError",
  "UnknownModelError",
  "UnsupportedModelError",
  "category_of_model_type",
  "distribution_of",
  "get_model_config_category",
  "get_model_config_id",
  "get_model_family_and_version",
  "get_model_name_from_model_id",
  "kaggle_handle",
  "known_model_ids",
  "nearest_model_ids",
  "split",
]

if TYPE_CHECKING:
  __version__: str
else:

  def __getattr__(name: str) -> str:
    # Not read at import, because importlib.metadata takes longer than all else here.
    if name == "__version__":
      from importlib.metadata import version

      return version("models-naming")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
