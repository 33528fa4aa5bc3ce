"""Where Kaggle has the models: handles of Google's own Gemma checkpoints."""

from immutabledict import immutabledict

from models_naming.errors import UnknownModelError
from models_naming.model_naming import ModelNaming

# The handle of a family's models; the version is the repository's, less "-pt".
_HANDLES: immutabledict[str, str] = immutabledict(
  {
    "gemma": "google/gemma/flax/{version}",
    "gemma1p1": "google/gemma/flax/1.1-{version}",
    "gemma2": "google/gemma-2/flax/gemma2-{version}",
    "gemma3": "google/gemma-3/flax/gemma3-{version}",
  }
)
# Kaggle spells these otherwise than their family.
_OTHERS: immutabledict[str, str] = immutabledict(
  {
    "gemma3_270m": "google/gemma-3/flax/gemma-3-270m",
    "gemma3_270m_it": "google/gemma-3/flax/gemma-3-270m-it",
  }
)


def kaggle_handle(model_id: str) -> str:
  """The Kaggle handle of a model: `google/gemma-2-2b-it` -> `google/gemma-2/flax/gemma2-2b-it`.

  A handle, `owner/model/framework/variation` with or without a version, is returned as it is.

  Raises:
    UnknownModelError: Kaggle is not known to have the model.
    UnsupportedModelError: as `split`.
  """
  parts = model_id.split("/")
  if len(parts) in (4, 5) and all(parts):
    return model_id
  naming = ModelNaming(model_id)
  if (other := _OTHERS.get(naming.model_config_id)) is not None:
    return other
  if naming.model_family not in _HANDLES:
    raise UnknownModelError(
      f"{model_id!r} has no known handle at Kaggle: pass one, owner/model/framework/variation, as its page shows it"
    )
  version = naming.model_version.removesuffix("_pt").replace("_", "-")
  return _HANDLES[naming.model_family].format(version=version)
