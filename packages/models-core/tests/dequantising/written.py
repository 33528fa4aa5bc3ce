"""Quantised weights, written from the descriptions of their formats by other means than the package reads them.

Each function makes the stored tensors of one weight from random codes and scales, and the float32 numbers that they
stand for.
"""

import dataclasses
import json
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

  def named(self, module):
    return {f"{module}.{end}": tensor for end, tensor in self.tensors.items()}

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


def int8(rng, shape, zeros=False):
  codes, scale = rng.integers(-128, 128, shape).astype(np.int8), scales(rng, (shape[0], 1), BF16)
  zero = rng.integers(-20, 20, (shape[0], 1)).astype(np.int8) * zeros
  tensors = {"weight": codes, "weight_scale": scale} | ({"weight_zero_point": zero} if zeros else {})
  said = compressed({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": not zeros})
  return Written(tensors, (codes.astype(F32) - zero) * scale.astype(F32), said)


def compressed(weights, **said):
  group = {"targets": ["Linear"], "weights": weights}
  return {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": group},
    "ignore": ["lm_head"],
  } | said


def compressed_floats(rng, shape, strategy):
  weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
  match strategy:
    case "tensor":
      one = fp8_tensor(rng, shape, scale_shape=(1,))
    case "channel":
      one = fp8_rows(rng, shape)
    case "block":
      one = fp8_blocks(rng, shape, dtype=BF16, name="weight_scale")
      weights["block_structure"] = [128, 128]
  return dataclasses.replace(one, said=compressed(weights))


def packed(rng, shape, bits=4, group=32, zeros=False, order=False, whole=False):
  """Whole codes in words, as early releases packed them, or one string of bits."""

  def pack(codes):
    if not whole:
      return dense(codes, bits)
    each = 32 // bits
    full = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // each) * each), np.uint32)
    full[..., : codes.shape[-1]] = codes
    places = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    return (full.reshape(*full.shape[:-1], -1, each) << places).sum(-1, dtype=np.uint32).view(np.int32)

  o, i = shape
  count = i // group if group else 1
  codes = rng.integers(0, 1 << bits, shape)
  scale = scales(rng, (o, count), BF16)
  zero = rng.integers(0, 1 << bits, (o, count)) if zeros else np.full((o, count), 1 << bits - 1)
  owner = np.arange(i) // (group or i)
  if order:
    rng.shuffle(owner)
  tensors = {"weight_packed": pack(codes), "weight_scale": scale, "weight_shape": np.array(shape)}
  if zeros:
    tensors["weight_zero_point"] = np.ascontiguousarray(pack(np.ascontiguousarray(zero.T)).T)
  if order is not False:
    tensors["weight_g_idx"] = (owner if order else np.full(i, -1)).astype(np.int32)
  weights = {"num_bits": bits, "type": "int", "symmetric": not zeros}
  weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
  value = (codes - zero[:, owner]).astype(F32) * scale.astype(F32)[:, owner]
  return Written(tensors, value, compressed(weights, format="pack-quantized"))


def pairs(codes):
  """4 bits each, the even column in the low half of a byte."""
  return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def nvfp4(rng, shape, modelopt=False):
  o, i = shape
  codes, inner = rng.integers(0, 16, shape), floats8(rng, (o, i // 16)).view(np.uint8) & 0x7F
  inner = inner.view(E4M3)
  outer = np.full(() if modelopt else (1,), 0.003 if modelopt else 311.0, F32)
  both = inner.astype(F32) * outer if modelopt else inner.astype(F32) / outer
  value = E2M1[codes] * np.repeat(both, 16, -1)
  if modelopt:
    tensors = {"weight": pairs(codes), "weight_scale": inner, "weight_scale_2": outer}
    said = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    return Written(tensors, value, {"quant_method": "modelopt"} | said["quantization"])
  tensors = {"weight_packed": pairs(codes), "weight_scale": inner, "weight_global_scale": outer}
  return Written(
    tensors, value, compressed({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16})
  )


def mxfp4(rng, shape):
  codes, scale = rng.integers(0, 16, shape), powers(rng, (shape[0], shape[1] // 32))
  value = E2M1[codes] * np.repeat(2.0 ** (scale.astype(F32) - 127), 32, -1)
  said = compressed({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32})
  return Written({"weight_packed": pairs(codes), "weight_scale": scale}, value, said)


def mxfp8(rng, shape):
  one = fp8_blocks(rng, shape, (1, 32), E8M0, "weight_scale")
  one.tensors["weight_scale"] = one.tensors["weight_scale"].view(np.uint8)
  said = compressed({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32})
  return dataclasses.replace(one, said=said)


def awq_words(codes):
  order = [0, 2, 4, 6, 1, 3, 5, 7]
  words = codes.reshape(*codes.shape[:-1], -1, 8)[..., order].astype(np.uint32)
  return (words << (np.arange(8, dtype=np.uint32) * 4)).sum(-1, dtype=np.uint32).view(np.int32)


def awq(rng, shape, group=32, zeros=True, **said):
  o, i = shape
  count = i // group
  codes, scale = rng.integers(0, 16, (i, o)), scales(rng, (count, o), F16)
  zero = rng.integers(0, 16, (count, o)) if zeros else np.full((count, o), 8)
  tensors = {"qweight": awq_words(codes), "scales": scale} | ({"qzeros": awq_words(zero)} if zeros else {})
  owner = np.arange(i) // group
  value = (codes - zero[owner]).astype(F32) * scale.astype(F32)[owner]
  said = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": group,
    "zero_point": zeros,
    "version": "GEMM",
  } | said
  return Written(tensors, np.ascontiguousarray(value.T), said)


def gptq(rng, shape, bits=4, group=32, sym=False, v2=False, order=False, index=True, **said):
  o, i = shape
  count = math.ceil(i / group)
  codes, scale = rng.integers(0, 1 << bits, (i, o)), scales(rng, (count, o), F16)
  zero = np.full((count, o), 1 << bits - 1) if sym else rng.integers(1, 1 << bits, (count, o))
  owner = np.arange(i) // group
  if order:
    rng.shuffle(owner)
  tensors = {
    "qweight": np.ascontiguousarray(dense(np.ascontiguousarray(codes.T), bits).T),
    "qzeros": dense(zero if v2 else zero - 1, bits),
    "scales": scale,
  }
  if index:
    tensors["g_idx"] = owner.astype(np.int32)
  value = (codes - zero[owner]).astype(F32) * scale.astype(F32)[owner]
  own = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": order}
  if v2:
    own["checkpoint_format"] = "gptq_v2"
  return Written(tensors, np.ascontiguousarray(value.T), own | said)


def bnb4(rng, shape, kind="nf4", nested=True, block=64):
  count = math.prod(shape)
  codes, table = rng.integers(0, 16, count), rng.normal(size=16).astype(F32)
  blocks = -(-count // block)
  state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
  full = np.append(codes, np.zeros(count % 2, codes.dtype))
  tensors = {"weight": (full[::2] << 4 | full[1::2]).astype(np.uint8)[:, None], "weight.quant_map": table}
  if nested:
    inner, levels = rng.uniform(0.5, 1, -(-blocks // 256)).astype(F32), rng.normal(size=256).astype(F32)
    places = rng.integers(0, 256, blocks).astype(np.uint8)
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0417}
    absmax = levels[places] * inner[np.arange(blocks) // 256] + F32.type(0.0417)
    tensors |= {"weight.absmax": places, "weight.nested_absmax": inner, "weight.nested_quant_map": levels}
  else:
    absmax = tensors["weight.absmax"] = rng.uniform(0.5, 1, blocks).astype(F32)
  tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
  value = table[codes] * absmax[np.arange(count) // block]
  return Written(tensors, value.reshape(shape), {"quant_method": "bitsandbytes", "load_in_4bit": True})


def bnb8(rng, shape):
  codes, largest = rng.integers(-128, 128, shape).astype(np.int8), rng.uniform(0.5, 1, shape[0]).astype(F32)
  value = codes.astype(F32) * (largest * np.float32(1 / 127))[:, None]
  tensors = {"weight": codes, "SCB": largest, "weight_format": np.zeros((), np.uint8)}
  return Written(tensors, value, {"quant_method": "bitsandbytes", "load_in_8bit": True})


def mlx(rng, shape, bits=4, group=32):
  codes = rng.integers(0, 1 << bits, shape)
  scale, bias = (scales(rng, (shape[0], shape[1] // group), BF16) for _ in range(2))
  value = codes.astype(F32) * np.repeat(scale.astype(F32), group, -1) + np.repeat(bias.astype(F32), group, -1)
  tensors = {"weight": dense(codes, bits).view(np.uint32), "scales": scale, "biases": bias}
  return Written(tensors, value, {"group_size": group, "bits": bits}, "quantization")


def mlx_floats(rng, shape, mode, largest=None):
  o, i = shape
  group = 16 if mode == "nvfp4" else 32
  codes = floats8(rng, shape).view(np.uint8) if mode == "mxfp8" else rng.integers(0, 16, shape)
  numbers = codes.view(E4M3).astype(F32) if mode == "mxfp8" else E2M1[codes]
  words = codes if mode == "mxfp8" else pairs(codes)
  scale = (
    floats8(rng, (o, i // group)).view(np.uint8) & 0x7F if mode == "nvfp4" else powers(rng, (o, i // group))
  )
  factors = scale.view(E4M3).astype(F32) if mode == "nvfp4" else 2.0 ** (scale.astype(F32) - 127)
  tensors = {"weight": words.view(np.uint32), "scales": scale}
  bits = 8 if mode == "mxfp8" else 4
  said = {"group_size": group, "bits": bits, "mode": mode}
  if largest is not None:
    tensors["global_scale"] = np.array(largest, F32)
    factors = factors * (np.float32(largest) * np.float32(1 / 2688))
  return Written(tensors, numbers * np.repeat(factors, group, -1), said, "quantization")


def torchao(rng, shape, dtype):
  codes = floats8(rng, shape) if dtype == E4M3 else rng.integers(-128, 128, shape).astype(np.int8)
  scale = scales(rng, (shape[0], 1), BF16)
  value = codes.astype(F32) * scale.astype(F32)
  return Written({"_weight_qdata": codes, "_weight_scale": scale}, value, {"quant_method": "torchao"})
