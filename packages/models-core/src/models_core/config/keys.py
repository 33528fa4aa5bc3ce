"""Reading config.json: each key is used, ignored with a note, or an error."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from models_core.config.harmless import is_silent, refusal
from models_core.config.quantisation import QUANTISATION_KEYS
from models_core.config.rope import positive, read_scaling
from models_core.errors import ConfigError
from models_core.rope_scaling import Llama3Scaling, RopeScaling, YarnScaling

_log = logging.getLogger(__name__)
_collected: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)

# Numbers of parts that are made or listed one by one: beyond these a file is damaged, and reading it would take hours.
MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}

_MISSING = object()


class ConfigKeys:
  """A config.json that remembers which of its keys were read."""

  def __init__(self, raw: Mapping[str, Any], where: str = "config.json"):
    if not isinstance(raw, Mapping):
      raise ConfigError(f"{where}: expected an object, found {type(raw).__name__}")
    self._raw, self._where = raw, where
    # Whether weights are quantised is seen from their tensors.
    self._read: set[str] = set(QUANTISATION_KEYS)
    # Keys inside objects that were read.
    self._unread: list[str] = []

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
    return positive(self._take(key, default), f"{self._where}: {key}")

  def is_null(self, key: str) -> bool:
    """Whether the file has the key, and says null."""
    return key in self._raw and self._raw[key] is None

  def number_or_null(self, key: str) -> float | None:
    """A positive number, or None where the file says null. The key must be there."""
    return self.get(key) if self.is_null(key) else self.number(key)

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
      default_theta: where neither spelling states it. It is noted.

    Raises:
      ConfigError: where the spellings differ, for a kind of scaling that is not implemented, or if a key of a scaling
        would have no effect because its type is missing.
    """
    objects = {name: self.get(name) for name in ("rope_scaling", "rope_parameters")}
    theta = self._take("rope_theta", None)
    for name, value in objects.items():
      if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{self._where}: {name} is {value!r}, expected an object")
    # rope_scaling carries a theta of its own where new transformers wrote it under the old name.
    thetas = {"rope_theta": theta} | {
      f"{name}.rope_theta": (value or {}).get("rope_theta") for name, value in objects.items()
    }
    stated = {
      name: positive(value, f"{self._where}: {name}") for name, value in thetas.items() if value is not None
    }
    if len(set(stated.values())) > 1:
      raise ConfigError(
        f"{self._where}: RoPE's theta is stated twice and differs: {_spell(stated)}; remove one"
      )
    scalings: dict[str, RopeScaling | None] = {}
    for name, value in objects.items():
      if value:
        scalings[name], left = read_scaling(value, f"{self._where}: {name}", self._raw)
        self._unread += [f"{name}.{key}" for key in left]
    if len(set(scalings.values())) > 1:
      raise ConfigError(
        f"{self._where}: RoPE's scaling is stated twice and differs: {_spell(scalings)}; remove one"
      )
    scaling = next(iter(scalings.values()), None)
    if isinstance(scaling, (Llama3Scaling, YarnScaling)):
      self._read.add("original_max_position_embeddings")
    if stated:
      return next(iter(stated.values())), scaling
    if default_theta is None:
      raise ConfigError(
        f"{self._where}: rope_theta is missing, and no default is right for every checkpoint: add it"
      )
    note(f"{self._where}: rope_theta is not stated, and is {default_theta:g} as in transformers")
    return default_theta, scaling

  def done(self, harmless: Collection[str] = ()) -> None:
    """Refuses keys that nobody read and on which logits may depend, and notes all others.

    No note is made of those that transformers itself writes into every config.json.

    Args:
      harmless: further keys that change no logit of this architecture, and of which no note is made.

    Raises:
      ConfigError: naming all that are refused.
    """
    known = self._read | set(harmless)
    left = sorted(key for key, value in self._raw.items() if key not in known and value is not None)
    refused = {key: why for key in left if (why := refusal(key, self._raw)) is not None}
    if refused:
      keys = ", ".join(f"{key}={_short(self._raw[key])} ({why})" for key, why in refused.items())
      raise ConfigError(
        f"{self._where}: {keys}: not known to this architecture, and the model's numbers may depend on it. If they do "
        f"not, pass ignore_config_keys={list(refused)} to AutoModel, or remove them"
      )
    if noted := [key for key in left if not is_silent(key)] + sorted(set(self._unread)):
      note(f"{self._where}: not read by this architecture: {', '.join(noted)}")


@contextlib.contextmanager
def collect_notes() -> Iterator[list[str]]:
  """Collects the notes that reading configurations makes in the block, which otherwise go to the log."""
  notes: list[str] = []
  token = _collected.set(notes)
  try:
    yield notes
  finally:
    _collected.reset(token)


def note(text: str) -> None:
  """Notes what a user may not expect of a configuration: to `collect_notes`, or else once in the log."""
  if (notes := _collected.get()) is None:
    _log_once(text)
  elif text not in notes:
    notes.append(text)


@functools.cache
def _log_once(text: str) -> None:
  """A configuration is read anew whenever its model is saved: once is enough."""
  _log.warning("%s", text)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _spell(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name}={value}" for name, value in values.items())
