"""Quantised weights, written from the descriptions of their formats by other means than the package reads them.

Each function makes the stored tensors of one weight from random codes and scales, and the float32 numbers that they
stand for.
"""

import dataclasses
import math

import ml_dtypes
import numpy as np

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)


@dataclasses.dataclass
class Written:
  """A quantised weight: stored tensors by the end of their names behind the module's, and its numbers."""

  tensors: dict
  value: np.ndarray
  said: dict
  key: str = "quantization_config"
  ending: str = "weight"

  def named(self, module):
    return {f"{module}.{end}" if end[0] != "_" else f"{module}{end}": t for end, t in self.tensors.items()}

  @property
  def config(self):
    return {self.key: self.said}


def spread(grid, rows, columns, shape):
  """A number of each block for each element."""
  return np.repeat(np.repeat(grid, rows, -2), columns, -1)[..., : shape[-2], : shape[-1]]


def floats8(rng, shape):
  codes = rng.integers(0, 256, shape).astype(np.uint8)
  codes[(codes & 0x7F) == 0x7F] = 1  # not NaN
  return codes.view(E4M3)


def scales(rng, shape, dtype=F32):
  return (rng.uniform(0.5, 2, shape) * 0.01).astype(dtype)


def powers(rng, shape):
  return rng.integers(120, 131, shape).astype(np.uint8)


def dense(codes, bits):
  """Codes along the last axis as one string of bits, in words of 32."""
  count = codes.shape[-1]
  string = (codes[..., None].astype(np.int64) >> np.arange(bits) & 1).reshape(*codes.shape[:-1], count * bits)
  padded = np.zeros((*string.shape[:-1], -(-count * bits // 32) * 32), np.uint8)
  padded[..., : count * bits] = string
  return np.packbits(padded, -1, bitorder="little").view(np.int32)


def fp8_blocks(rng, shape, block=(128, 128), dtype=F32, name="weight_scale_inv"):
  codes = floats8(rng, shape)
  grid_shape = (*shape[:-2], *(math.ceil(n / b) for n, b in zip(shape[-2:], block, strict=True)))
  stored = powers(rng, grid_shape) if dtype == E8M0 else scales(rng, grid_shape, dtype)
  numbers = 2.0 ** (stored.astype(F32) - 127) if dtype == E8M0 else stored.astype(F32)
  value = codes.astype(F32) * spread(numbers, *block, shape)
  said = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": list(block),
    "activation_scheme": "dynamic",
  }
  return Written({"weight": codes, name: stored.view(dtype)}, value, said)


def fp8_tensor(rng, shape, name="weight_scale", scale_shape=(), **said):
  codes, scale = floats8(rng, shape), scales(rng, scale_shape)
  tensors = {"weight": codes, name: scale, "input_scale": np.ones((), F32)}
  return Written(tensors, codes.astype(F32) * scale.reshape(1, 1), {"quant_method": "fp8"} | said)


def fp8_rows(rng, shape, **said):
  codes, scale = floats8(rng, shape), scales(rng, (shape[0], 1))
  return Written({"weight": codes, "weight_scale": scale}, codes.astype(F32) * scale, said)
