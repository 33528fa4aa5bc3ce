"""Reading config.json: each key is used, known to be harmless, or an error."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from models_core.config.harmless import ADDED, NEUTRAL, WRITTEN
from models_core.errors import ConfigError
from models_core.rope_scaling import FrequencyFactors, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_log = logging.getLogger(__name__)

# Numbers of parts that are made or listed one by one: beyond these a file is damaged, and reading it would take hours.
MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}

_MISSING = object()


class ConfigKeys:
  """A config.json that remembers which of its keys were read."""

  def __init__(self, raw: Mapping[str, Any], where: str = "config.json"):
    if not isinstance(raw, Mapping):
      raise ConfigError(f"{where}: expected an object, found {type(raw).__name__}")
    if raw.get("quantization_config") is not None:
      method = raw["quantization_config"]
      method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
      raise ConfigError(
        f"{where}: quantization_config ({method}): quantised weights are not supported here; "
        "load the unquantised repository or a GGUF file"
      )
    self._raw, self._where = raw, where
    self._read: set[str] = set()

  def _take(self, key: str, default: Any) -> Any:
    self._read.add(key)
    value = self._raw.get(key)
    if value is not None:
      return value
    if default is _MISSING:
      raise ConfigError(
        f"{self._where}: {key} is missing, and no default is right for every checkpoint: add it"
      )
    return default

  def get(self, key: str, kind: type = object) -> Any:
    """A key's value as it is, None where it is absent or null.

    Raises:
      ConfigError: if the value is of another kind, such as `list` or `Mapping`.
    """
    value = self._take(key, None)
    if value is not None and not isinstance(value, kind):
      raise ConfigError(f"{self._where}: {key} is {value!r}, expected a {kind.__name__.lower()}")
    return value

  def integer(self, key: str, default: Any = _MISSING, minimum: int = 1) -> int:
    """A whole number, positive unless another minimum is given."""
    value = self._take(key, default)
    if (
      isinstance(value, bool)
      or not isinstance(value, (int, float))
      or not minimum <= value <= MOST.get(key, 2**63 - 1)
      or value % 1
    ):
      kind = "a positive whole number" if minimum == 1 else f"a whole number from {minimum} on"
      kind += f", {MOST[key]} at most" if key in MOST else ""
      raise ConfigError(f"{self._where}: {key} is {value!r}, expected {kind}")
    return int(value)

  def integers(self, key: str, default: Any = _MISSING) -> tuple[int, ...]:
    """Whole numbers from 0 on, such as those of layers."""
    value = self._take(key, default)
    whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 0
    if not isinstance(value, (list, tuple)) or not all(map(whole, value)):
      raise ConfigError(f"{self._where}: {key} is {value!r}, expected a list of whole numbers")
    return tuple(value)

  def sliding_layers(self, num_layers: int) -> tuple[bool, ...] | None:
    """Which layers have a sliding window, from `layer_types`; None where that is not stated."""
    value, kinds = self._take("layer_types", None), ("full_attention", "sliding_attention")
    if value is None:
      return None
    if not isinstance(value, list) or len(value) != num_layers or any(kind not in kinds for kind in value):
      raise ConfigError(
        f"{self._where}: layer_types is {value!r}, expected {' or '.join(kinds)} for each of {num_layers} layers"
      )
    return tuple(kind == "sliding_attention" for kind in value)

  def number(self, key: str, default: Any = _MISSING) -> float:
    """A positive number."""
    return _positive(self._take(key, default), f"{self._where}: {key}")

  def number_or_null(self, key: str) -> float | None:
    """A positive number, or None where the file says null. The key must be there."""
    null = key in self._raw and self._raw[key] is None
    return self.get(key) if null else self.number(key)

  def boolean(self, key: str, default: Any = _MISSING) -> bool:
    """True or false."""
    value = self._take(key, default)
    if not isinstance(value, bool):
      raise ConfigError(f"{self._where}: {key} is {value!r}, expected true or false")
    return value

  def expect(self, key: str, *values: Any) -> None:
    """Refuses a key that is there with another value: the model doesn't implement it."""
    value = self._take(key, values[0])
    if value not in values:
      expected = " or ".join(map(repr, values))
      raise ConfigError(
        f"{self._where}: {key} is {value!r}; this architecture is implemented for {expected} alone"
      )

  def rope(self, default_theta: float | None = None) -> tuple[float, RopeScaling | None]:
    """RoPE's theta and scaling, from `rope_theta` and `rope_scaling` or the newer `rope_parameters`, or both.

    Args:
      default_theta: where neither spelling states it.

    Raises:
      ConfigError: where the spellings differ, or for a kind of scaling that is not implemented.
    """
    old, new = self._take("rope_scaling", None), self._take("rope_parameters", None)
    theta = self._take("rope_theta", None)
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
      if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{self._where}: {name} is {value!r}, expected an object")
    thetas = {"rope_theta": theta, "rope_parameters.rope_theta": (new or {}).get("rope_theta")}
    # rope_scaling carries a theta of its own where new transformers wrote it under the old name.
    thetas["rope_scaling.rope_theta"] = (old or {}).get("rope_theta")
    stated = {
      name: _positive(value, f"{self._where}: {name}") for name, value in thetas.items() if value is not None
    }
    if len(set(stated.values())) > 1:
      raise ConfigError(
        f"{self._where}: RoPE's theta is stated twice and differs: {_spell(stated)}; remove one"
      )
    theta = next(iter(stated.values()), default_theta)
    if theta is None:
      raise ConfigError(
        f"{self._where}: rope_theta is missing, and no default is right for every checkpoint: add it"
      )
    scalings = {
      name: _scaling(value, f"{self._where}: {name}", self._raw)
      for name, value in (("rope_scaling", old), ("rope_parameters", new))
      if value is not None
    }
    if len(set(scalings.values())) > 1:
      raise ConfigError(
        f"{self._where}: RoPE's scaling is stated twice and differs: {_spell(scalings)}; remove one"
      )
    return theta, next(iter(scalings.values()), None)

  def done(self, harmless: Collection[str] = ()) -> None:
    """Refuses keys that nobody read and that are not known to be harmless.

    Those that are, and that not every config.json has, are named in the log, once in a process.

    Args:
      harmless: further keys that change no logit of this architecture.

    Raises:
      ConfigError: naming all that are refused.
    """
    known = self._read | WRITTEN | set(harmless)
    left = sorted(key for key, value in self._raw.items() if key not in known and value is not None)
    left = [key for key in left if self._raw[key] not in NEUTRAL.get(key, ())]
    if unknown := [key for key in left if key not in ADDED]:
      raise ConfigError(
        f"{self._where}: {', '.join(f'{key}={self._raw[key]!r}' for key in unknown)}: not known to this "
        "architecture. If the model's numbers don't depend on it, remove it from config.json or pass config="
      )
    if left:
      _note_unread(self._where, ", ".join(left))


