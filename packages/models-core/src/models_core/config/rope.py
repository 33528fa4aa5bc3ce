"""RoPE's scaling in config.json: the objects `rope_scaling` and `rope_parameters`, key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models_core.errors import ConfigError
from models_core.rope_scaling import FrequencyFactors, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

# Keys that a scaling of some kind computes with, and the values that scale nothing.
_COMPUTED: Mapping[str, tuple[object, ...]] = {
  "alpha": (),
  "attention_factor": (1,),
  "beta_fast": (),
  "beta_slow": (),
  "factor": (1,),
  "factors": (),
  "high_freq_factor": (),
  "long_factor": (),
  "low_freq_factor": (),
  "mscale": (),
  "mscale_all_dim": (),
  "short_factor": (),
}
# The object's own keys, whatever its kind.
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LENGTH = "original_max_position_embeddings"


def read_scaling(
  value: Mapping[str, Any], where: str, raw: Mapping[str, Any]
) -> tuple[RopeScaling | None, list[str]]:
  """Reads an object of RoPE.

  Args:
    value: the object.
    where: it is, for messages.
    raw: the configuration that holds it.

  Returns:
    The scaling, None for unscaled RoPE, and the keys that are not read.

  Raises:
    ConfigError: if the kind is not implemented or the type is missing, or if a key is missing, has a wrong value, or would
      be dropped although it changes frequencies.
  """
  kinds = {str(value[key]) for key in ("rope_type", "type") if value.get(key) is not None}
  if len(kinds) > 1:
    raise ConfigError(
      f"{where} states rope_type and type, and they differ: {', '.join(map(repr, sorted(kinds)))}"
    )
  kind = next(iter(kinds), "default")
  if kind not in _SCALINGS:
    raise ConfigError(f"{where}: rope_type {kind!r} is not implemented; known are {', '.join(_SCALINGS)}")
  if value.get("partial_rotary_factor") not in (None, 1):
    raise ConfigError(
      f"{where}.partial_rotary_factor is {value['partial_rotary_factor']!r}; only heads that RoPE rotates as a whole are "
      "implemented"
    )
  read, keys = _SCALINGS[kind]
  left = sorted(key for key in value.keys() - keys - _COMMON if value[key] is not None)
  if nested := [key for key in left if isinstance(value[key], Mapping)]:
    raise ConfigError(
      f"{where} has objects for kinds of layers ({', '.join(nested)}), which this architecture does not have: give one "
      "scaling for all layers"
    )
  if kind == "default" and (scales := [k for k in left if k in _COMPUTED and value[k] not in _COMPUTED[k]]):
    stated = "its rope_type is 'default'" if kinds else "rope_type is missing"
    raise ConfigError(
      f"{where} has {', '.join(f'{key}={value[key]!r}' for key in scales)}, but {stated}, which scales nothing: add the "
      "rope_type that is meant, or remove these keys"
    )
  return read(value, where, raw), left


def positive(value: Any, what: str) -> float:
  """A positive number.

  Raises:
    ConfigError: for any other value; `what` names it.
  """
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e308:
    raise ConfigError(f"{what} is {value!r}, expected a positive number")
  return float(value)


def _numbers(value: Any, what: str) -> Any:
  """A positive number as it is, or a tuple of such numbers."""
  numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
  for number in numbers:
    positive(number, what)
  return numbers if isinstance(value, (list, tuple)) else value


def _length(value: Mapping[str, Any], where: str, raw: Mapping[str, Any]) -> Any:
  """The length of contexts in pretraining, which may stand beside the object; None if nothing states it."""
  own, beside = value.get(_LENGTH), raw.get(_LENGTH)
  if own is not None and beside is not None and own != beside:
    raise ConfigError(
      f"{_LENGTH} is {own!r} in {where} and {beside!r} beside it, and versions of transformers differ in which they "
      "take: remove one"
    )
  return beside if own is None else own


def _fields(
  cls: Callable[..., RopeScaling], **keys: str
) -> tuple[Callable[..., RopeScaling], frozenset[str]]:
  def read(value: Mapping[str, Any], where: str, raw: Mapping[str, Any]) -> RopeScaling:
    stated = dict(value)
    if _LENGTH in keys.values():
      stated[_LENGTH] = _length(value, where, raw)
    if missing := [key for key in keys.values() if stated.get(key) is None]:
      raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return cls(**{field: _numbers(stated[key], f"{where}.{key}") for field, key in keys.items()})

  return read, frozenset(keys.values())


def _yarn(value: Mapping[str, Any], where: str, raw: Mapping[str, Any]) -> YarnScaling:
  length = _length(value, where, raw)
  if length is None:  # as transformers has it
    length = raw.get("max_position_embeddings")
  options = {k: v for k in _YARN_OPTIONS if (v := value.get(k)) is not None}
  numbers = {"factor": value.get("factor"), _LENGTH: length, **options}
  if missing := [key for key, number in numbers.items() if number is None]:
    raise ConfigError(f"{where} lacks {', '.join(missing)}")
  for key, number in numbers.items():
    positive(number, f"{where}.{key}")
  if not isinstance(truncate := value.get("truncate", True), bool):
    raise ConfigError(f"{where}.truncate is {truncate!r}, expected true or false")
  return YarnScaling(value["factor"], **{"original_max_position": length, **options}, truncate=truncate)


_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")

# rope_type -> the class of the scaling and, field by field, the key that holds it.
_SCALINGS: dict[str, tuple[Callable[..., RopeScaling | None], frozenset[str]]] = {
  "default": (lambda value, where, raw: None, frozenset()),
  "linear": _fields(LinearScaling, factor="factor"),
  "llama3": _fields(
    Llama3Scaling,
    factor="factor",
    low_freq_factor="low_freq_factor",
    high_freq_factor="high_freq_factor",
    original_max_position=_LENGTH,
  ),
  "yarn": (_yarn, frozenset({"factor", _LENGTH, "truncate", *_YARN_OPTIONS})),
  "frequency_factors": _fields(FrequencyFactors, factors="factors"),
}


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
  """The keys of a scaling, as `rope_scaling` and `rope_parameters` hold them. Empty without scaling."""
  match scaling:
    case None:
      return {}
    case LinearScaling(factor):
      return {"rope_type": "linear", "factor": factor}
    case Llama3Scaling(factor, low, high, length):
      return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
      }
    case YarnScaling():
      options = {k: v for k in _YARN_OPTIONS if (v := getattr(scaling, k)) is not None}
      return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "truncate": scaling.truncate,
        **options,
      }
    case FrequencyFactors(factors):
      return {"rope_type": "frequency_factors", "factors": list(factors)}
  raise ConfigError(f"a RoPE scaling of type {type(scaling).__name__} cannot be written to config.json")
