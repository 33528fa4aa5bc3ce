"""MLX: unsigned codes with a scale and a bias for each group, and 4- and 8-bit floats seen as words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models_core.dequantising.codes import E2M1, E4M3, Codes
from models_core.dequantising.grids import grid, kind_of
from models_core.dequantising.parts import Described, Parts, integer
from models_core.dequantising.scaled import rows
from models_core.dequantising.weights import Rows

_BITS = (2, 3, 4, 5, 6, 8)
# Modes of floats -> codes, columns of a group, what the bytes of scales are.
_FLOATS: Mapping[str, tuple[Codes, int, Any]] = {
  "mxfp4": (E2M1, 32, "e8m0"),
  "mxfp8": (E4M3, 32, "e8m0"),
  "nvfp4": (E2M1, 16, "e4m3"),
}
# A global scale is the largest number of a weight: the largest codes of 4 and 8 bits, 6 * 448, stand for it.
_LARGEST_NVFP4 = 1 / 2688


def mlx(parts: Parts, said: Described) -> tuple[str, Rows]:
  """A weight of MLX; the shapes tell its bits."""
  stored, scale, mode = parts["codes"], parts["scale"], said.get("mode", "affine")
  if stored.dtype != np.uint32:
    raise ValueError(f"{stored.name} is {stored.dtype.name}, expected uint32")
  *lead, count, width = parts.matrix(stored)
  if isinstance(mode, str) and mode in _FLOATS:
    codes, group, bytes_are = _FLOATS[mode]
    shape = (*lead, count, width * 32 // codes.bits)
    scales = [grid(scale, parts.weight, shape, (1, group), kind=kind_of(scale, bytes_are))]
    if (second := parts.get("second")) is not None:
      if mode != "nvfp4":
        raise ValueError(f"{second.name} is beside weights in MLX's mode {mode!r}, expected nvfp4")
      whole = (count, shape[-1])
      scales.append(grid(second, parts.weight, shape, whole, kind=kind_of(second), factor=_LARGEST_NVFP4))
    return mode.upper(), rows(shape, codes, stored, tuple(scales))
  if mode != "affine":
    raise ValueError(f"the weights are in MLX's mode {mode!r}, which is not read")
  biases = parts["biases"]
  group = integer(said, "group_size", range(32, 1 << 16))
  columns = scale.shape[-1] * group if scale.shape else 0
  bits, rest = divmod(32 * width, max(1, columns))
  if rest or bits not in _BITS or group % 32:
    raise ValueError(
      f"{stored.name} has shape {stored.shape} and {scale.name} has {scale.shape}, which fit no number of bits in "
      f"groups of {group}"
    )
  shape = (*lead, count, columns)
  found, added = (grid(one, parts.weight, shape, (1, group), kind=kind_of(one)) for one in (scale, biases))
  return f"MLX int{bits} groups of {group}", rows(shape, Codes(bits), stored, (found,), biases=added)


def mlx_module(said: Described, module: str) -> Described:
  """What MLX' configuration says of a module, which may have an entry of its own."""
  own = said.get(module)
  if own is False:
    raise ValueError(f"{module} is quantised, but the configuration says that it is not")
  return {**said, **own} if isinstance(own, Mapping) else said
