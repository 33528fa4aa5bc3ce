"""Each format: the numbers that are loaded are those that were written, bit by bit, on any mesh and in any layout."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.formats.files import LocalFiles
from models_core.formats.safetensors import read_safetensors
from models_core.loading.abstract import abstract_model
from models_core.loading.loader import load_arrays
from models_core.loading.plan import plan_load
from models_core.testing import MESHES
from models_core.weights.table import WeightTable

from . import written

BF16 = np.dtype(ml_dtypes.bfloat16)
O, I = 200, 160  # noqa: E741
# The same weight as it is, transposed, and by heads; each sharded in both directions.
TABLE = WeightTable(
  ("w", "m.w.weight", "f d"), ("t", "m.t.weight", "f d -> d f"), ("h", "m.h.weight", "(n k) d -> n d k")
)
HEADS = 4

FORMATS = {
  name: (functools.partial(write, **arguments), shape)
  for name, write, arguments, *own in (
    ("FP8 128x128", written.fp8_blocks, {}),
    ("FP8 128x128, bfloat16", written.fp8_blocks, {"dtype": written.BF16}),
    ("FP8 128x128, powers", written.fp8_blocks, {"dtype": written.E8M0}),
    ("FP8 32x32", written.fp8_blocks, {"block": (32, 32)}),
    ("FP8 1x32", written.fp8_blocks, {"block": (1, 32), "dtype": written.E8M0}),
    ("FP8 per tensor", written.fp8_tensor, {}),
    (
      "FP8 per tensor, Mistral",
      written.fp8_tensor,
      {"name": "weight_scale_inv", "scale_shape": (1,), "weight_block_size": None},
    ),
    ("FP8 per channel, FBGEMM", written.fp8_rows, {"quant_method": "fbgemm_fp8"}),
    ("FP8 per tensor, ModelOpt", written.fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    ("FP8 per tensor, compressed", written.compressed_floats, {"strategy": "tensor"}),
    ("FP8 per channel, compressed", written.compressed_floats, {"strategy": "channel"}),
    ("FP8 128x128, compressed", written.compressed_floats, {"strategy": "block"}),
    ("FP8 1x32, compressed", written.mxfp8, {}),
    ("int8 per channel", written.int8, {}),
    ("int8 per channel, zeros", written.int8, {"zeros": True}),
    ("int4 groups of 32", written.packed, {}),
    ("int4 groups of 32, zeros", written.packed, {"zeros": True}),
    ("int4 groups of 32, order", written.packed, {"order": True, "zeros": True}),
    ("int4 groups of 32, no order", written.packed, {"order": None}),
    ("int4 per channel", written.packed, {"group": None}, (200, 166)),
    ("int8 groups of 32", written.packed, {"bits": 8, "zeros": True}),
    ("int8 per channel, odd", written.packed, {"bits": 8, "group": None}, (200, 166)),
    ("int3 groups of 32", written.packed, {"bits": 3, "zeros": True}),
    ("int3 groups of 32, whole", written.packed, {"bits": 3, "zeros": True, "whole": True}),
    ("int2 per channel", written.packed, {"bits": 2, "group": None, "zeros": True}),
    ("NVFP4", written.nvfp4, {}),
    ("NVFP4, ModelOpt", written.nvfp4, {"modelopt": True}),
    ("MXFP4", written.mxfp4, {}),
    ("AWQ groups of 32", written.awq, {}),
    ("AWQ groups of 32, no zeros", written.awq, {"zeros": False}),
    *((f"GPTQ int{bits} groups of 32", written.gptq, {"bits": bits}) for bits in (2, 3, 4, 8)),
    ("GPTQ int4 groups of 48", written.gptq, {"group": 48, "index": False}),
    ("GPTQ int4 groups of 32, sym", written.gptq, {"sym": True}),
    ("GPTQ int4 groups of 32, v2", written.gptq, {"v2": True}),
    ("GPTQ int4 groups of 32, label", written.gptq, {"v2": True, "sym": True, "checkpoint_format": "gptq"}),
    ("GPTQ int4 groups of 32, order", written.gptq, {"order": True}),
    ("GPTQ int3 groups of 32, order", written.gptq, {"bits": 3, "order": True, "v2": True}),
    (
      "GPTQ int4 groups of 32, AutoRound",
      written.gptq,
      {"index": False, "sym": True, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
    ),
    (
      "AWQ groups of 32, AutoRound",
      written.awq,
      {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "version": None},
    ),
    ("nf4 blocks of 64", written.bnb4, {}),
    ("nf4 blocks of 64, not nested", written.bnb4, {"nested": False}, (200, 90)),
    ("fp4 blocks of 64", written.bnb4, {"kind": "fp4"}, (52, 62)),
    ("int8 per channel, bitsandbytes", written.bnb8, {}),
    *((f"MLX int{bits} groups of 32", written.mlx, {"bits": bits}) for bits in (2, 3, 4, 5, 6, 8)),
    *((mode.upper(), written.mlx_floats, {"mode": mode}) for mode in ("mxfp8",)),
    *((f"{mode.upper()}, MLX", written.mlx_floats, {"mode": mode}) for mode in ("mxfp4", "nvfp4")),
    ("NVFP4, MLX, a scale for all", written.mlx_floats, {"mode": "nvfp4", "largest": 3.7}),
    ("FP8 per channel, torchao", written.torchao, {"dtype": written.E4M3}),
    ("int8 per channel, torchao", written.torchao, {"dtype": np.int8}),
  )
  for shape in own or [(O, I)]
}


@pytest.fixture
def load(toy, save):
  def run(one, mesh=None, dtype=None):
    tensors = {name: t for module in ("m.w", "m.t", "m.h") for name, t in one.named(module).items()}
    directory = save(tensors)
    (directory / "config.json").write_text(json.dumps(one.config))
    o, i = one.value.shape
    parameters = {
      "w": ((o, i), P("fsdp", "tp")), "t": ((i, o), P("fsdp", "tp")), "h": ((HEADS, i, o // HEADS), P("tp", "fsdp")),
    }  # fmt: skip
    model = abstract_model(toy, parameters, mesh)
    return plan_load(read_safetensors(LocalFiles(str(directory))), model, TABLE, dtype=dtype)

  return run


def expected(value, name):
  match name:
    case "w":
      return value
    case "t":
      return value.T
    case "h":
      return value.reshape(HEADS, -1, value.shape[1]).transpose(0, 2, 1)


def check(plan, value, dtype):
  for name, array in load_arrays(plan).items():
    assert array.dtype == dtype
    np.testing.assert_array_equal(
      np.asarray(array).view(np.uint8),
      np.ascontiguousarray(expected(value, name).astype(dtype)).view(np.uint8),
      name,
    )


@pytest.mark.parametrize("mesh", [None, *MESHES])
@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers(load, rng, name, mesh):
  write, shape = FORMATS[name]
  one = write(rng, shape)
  plan = load(one, mesh and MESHES[mesh]())
  check(plan, one.value, BF16)
  assert plan.casts() == {(name.partition(",")[0], "bfloat16"): 3}
  assert len(plan.notes()) - len(plan.replicated()) == ("input_scale" in one.tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_in_float32(load, rng, name):
  write, shape = FORMATS[name]
  one = write(rng, shape)
  check(load(one, dtype=np.dtype(np.float32)), one.value, np.float32)
