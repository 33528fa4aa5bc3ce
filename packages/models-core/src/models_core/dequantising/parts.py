"""The stored tensors of one weight by their roles, and what the configuration says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models_core.formats import TensorInfo

# What a configuration says about one weight.
Described = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
  """The stored tensors that make one weight.

  Attributes:
    weight: name of the weight, as an unquantised checkpoint has it.
    tensors: by role, such as "codes" and "scale".
    names: how a tensor of each role would be called, for messages.
    read: reads a small tensor whole.
  """

  weight: str
  tensors: Mapping[str, TensorInfo]
  names: Mapping[str, str]
  read: Callable[[TensorInfo], np.ndarray]

  def __getitem__(self, role: str) -> TensorInfo:
    """The tensor of a role.

    Raises:
      ValueError: if there is none.
    """
    if (found := self.tensors.get(role)) is None:
      beside = next(iter(self.tensors.values()))
      raise ValueError(f"{self.names.get(role, role)} is missing, which {beside.name} needs")
    return found

  def get(self, role: str) -> TensorInfo | None:
    """The tensor of a role; None if there is none."""
    return self.tensors.get(role)

  def matrix(self, info: TensorInfo, stacked: bool = True) -> tuple[int, ...]:
    """The shape of a tensor that is a matrix, or several.

    Raises:
      ValueError: if it is none, or empty.
    """
    if not 2 <= len(info.shape) <= (3 if stacked else 2) or 0 in info.shape:
      raise ValueError(f"{info.name} has shape {info.shape}, expected that of a matrix")
    return info.shape


def integer(said: Described, key: str, values: range, default: int | None = None) -> int:
  """A whole number of a configuration.

  Raises:
    ValueError: if it is none, or out of range.
  """
  value = said.get(key, default)
  if type(value) is not int or value not in values:
    raise ValueError(
      f"its {key} is {value!r} in the configuration, expected a whole number from {values[0]} to {values[-1]}"
    )
  return value


def pair(value: Any, key: str) -> tuple[int, int]:
  """The sizes of a block.

  Raises:
    ValueError: if they are not two positive whole numbers.
  """
  if (
    not isinstance(value, (list, tuple)) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value)
  ):
    raise ValueError(f"its {key} is {value!r} in the configuration, expected two positive whole numbers")
  return value[0], value[1]
