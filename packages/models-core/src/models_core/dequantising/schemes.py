"""The schemes that are read: which tensors make one weight, and what decodes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from models_core.dequantising import bitsandbytes, mlx, scaled, transposed
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


def _ends(**roles: str) -> dict[str, tuple[str, str]]:
  """Roles by the end of a tensor's name, a comma between several, in the place of `.weight`."""
  return {f".{end}": (role, ".weight") for role, ends in roles.items() for end in ends.split(",")}


_CODES = _ends(codes="weight")
# Experts whose projections are fused in one tensor have no module of their own.
_FUSED = {"_proj": ("codes", "_proj"), "_proj_scale_inv": ("scale", "_proj")}
_COLUMNS = _ends(codes="qweight", zeros="qzeros", scale="scales", groups="g_idx")

# Names of schemes in `models_core.config` -> how they are read.
READ: Mapping[str, Reading] = {
  "FP8 blocks": Reading(
    _CODES | _ends(scale="weight_scale_inv,weight_scale,scale,qscale_weight") | _FUSED, scaled.fp8
  ),
  "FBGEMM FP8": Reading(_CODES | _ends(scale="weight_scale"), scaled.per_row),
  "compressed-tensors": Reading(
    _CODES
    | _ends(
      packed="weight_packed",
      scale="weight_scale",
      zeros="weight_zero_point",
      shape="weight_shape",
      groups="weight_g_idx",
      second="weight_global_scale",
    ),
    scaled.compressed,
    scaled.compressed_module,
  ),
  "NVIDIA ModelOpt": Reading(
    _CODES
    | _ends(
      scale="weight_scale",
      second="weight_scale_2",
      pre_quant="pre_quant_scale",
      svd_a="svdquant_lora_a",
      svd_b="svdquant_lora_b",
    ),
    scaled.modelopt,
  ),
  "AWQ": Reading(_COLUMNS, transposed.awq),
  "GPTQ": Reading(_COLUMNS, transposed.gptq, transposed.gptq_module),
  "AutoRound": Reading(
    _COLUMNS | _ends(plain="weight", scale="scales,weight_scale"),
    transposed.auto_round,
    transposed.auto_round_module,
  ),
  "bitsandbytes": Reading(
    _CODES
    | _ends(
      absmax="weight.absmax",
      map="weight.quant_map",
      nested="weight.nested_absmax",
      nested_map="weight.nested_quant_map",
      nf4="weight.quant_state.bitsandbytes__nf4",
      fp4="weight.quant_state.bitsandbytes__fp4",
      scale="SCB",
      format="weight_format",
    ),
    bitsandbytes.bitsandbytes,
  ),
  "MLX": Reading(
    _CODES | _ends(scale="scales", biases="biases", second="global_scale"), mlx.mlx, mlx.mlx_module
  ),
  "torchao": Reading(
    _ends(codes="_weight_qdata", scale="_weight_scale", zeros="_weight_zero_point"), scaled.per_row
  ),
}
