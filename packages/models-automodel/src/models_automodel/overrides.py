"""What keyword arguments of `from_pretrained` say."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


def override(config: Any, fields: Mapping[str, Any], known: tuple[str, ...] = ()) -> Any:
  """The configuration with some fields replaced.

  Args:
    config: a frozen dataclass.
    fields: new values; those of enum fields may be their names or values as strings.
    known: other keywords that the caller takes, for the nearest match.

  Raises:
    TypeError: for a name that the configuration has no field for, with the nearest one.
  """
  own = {field.name: field for field in dataclasses.fields(config)}
  for name in fields:
    if name not in own:
      near = difflib.get_close_matches(name, [*own, *known], n=1)
      hint = (
        f": did you mean {near[0]!r}?" if near else f"; fields of {type(config).__name__}: {', '.join(own)}"
      )
      raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}{hint}")
  return dataclasses.replace(
    config, **{name: _value(getattr(config, name), new) for name, new in fields.items()}
  )


def cut(config: Any, layers: range | None) -> Any:
  """The configuration of the first layers of a model; of all where `layers` is None.

  Raises:
    ValueError: if these are not the first layers, or more than the model has.
  """
  if layers is None:
    return config
  if (
    not isinstance(layers, range) or layers != range(len(layers)) or not 1 <= len(layers) <= config.num_layers
  ):
    raise ValueError(f"layers={layers!r}, expected range(n) for an n from 1 to {config.num_layers}")
  return dataclasses.replace(config, num_layers=len(layers))


def _value(old: Any, new: Any) -> Any:
  if isinstance(old, enum.Enum) and isinstance(new, str):
    kind = type(old)
    try:
      return kind[new.upper()]
    except KeyError:
      raise TypeError(f"{new!r} is none of {', '.join(member.name for member in kind)}") from None
  return new


def as_dtype(dtype: Any) -> np.dtype | None:
  """What `dtype=` says.

  Raises:
    TypeError: if it is no data type.
  """
  if dtype is None:
    return None
  try:
    return jnp.dtype(dtype)
  except TypeError:
    raise TypeError(f"dtype={dtype!r} is no data type; use jnp.bfloat16, 'float32', ...") from None
