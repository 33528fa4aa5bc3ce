"""Kaggle handles of Google's own Gemma checkpoints."""

from immutabledict import immutabledict

from models_naming.errors import UnknownModelError
from models_naming.model_naming import ModelNaming

# Family -> handle of its models; the version is that of the Hugging Face id without "-pt".
_HANDLES: immutabledict[str, str] = immutabledict(
  {
    "gemma": "google/gemma/flax/{version}",
    "gemma1p1": "google/gemma/flax/1.1-{version}",
    "gemma2": "google/gemma-2/flax/gemma2-{version}",
    "gemma3": "google/gemma-3/flax/gemma3-{version}",
  }
)
# Config ids whose handles do not follow the pattern of their family.
_OTHERS: immutabledict[str, str] = immutabledict(
  {
    "gemma3_270m": "google/gemma-3/flax/gemma-3-270m",
    "gemma3_270m_it": "google/gemma-3/flax/gemma-3-270m-it",
  }
)


def kaggle_handle(model_id: str) -> str:
  """The Kaggle handle of a model: `google/gemma-2-2b-it` -> `google/gemma-2/flax/gemma2-2b-it`.

  A handle, `owner/model/framework/variation` with or without a version, is returned unchanged.

  Raises:
    UnknownModelError: the name is unknown, or no handle is known for the model.
    UnsupportedModelError: as `split` raises it.
  """
  parts = model_id.split("/")
  if len(parts) in (4, 5) and all(parts):
    return model_id
  naming = ModelNaming(model_id)
  if (other := _OTHERS.get(naming.model_config_id)) is not None:
    return other
  if naming.model_family not in _HANDLES:
    raise UnknownModelError(
      f"no Kaggle handle is known for {model_id!r}: pass the handle itself, owner/model/framework/variation"
    )
  version = naming.model_version.removesuffix("_pt").replace("_", "-")
  return _HANDLES[naming.model_family].format(version=version)