@functools.cache
def _note_unread(where: str, keys: str) -> None:
  """Says that keys are not read. A configuration is read anew whenever its model is saved: once is enough."""
  _log.warning("%s: keys on which no logit depends are not read: %s", where, keys)


def _positive(value: Any, what: str) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e308:
    raise ConfigError(f"{what} is {value!r}, expected a positive number")
  return float(value)


def _spell(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name}={value}" for name, value in values.items())


def _fields(
  cls: Callable[..., RopeScaling], **keys: str
) -> tuple[Callable[..., RopeScaling], frozenset[str]]:
  def read(value: Mapping[str, Any], where: str, raw: Mapping[str, Any]) -> RopeScaling:
    missing = [key for key in keys.values() if value.get(key) is None]
    if missing:
      raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return cls(**{field: _numbers(value[key], f"{where}.{key}") for field, key in keys.items()})

  return read, frozenset(keys.values())


def _numbers(value: Any, what: str) -> Any:
  """A positive number as it is, or a tuple of such numbers."""
  numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
  for number in numbers:
    _positive(number, what)
  return numbers if isinstance(value, (list, tuple)) else value


def _yarn(value: Mapping[str, Any], where: str, raw: Mapping[str, Any]) -> YarnScaling:
  length = value.get("original_max_position_embeddings")
  if length is None:  # as transformers has it
    length = raw.get("max_position_embeddings")
  options = {k: v for k in _YARN_OPTIONS if (v := value.get(k)) is not None}
  numbers = {"factor": value.get("factor"), "original_max_position_embeddings": length, **options}
  if missing := [key for key, number in numbers.items() if number is None]:
    raise ConfigError(f"{where} lacks {', '.join(missing)}")
  for key, number in numbers.items():
    _positive(number, f"{where}.{key}")
  if not isinstance(truncate := value.get("truncate", True), bool):
    raise ConfigError(f"{where}.truncate is {truncate!r}, expected true or false")
  return YarnScaling(value["factor"], **{"original_max_position": length, **options}, truncate=truncate)


_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# transformers ignores attn_factor, which other implementations multiply in: the logits are those of transformers.
_YARN_KEYS = frozenset(
  {"factor", "original_max_position_embeddings", "truncate", "attn_factor", *_YARN_OPTIONS}
)

# rope_type -> the class of the scaling and, field by field, the key that holds it.
_SCALINGS: dict[str, tuple[Callable[..., RopeScaling | None], frozenset[str]]] = {
  "default": (lambda value, where, raw: None, frozenset()),
  "linear": _fields(LinearScaling, factor="factor"),
  "llama3": _fields(
    Llama3Scaling,
    factor="factor",
    low_freq_factor="low_freq_factor",
    high_freq_factor="high_freq_factor",
    original_max_position="original_max_position_embeddings",
  ),
  "yarn": (_yarn, _YARN_KEYS),
  "frequency_factors": _fields(FrequencyFactors, factors="factors"),
}


def _scaling(value: Mapping[str, Any], where: str, raw: Mapping[str, Any]) -> RopeScaling | None:
  kinds = {str(value[key]) for key in ("rope_type", "type") if value.get(key) is not None}
  if len(kinds) > 1:
    raise ConfigError(
      f"{where} states rope_type and type, and they differ: {', '.join(map(repr, sorted(kinds)))}"
    )
  kind = next(iter(kinds), "default")
  if kind not in _SCALINGS:
    raise ConfigError(f"{where}: rope_type {kind!r} is not implemented; known are {', '.join(_SCALINGS)}")
  read, keys = _SCALINGS[kind]
  unknown = [k for k in value if k not in keys | {"rope_type", "type", "rope_theta"} and value[k] is not None]
  if kind != "default" and unknown:
    raise ConfigError(f"{where}: {', '.join(sorted(unknown))} not known to rope_type {kind!r}")
  return read(value, where, raw)


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
