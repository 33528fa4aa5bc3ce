"""A model name and its parts: prefix, family, version, config category, config id."""

import re

from models_naming.errors import NamingError, UnknownModelError, UnsupportedModelError
from models_naming.families import FAMILIES, FamilyInfo
from models_naming.known import nearest_model_ids
from models_naming.refusals import reason_against
from models_naming.spelling import normalise, standardise
from models_naming.third_party import broken_entries, third_party_families

_NAME = r"[a-z0-9][a-z0-9._-]*"
# The size decides where the family ends: otherwise `gemma-5-2b` would be version `5-2b` of `gemma`.
_VERSION = r"(?:(?:coder|math)-)?\d+(?:\.\d+)?[bm](?![^-_.])"


def get_model_name_from_model_id(model_id: str) -> str:
  """The normalised model name of a repository id, a Kaggle handle or a path that ends in a name.

  `meta-llama/Meta-Llama-3-8B` -> `llama-3-8b`; `google/gemma/flax/1.1-2b-it/1` -> `gemma-1.1-2b-it`.

  Raises:
    NamingError: the id has no `/`, or nothing after its last `/`.
  """
  parts = model_id.split("/")
  if len(parts) == 5 and all(parts) and parts[-1].isdigit():
    parts = parts[:-1]  # a Kaggle handle's version number
  if len(parts) < 2 or not parts[-1]:
    raise NamingError(
      f"{model_id!r} is not a repository id like meta-llama/Llama-3.1-8B; ModelNaming also reads bare names and config "
      "ids"
    )
  name = parts[-1]
  if len(parts) == 4 and all(parts) and name[0].isdigit():
    name = f"{parts[1]}-{name}"  # a variation such as `1.1-2b-it` leaves out the model's name
  return normalise(name)


def split(model_name: str) -> tuple[str, str]:
  """Splits a model name into the family's prefix and the version: `llama3.1-8b` -> (`llama3.1-`, `8b`).

  The longest prefix wins; both spellings (`gemma-2-`, `gemma2-`) are known. Prefixes that other packages announce
  (entry points in the group `models.names`) are tried only if no family of this package claims the name.

  Raises:
    UnknownModelError: no family claims the name; the message lists the nearest known ids.
    UnsupportedModelError: the name belongs to another architecture or to quantised weights.
  """
  prefix, version, _ = _match(model_name)
  return prefix, version


def get_model_family_and_version(model_name: str) -> tuple[str, str]:
  """The standardised family and version: `qwen2.5-0.5b` -> (`qwen2p5`, `0p5b`).

  Raises:
    UnknownModelError, UnsupportedModelError: as `split` raises them.
  """
  _, version, info = _match(model_name)
  return info.family, standardise(version)


def get_model_config_category(model_name: str) -> str:
  """The config category, which is also the module's name: `gemma2-9b` -> `gemma`, `llama-3.1-8b` -> `llama3`.

  Raises:
    UnknownModelError, UnsupportedModelError: as `split` raises them.
  """
  return _match(model_name)[2].category


def get_model_config_id(model_name: str) -> str:
  """The config id, which is also the name of the preset's classmethod: `llama-3.1-8b` -> `llama3p1_8b`.

  Raises:
    UnknownModelError, UnsupportedModelError: as `split` raises them.
  """
  return "_".join(get_model_family_and_version(model_name))


def _match(model_name: str) -> tuple[str, str, FamilyInfo]:
  """Prefix, version and family of a name."""
  name = normalise(model_name)
  if not re.fullmatch(_NAME, name):
    raise _unknown(model_name)
  own = max((p for p in FAMILIES if name.startswith(p)), key=len, default="")
  reason = reason_against(name)
  if own and not reason and re.match(_VERSION, name[len(own) :]):
    return own, name[len(own) :], FAMILIES[own]
  # Must be longer than a prefix of this package, which may leave out a name on purpose.
  theirs = third_party_families()
  longer = (p for p in theirs if name.startswith(p) and len(own) < len(p) < len(name))
  other = max(longer, key=len, default="")
  if other:
    return other, name[len(other) :].lstrip("-"), theirs[other]
  if reason:
    raise UnsupportedModelError(f"{model_name!r} is not supported: {reason}")
  raise _unknown(model_name)


def _unknown(text: str) -> UnknownModelError:
  """Makes the error for an unknown name; the message lists the nearest known ids and the remedy."""
  near = nearest_model_ids(text)
  families = sorted({info.family for info in FAMILIES.values()})
  known = (
    f"the nearest known ids are {', '.join(near)}" if near else f"the families are {', '.join(families)}"
  )
  return UnknownModelError(
    ". ".join(
      [
        f"{text!r} is not a known model; {known}. A checkpoint directory with config.json loads whatever its name",
        *broken_entries(),
      ]
    )
  )
