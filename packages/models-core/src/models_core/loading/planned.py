"""One parameter of a load plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import cast

import numpy as np
from jax.sharding import Mesh, NamedSharding

from models_core.loading.abstract import AbstractParameter
from models_core.weights import Piece


@dataclasses.dataclass(frozen=True)
class PlannedParameter:
  """A parameter and the tensors that fill it.

  Attributes:
    parameter: name, shape and sharding of the parameter.
    dtype: dtype of the loaded parameter.
    pieces: the tensors, and which part of the parameter each of them fills.
  """

  parameter: AbstractParameter
  dtype: np.dtype
  pieces: tuple[Piece, ...]

  @property
  def nbytes(self) -> int:
    """Bytes of the whole parameter."""
    return math.prod(self.parameter.shape) * self.dtype.itemsize

  @property
  def shard_nbytes(self) -> int:
    """Bytes of one device's shard."""
    return math.prod(self.parameter.sharding.shard_shape(self.parameter.shape)) * self.dtype.itemsize


def mesh_of(parameters: Iterable[PlannedParameter]) -> Mesh | None:
  """The mesh of the parameters; None is one device."""
  for planned in parameters:
    if isinstance(planned.parameter.sharding, NamedSharding):
      return cast(Mesh, planned.parameter.sharding.mesh)
  return None
