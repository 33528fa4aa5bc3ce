"""The schemes that are read: which tensors make one weight, and what decodes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from models_core.config import SCHEMES
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
    formats: what is read of the scheme, for the README.
    roles: end of a tensor's name -> its role, and the end of the weight's name in its place.
    build: the stored tensors and what is said of them -> name of the encoding, and the weight. Raises ValueError with a
      sentence on what is wrong.
    of_module: (configuration, name of a module) -> what the configuration says of this module.
  """

  formats: str
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


def table() -> list[str]:
  """The rows of the table of schemes in the README: those that are read, and one for all others."""
  rows = [
    f"| {scheme.name} | {', '.join(f'`{method}`' for method in scheme.methods)} | {READ[scheme.name].formats} |"
    for scheme in SCHEMES
    if scheme.name in READ
  ]
  others = [scheme.name for scheme in SCHEMES if scheme.name not in READ and scheme.methods]
  return [*rows, f"| {', '.join(others)} | | refused by name |"]


# Names of schemes in `models_core.config` -> how they are read.
READ: Mapping[str, Reading] = {
  "FP8 blocks": Reading(
    (
      "E4M3 in blocks of any size, also partial ones, with scales in float32, bfloat16 or E8M0; "
      "per tensor and channel; fused experts"
    ),
    _CODES | _ends(scale="weight_scale_inv,weight_scale,scale,qscale_weight") | _FUSED,
    scaled.fp8,
  ),
  "FBGEMM FP8": Reading("E4M3 per channel", _CODES | _ends(scale="weight_scale"), scaled.per_row),
  "compressed-tensors": Reading(
    (
      "float-, int- and naive-quantized (tensor, channel, group, block, zero points); "
      "pack-quantized of 1 to 8 bits (group, channel, zero points, actorder); NVFP4, MXFP4, "
      "MXFP8; groups of modules in different formats"
    ),
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
    "FP8 per tensor, channel and in blocks; NVFP4; mixed precision",
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
  "AWQ": Reading("4 bits, version gemm, with and without zero points", _COLUMNS, transposed.awq),
  "GPTQ": Reading(
    "2, 3, 4, 8 bits; v1 and v2; desc_act; dynamic; symmetric ones whatever their version says",
    _COLUMNS,
    transposed.gptq,
    transposed.gptq_module,
  ),
  "AutoRound": Reading(
    "GPTQ and AWQ by this name; FP8 per tensor and channel",
    _COLUMNS | _ends(plain="weight", scale="scales,weight_scale"),
    transposed.auto_round,
    transposed.auto_round_module,
  ),
  "bitsandbytes": Reading(
    "nf4 and fp4, with and without double quantisation; int8",
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
    "affine of 2, 3, 4, 5, 6, 8 bits, per module; MXFP4, MXFP8, NVFP4; embedding and head, too",
    _CODES | _ends(scale="scales", biases="biases", second="global_scale"),
    mlx.mlx,
    mlx.mlx_module,
  ),
  "torchao": Reading(
    "int8 and FP8 per tensor and channel, in safetensors",
    _ends(codes="_weight_qdata", scale="_weight_scale", zeros="_weight_zero_point"),
    scaled.per_row,
  ),
}
