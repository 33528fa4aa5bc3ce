"""Weights that the formats' own packages wrote: ours are the numbers that these packages read, in float32."""

import importlib.util
import json
import pathlib
import runpy

import numpy as np
import pytest

from models_core.dequantising import dequantised
from models_core.formats import LocalFiles, read_safetensors

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

MODULE = "model.layers.0.mlp.up_proj"
F32 = torch.float32


def ours(directory, tensors, said, dtype="float32", key="quantization_config"):
  """The weight as the package reads it from a file with these tensors."""
  named = {f"{MODULE}.{end}": tensor.contiguous() for end, tensor in tensors.items()}
  safetensors_torch.save_file(named, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps({key: said}))
  checkpoint = dequantised(read_safetensors(LocalFiles(str(directory))), dtype=np.dtype(dtype))
  assert not checkpoint.contradictions
  info = checkpoint.tensors[f"{MODULE}.weight"]
  reader = checkpoint.open(["model.safetensors"])
  try:
    return np.array(reader.read_box(info, info.everything))
  finally:
    reader.close()


def check(found, expected):
  np.testing.assert_array_equal(found, expected.to(F32).numpy())


def random(*shape):
  return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


COMPRESSED = {
  "tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
  "channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
  "block": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
  "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
  "int8 with zeros": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
  **{
    f"{bits} bits, groups{', zeros' * zeros}": (
      "pack-quantized",
      {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": not zeros},
    )
    for bits in (2, 3, 4, 8)
    for zeros in (False, True)
  },
  "4 bits, channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(name, tmp_path):
  compressors = pytest.importorskip("compressed_tensors.compressors")
  quantization = pytest.importorskip("compressed_tensors.quantization")
  form, weights = COMPRESSED[name]
  args = quantization.QuantizationArgs(**weights)
  scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=form)
  o, i = 92, 160
  if weights["strategy"] == "block":
    o, i = 256, 384  # the compressor takes whole blocks alone
  grid = {"tensor": (1,), "channel": (o, 1), "block": (-(-o // 128), -(-i // 128)), "group": (o, i // 32)}[
    weights["strategy"]
  ]
  scale = (random(*grid).abs() + 0.5) * 0.01
  scale = scale.to(torch.bfloat16).to(F32)
  state = {"weight": random(o, i) * 0.3, "weight_scale": scale}
  if weights.get("symmetric") is False:
    half = 1 << weights["num_bits"] - 1
    state["weight_zero_point"] = torch.randint(-half, half, grid, dtype=torch.int8)
  compressor = compressors.BaseCompressor.get_value_from_registry(form)
  stored = compressor.compress(dict(state), scheme)
  expected = compressor.decompress(dict(stored), scheme)["weight"]
  said = quantization.QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["lm_head"])
  check(ours(tmp_path, stored, json.loads(said.model_dump_json())), expected)


@pytest.mark.parametrize("name", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"])
def test_compressed_tensors_with_small_floats(name, tmp_path):
  compressors = pytest.importorskip("compressed_tensors.compressors")
  quantization = pytest.importorskip("compressed_tensors.quantization")
  o, i = 90, 160
  nv, bits = name.startswith("nv"), 8 if "8" in name else 4
  group = 16 if nv else 32
  args = quantization.QuantizationArgs(
    num_bits=bits, type="float", strategy="tensor_group" if nv else "group", group_size=group,
    scale_dtype=torch.float8_e4m3fn if nv else torch.uint8,
  )  # fmt: skip
  scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=name)
  compressor = compressors.BaseCompressor.get_value_from_registry(name)
  state = {"weight": random(o, i).to(torch.bfloat16)}
  if nv:
    state["weight_scale"] = (random(o, i // group).abs() * 50 + 1).to(torch.float8_e4m3fn).to(F32)
    state["weight_global_scale"] = torch.tensor([311.0])
  else:
    state["weight_scale"] = torch.exp2(torch.randint(-6, 2, (o, i // group)).to(F32))
  stored = compressor.compress(dict(state), scheme)
  wide = {"weight_scale": stored["weight_scale"].to(F32)} if nv else {}
  expected = compressor.decompress(stored | wide, scheme)["weight"]
  said = quantization.QuantizationConfig(config_groups={"group_0": scheme}, format=name, ignore=[])
  found = ours(tmp_path, stored, json.loads(said.model_dump_json()), "bfloat16").astype(np.float32)
  check(found, expected.to(torch.bfloat16))


def test_blocks_that_end_early(tmp_path):
  converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
  codes, scale = random(192, 160).to(torch.float8_e4m3fn), (random(2, 2).abs() + 0.1) * 0.01
  stored = {"weight": codes, "weight_scale_inv": scale}
  named = {f"{MODULE}.{end}": tensor for end, tensor in stored.items()}
  made = converters.FP8BlockDequantizer(
    targets=["re:.*up_proj"], weight_block_size=(128, 128), dtype=F32
  ).process(named)
  said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
  check(ours(tmp_path, stored, said), made[f"{MODULE}.weight"])


@pytest.mark.parametrize("shape", [(64, 92), (100, 128), (33, 100)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind, nested, shape, tmp_path):
  functional = pytest.importorskip("bitsandbytes.functional")
  weight = random(*shape).to(torch.bfloat16)
  packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
  stored = {"weight": packed}
  for key, value in state.as_dict(packed=True).items():
    stored[f"weight.{key}"] = value
  absmax = state.absmax
  if nested:
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
  codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], -1).reshape(-1)[: weight.numel()]
  expected = state.code[codes.long()] * absmax.to(F32).repeat_interleave(64)[: weight.numel()]
  said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
  check(ours(tmp_path, stored, said), expected.reshape(shape))
  if shape[1] % 64 == 0:
    # Its program for CPUs is right where rows are whole blocks.
    (tmp_path / "rounded").mkdir()
    found = ours(tmp_path / "rounded", stored, said, "bfloat16").astype(np.float32)
    check(found, functional.dequantize_4bit(packed, state))


def test_bitsandbytes_with_8_bits(tmp_path):
  functional = pytest.importorskip("bitsandbytes.functional")
  weight = random(60, 100)
  codes, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
  stored = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
  found = ours(tmp_path, stored, {"quant_method": "bitsandbytes", "load_in_8bit": True})
  expected = functional.int8_vectorwise_dequant(codes, largest).to(F32).numpy()
  # The order of two multiplications differs: by one unit in the last place.
  np.testing.assert_array_max_ulp(found, expected, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx(bits, group, tmp_path):
  mx = pytest.importorskip("mlx.core")
  weight = mx.random.normal((90, 384), key=mx.random.key(bits)).astype(mx.bfloat16)
  words, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
  wide = [one.astype(mx.float32) for one in (scales, biases)]
  expected = torch.tensor(np.array(mx.dequantize(words, *wide, group_size=group, bits=bits)))
  as_torch = lambda one: torch.tensor(np.array(one.astype(mx.float32))).to(torch.bfloat16)
  stored = {"weight": torch.tensor(np.array(words)), "scales": as_torch(scales), "biases": as_torch(biases)}
  check(ours(tmp_path, stored, {"group_size": group, "bits": bits}, key="quantization"), expected)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_mlx_with_small_floats(mode, tmp_path):
  mx = pytest.importorskip("mlx.core")
  weight = mx.random.normal((90, 384), key=mx.random.key(1)).astype(mx.bfloat16)
  words, scales, *_ = mx.quantize(weight, mode=mode)
  expected = torch.tensor(np.array(mx.dequantize(words, scales, mode=mode).astype(mx.float32)))
  stored = {"weight": torch.tensor(np.array(words)), "scales": torch.tensor(np.array(scales))}
  said = {"group_size": 16 if mode == "nvfp4" else 32, "bits": 8 if mode == "mxfp8" else 4, "mode": mode}
  check(ours(tmp_path, stored, said, "bfloat16", key="quantization").astype(np.float32), expected)


def test_mlx_with_a_global_scale(tmp_path):
  mx = pytest.importorskip("mlx.core")
  weight = mx.random.normal((90, 384), key=mx.random.key(1))
  largest = mx.abs(weight).max()
  words, scales = mx.quantize(weight, mode="nvfp4", global_scale=largest)
  dtype = mx.float32
  expected = torch.tensor(
    np.array(mx.dequantize(words, scales, mode="nvfp4", global_scale=largest, dtype=dtype))
  )
  stored = {"weight": torch.tensor(np.array(words)), "scales": torch.tensor(np.array(scales))}
  stored["global_scale"] = torch.tensor(np.array(largest))
  said = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
  found = ours(tmp_path, stored, said, key="quantization")
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
  assert abs(found - np.array(weight)).max() < 0.5


def test_awq_by_the_converter_of_compressed_tensors(tmp_path):
  converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
  pack = pytest.importorskip("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(
    "pack-quantized"
  )
  quantization = pytest.importorskip("compressed_tensors.quantization")
  generator = torch.Generator().manual_seed(0)
  i, o, group = 256, 96, 128
  words = lambda *shape: torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, generator=generator).to(
    torch.int32
  )
  stored = {
    "qweight": words(i, o // 8),
    "qzeros": words(i // group, o // 8),
    "scales": ((random(i // group, o).abs() + 0.1) * 0.01).to(torch.float16),
  }
  converter = converters.AutoAWQConverter(group_size=group, targets=["re:.*up_proj"])
  named = converter.process({f"{MODULE}.{end}": tensor.clone() for end, tensor in stored.items()})
  local = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in named.items()}
  local["weight_scale"] = local["weight_scale"].to(F32)
  args = quantization.QuantizationArgs(
    num_bits=4, type="int", strategy="group", group_size=group, symmetric=False
  )
  expected = pack.decompress(local, quantization.QuantizationScheme(targets=["Linear"], weights=args))[
    "weight"
  ]
  said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
  check(ours(tmp_path, stored, said), expected)


@pytest.mark.parametrize("acts", ["in order", "by activity"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 128), (4, 96), (8, 32), (4, -1)])
def test_gptq_by_auto_gptq(bits, group, acts, tmp_path):
  i, o = 256, 96
  layer = auto_gptq_linear()(bits, group, i, o, bias=False, weight_dtype=F32)
  groups = len(layer.scales)
  generator = torch.Generator().manual_seed(bits)
  words = lambda of: torch.randint(-(1 << 31), 1 << 31, of.shape, generator=generator).to(torch.int32)
  layer.qweight = words(layer.qweight)
  # A zero of 0 would be stored as -1, on which its two programs disagree.
  zeros = torch.randint(1, 1 << bits, (o, groups), generator=generator).to(F32)
  scales = (random(o, groups).abs() + 0.1).to(torch.float16).to(F32) * 0.0078125
  if acts == "by activity":
    layer.g_idx = layer.g_idx[torch.randperm(i, generator=generator)].contiguous()
  codes = layer.qweight.clone()
  # `pack` writes zeros and scales as its files have them; the codes are random words.
  layer.pack(torch.nn.Linear(i, o, bias=False), scales, zeros, layer.g_idx)
  layer.qweight, layer.scales = codes, layer.scales.to(F32)
  expected = layer(torch.eye(i)).T
  stored = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
  said = {
    "quant_method": "gptq",
    "bits": bits,
    "group_size": group,
    "desc_act": acts != "in order",
    "sym": False,
  }
  check(ours(tmp_path, stored, said), expected.detach())


def auto_gptq_linear():
  """auto_gptq's layer, whose file needs nothing of its package, which in turn needs an older transformers."""
  found = importlib.util.find_spec("auto_gptq")
  if found is None:
    pytest.skip("auto_gptq is not installed")
  file = pathlib.Path(found.origin).parent / "nn_modules" / "qlinear" / "qlinear_cuda.py"
  return runpy.run_path(str(file))["QuantLinear"]


@pytest.mark.parametrize("shape", [(96, 160), (33, 64)])
def test_modelopt_nvfp4(shape, tmp_path):
  qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
  made, scale, outer = qtensor.NVFP4QTensor.quantize(random(*shape), 16)
  expected = made.dequantize(dtype=F32, scale=scale, double_scale=outer, block_sizes={-1: 16})
  stored = {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": outer}
  said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
  check(ours(tmp_path, stored, said), expected)


@pytest.mark.parametrize("scaled", ["all", "rows"])
def test_modelopt_fp8(scaled, tmp_path):
  qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
  made, scale = qtensor.FP8QTensor.quantize(random(60, 100), axis=0 if scaled == "rows" else None)
  expected = made.dequantize(dtype=F32, scale=scale)
  stored = {
    "weight": made._quantized_data,
    "weight_scale": scale.reshape((60, 1) if scaled == "rows" else ()),
  }
  algorithm = "FP8" if scaled == "all" else "FP8_PER_CHANNEL_PER_TOKEN"
  check(ours(tmp_path, stored, {"quant_method": "modelopt", "quant_algo": algorithm}), expected)


@pytest.mark.parametrize("kind", ["Int8Tensor", "Float8Tensor"])
def test_torchao(kind, tmp_path):
  quantization = pytest.importorskip("torchao.quantization")
  config = {
    "Int8Tensor": lambda: quantization.Int8WeightOnlyConfig(version=2),
    "Float8Tensor": quantization.Float8WeightOnlyConfig,
  }[kind]()
  layer = torch.nn.Linear(100, 60, bias=False, dtype=torch.bfloat16)
  quantization.quantize_(layer, config)
  assert type(layer.weight).__name__ == kind
  stored = {"_weight_qdata": layer.weight.qdata, "_weight_scale": layer.weight.scale.reshape(-1, 1)}
  found = ours(tmp_path, stored, {"quant_method": "torchao"}, "bfloat16").astype(np.float32)
  check(found, layer.weight.dequantize().detach())
