"""Derives all names of a model from any one of them."""

import dataclasses
import functools
import re
from collections.abc import Mapping

from immutabledict import immutabledict

from models_naming.errors import NamingConflictError, NamingError
from models_naming.families import FAMILIES, FamilyInfo
from models_naming.known import known_names
from models_naming.names import (
  get_model_config_category,
  get_model_config_id,
  get_model_family_and_version,
  get_model_name_from_model_id,
)
from models_naming.spelling import normalise, standardise, with_points
from models_naming.third_party import third_party_families

_WHOLE_NAMES = ("model_id", "model_name", "model_config_id")


@dataclasses.dataclass(frozen=True, init=False)
class ModelNaming:
  """All names of one model, derived from those that are given. Letter case does not matter.

  Examples: `ModelNaming("meta-llama/Llama-3.1-8B")`, `ModelNaming("google/gemma-2/flax/gemma2-2b-it/1")`,
  `ModelNaming("llama-3.1-8b")`, `ModelNaming(model_config_id="llama3p1_8b")`,
  `ModelNaming(model_family="llama3p1", model_version="8b")`.

  Attributes:
    model_id: the given id or Kaggle handle (a known id in the letter case of its repository), else the known id of
      the model; None if there is neither.
    model_name: such as `llama-3.1-8b`, spelled as in the field that it is derived from.
    model_family: such as `llama3p1`.
    model_version: such as `8b`.
    model_config_category: such as `llama3`.
    model_config_id: such as `llama3p1_8b`.
  """

  model_id: str | None
  model_name: str
  model_family: str
  model_version: str
  model_config_category: str
  model_config_id: str

  def __init__(
    self,
    model_id: str | None = None,
    *,
    model_name: str | None = None,
    model_family: str | None = None,
    model_version: str | None = None,
    model_config_category: str | None = None,
    model_config_id: str | None = None,
  ) -> None:
    """Derives every field from the first one given; the others must agree with it.

    The order is: id, name, config id, family with version. `model_id` and `model_name` may each be an id, a Kaggle
    handle, a bare name or a config id.

    Raises:
      UnknownModelError, UnsupportedModelError: as `split` raises them.
      NamingConflictError: two fields name different models.
      NamingError: the given fields do not name a model.
    """
    fields = {
      "model_id": model_id,
      "model_name": model_name,
      "model_config_id": model_config_id,
      "model_family": model_family,
      "model_version": model_version,
      "model_config_category": model_config_category,
    }
    given = {field: value for field, value in fields.items() if value is not None}
    first, name = _first_name(given)
    family, version = get_model_family_and_version(name)
    config_id = f"{family}_{version}"
    derived: dict[str, str | None] = {
      "model_id": _id_of(model_id, config_id),
      "model_name": name,
      "model_family": family,
      "model_version": version,
      "model_config_category": get_model_config_category(name),
      "model_config_id": config_id,
    }
    for field, value in given.items():
      if field in _WHOLE_NAMES:  # two spellings of one name agree
        agrees = get_model_config_id(_name_of(value)) == config_id
      else:
        agrees = standardise(value) == derived[field]
      if not agrees:
        raise NamingConflictError(
          f"{first}={given[first]!r} has {field} {derived[field]!r}, which disagrees with {field}={value!r}: leave "
          "one of them out"
        )
    for field in derived:
      object.__setattr__(self, field, derived[field])


def _first_name(given: dict[str, str]) -> tuple[str, str]:
  """The first field that names a model, and that model name.

  Raises:
    NamingError: none does.
  """
  for field in _WHOLE_NAMES:
    if field in given:
      return field, _name_of(given[field])
  if "model_family" in given and "model_version" in given:
    return "model_family", _name_of(standardise(f"{given['model_family']}_{given['model_version']}"))
  arguments = ", ".join(f"{field}={value!r}" for field, value in given.items())
  raise NamingError(
    f"ModelNaming({arguments}) does not name a model: give model_id, model_name, model_config_id, or model_family with "
    "model_version"
  )


def _name_of(text: str) -> str:
  """The model name of an id, a Kaggle handle, a config id or a bare name."""
  if "/" in text:
    return get_model_name_from_model_id(text)
  if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", text.lower()):
    return _name_of_config_id(text.lower()) or normalise(text)
  return normalise(text)


def _name_of_config_id(config_id: str) -> str | None:
  if config_id in _known_by_config_id():
    return get_model_name_from_model_id(_known_by_config_id()[config_id])
  return _respelled(config_id, FAMILIES) or _respelled(config_id, third_party_families())


def _respelled(config_id: str, families: Mapping[str, FamilyInfo]) -> str | None:
  """The model name of a config id of one of these families; None if it belongs to none."""
  prefixes = [prefix for prefix, info in families.items() if config_id.startswith(f"{info.family}_")]
  if not prefixes:
    return None
  prefix = max(prefixes, key=lambda p: len(families[p].family))
  version = config_id[len(families[prefix].family) + 1 :]
  return f"{prefix.removesuffix('-')}-{with_points(version)}"


def _id_of(model_id: str | None, config_id: str) -> str | None:
  known = _known_by_config_id().get(config_id)
  if model_id is None or "/" not in model_id:
    return known
  return known if known is not None and known.lower() == model_id.lower() else model_id


@functools.cache
def _known_by_config_id() -> immutabledict[str, str]:
  return immutabledict({get_model_config_id(name): model_id for name, model_id in known_names().items()})
