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
  "FP8 128x128": functools.partial(written.fp8_blocks, shape=(O, I)),
  "FP8 128x128, bfloat16": functools.partial(written.fp8_blocks, shape=(O, I), dtype=written.BF16),
  "FP8 128x128, powers": functools.partial(written.fp8_blocks, shape=(O, I), dtype=written.E8M0),
  "FP8 32x32": functools.partial(written.fp8_blocks, shape=(O, I), block=(32, 32)),
  "FP8 1x32": functools.partial(written.fp8_blocks, shape=(O, I), block=(1, 32), dtype=written.E8M0),
  "FP8 per tensor": functools.partial(written.fp8_tensor, shape=(O, I)),
  "FP8 per tensor, Mistral": functools.partial(
    written.fp8_tensor, shape=(O, I), name="weight_scale_inv", scale_shape=(1,), weight_block_size=None
  ),
  "FP8 per channel, FBGEMM": functools.partial(written.fp8_rows, shape=(O, I), quant_method="fbgemm_fp8"),
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
  one = FORMATS[name](rng)
  plan = load(one, mesh and MESHES[mesh]())
  check(plan, one.value, BF16)
  assert plan.casts() == {(name.partition(",")[0], "bfloat16"): 3}
  assert len(plan.notes()) - len(plan.replicated()) == ("input_scale" in one.tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_in_float32(load, rng, name):
  one = FORMATS[name](rng)
  check(load(one, dtype=np.dtype(np.float32)), one.value, np.float32)
