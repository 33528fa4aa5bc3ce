"""Keyword arguments of `from_pretrained` that change the configuration."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import numbers
from collections.abc import Mapping
from typing import Any

from models_core.sharding import ShardingConfig


def override(config: Any, fields: Mapping[str, Any], known: tuple[str, ...] = ()) -> Any:
  """Returns the configuration with some fields replaced.

  Args:
    config: a frozen dataclass.
    fields: new values; those of enum fields may be their names, or whatever else the enum takes for a member.
    known: other keyword arguments of the caller, which a message may suggest for a mistyped name.

  Raises:
    TypeError: if the configuration has no such field (the message suggests the nearest name), or a value has the wrong
      type.
  """
  own = {field.name: field for field in dataclasses.fields(config)}
  if "attn_implementation" in own:
    fields = _attention(fields)
  for name in fields:
    if name not in own:
      # `plan` lacks some keywords of `from_pretrained`; a name is never suggested for itself.
      near = difflib.get_close_matches(name, [other for other in (*own, *known) if other != name], n=1)
      hint = (
        f": did you mean {near[0]!r}?" if near else f"; fields of {type(config).__name__}: {', '.join(own)}"
      )
      raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}{hint}")
  return dataclasses.replace(
    config, **{name: _value(name, getattr(config, name), new) for name, new in fields.items()}
  )


def _attention(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields with `attn_implementation` in place of `use_flash_attention`, the name of tunix' configurations."""
  fields = dict(fields)
  if "use_flash_attention" in fields:
    flash = fields.pop("use_flash_attention")
    if not isinstance(flash, bool):
      raise TypeError(f"use_flash_attention={flash!r}, expected True or False")
    if "attn_implementation" in fields:
      raise TypeError("use_flash_attention says what attn_implementation says: give only attn_implementation")
    fields["attn_implementation"] = "auto" if flash else "dense"
  return fields


def cut(config: Any, layers: range | None) -> Any:
  """Returns the configuration with only the first layers; unchanged if `layers` is None.

  Raises:
    ValueError: if `layers` is not `range(n)` for an n from 1 to the number of layers.
  """
  if layers is None:
    return config
  if (
    not isinstance(layers, range) or layers != range(len(layers)) or not 1 <= len(layers) <= config.num_layers
  ):
    raise ValueError(f"layers={layers!r}, expected range(n) for an n from 1 to {config.num_layers}")
  return dataclasses.replace(config, num_layers=len(layers))


# (type of the field, accepted type, its name in a message). A bool is an int to Python, but not to a configuration.
_KINDS: tuple[tuple[type, type, str], ...] = (
  (bool, bool, "True or False"),
  (int, numbers.Integral, "a whole number"),
  (float, numbers.Real, "a number"),
  (ShardingConfig, ShardingConfig, "a ShardingConfig"),
)


def _value(name: str, old: Any, new: Any) -> Any:
  if isinstance(old, enum.Enum):
    members = type(old)
    try:
      return members[new.upper()] if isinstance(new, str) else members(new)
    except (KeyError, ValueError):
      raise TypeError(f"{name}={new!r} is not one of {', '.join(one.name for one in members)}") from None
  for kind, accepted, what in _KINDS:
    if isinstance(old, kind):
      # None passes for numbers: the configuration itself checks which of them are optional.
      fits = isinstance(new, accepted) and isinstance(new, bool) == (kind is bool)
      if not fits and not (new is None and kind in (int, float)):
        raise TypeError(f"{name}={new!r}, expected {what}")
      break
  return new
