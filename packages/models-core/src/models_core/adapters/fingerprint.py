"""A hash of all that an adapter changes, which tells adapters apart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models_core.adapters.lora import Adapter


def fingerprint_of(adapter: Adapter) -> bytes:
  """A hash of the names, numbers and settings of an adapter, whose arrays this process holds."""
  found = hashlib.blake2b(digest_size=16)
  for part in _parts(adapter):
    found.update(part)
  return found.digest()


def _parts(value: Any) -> Iterator[Any]:
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield f"{field.name}:".encode()
      yield from _parts(getattr(value, field.name))
  elif isinstance(value, Mapping):
    for name in sorted(value):
      yield f"{name}=".encode()
      yield from _parts(value[name])
  elif hasattr(value, "dtype"):
    array = np.ascontiguousarray(value)
    yield f"{array.dtype} {array.shape}\0".encode()
    yield array.reshape(-1).view(np.uint8).data
  else:
    yield f"{value!r}\0".encode()
