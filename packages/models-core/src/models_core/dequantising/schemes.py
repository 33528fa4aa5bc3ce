"""The schemes that are read: which tensors make one weight, and what decodes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from models_core.dequantising import scaled
from models_core.dequantising.parts import Described, Parts
from models_core.formats import Index, ReadBox, TensorInfo


class Weight(Protocol):
  """A weight that several stored tensors make."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight as floats."""

  @property
  def parts(self) -> tuple[TensorInfo, ...]:
    """The stored tensors, that of the codes first."""

  @property
  def cell(self) -> tuple[int, ...]:
    """The shape of what should be decoded together."""

  def read(self, read: ReadBox, index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads and decodes a box of the weight."""


@dataclasses.dataclass(frozen=True)
class Reading:
  """How the weights of a scheme are read.

  Attributes:
    roles: end of a tensor's name -> its role, and the end of the weight's name in its place.
    build: the stored tensors and what is said of them -> name of the encoding, and the weight. Raises ValueError with a
      sentence on what is wrong.
    of_module: (configuration, name of a module) -> what the configuration says of this module.
  """

  roles: Mapping[str, tuple[str, str]]
  build: Callable[[Parts, Described], tuple[str, Weight]]
  of_module: Callable[[Described, str], Described] = lambda said, module: said


_WEIGHT = {".weight": ("codes", ".weight")}
_SCALE = {".weight_scale": ("scale", ".weight")}
_FUSED = {"_proj": ("codes", "_proj"), "_proj_scale_inv": ("scale", "_proj")}

# Names of schemes in `models_core.config` -> how they are read.
READ: Mapping[str, Reading] = {
  "FP8 blocks": Reading(
    _WEIGHT
    | {
      f".{name}": ("scale", ".weight")
      for name in ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
    }
    | _FUSED,
    scaled.fp8,
  ),
  "FBGEMM FP8": Reading(_WEIGHT | _SCALE, scaled.fbgemm),
}
