"""Quantised checkpoints beside the numbers of their weights: what is left out, refused, and said."""

import dataclasses
import json

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.dequantising import dequantised
from models_core.errors import CheckpointError
from models_core.formats import LocalFiles, read_safetensors
from models_core.loading.abstract import abstract_model
from models_core.loading.loader import load_arrays
from models_core.loading.plan import plan_load
from models_core.safetensors_loader import load_and_create_model
from models_core.saving.plan import plan_save
from models_core.weights.table import Ignored, WeightTable

from . import written

SHAPE = (24, 64)
TABLE = WeightTable(("w", "m.w.weight", "f d"), ignored=[Ignored("tower.**", "a test")])


@pytest.fixture
def checkpoint(save, rng):
  """A checkpoint of one quantised weight, with other tensors and other statements."""

  def make(one, tensors=None, **said):
    directory = save(one.named("m.w") | (tensors or {}))
    (directory / "config.json").write_text(json.dumps({one.key: one.said | said}))
    return read_safetensors(LocalFiles(str(directory)))

  return make


@pytest.fixture
def plan(toy):
  return lambda checkpoint, **kw: plan_load(checkpoint, abstract_model(toy, {"w": (SHAPE, P())}), TABLE, **kw)


def problem(load):
  with pytest.raises(CheckpointError) as caught:
    load()
  (problem,) = caught.value.problems
  return problem


def test_zero_biases_beside_quantised_weights_are_left_out(checkpoint, plan, rng):
  one = written.gptq(rng, SHAPE)
  made = plan(checkpoint(one, {"m.w.bias": np.zeros(24, np.float16)}))
  assert made.notes() == ["1 tensor not loaded: biases that the model does not have, all zero"]
  said = problem(lambda: plan(checkpoint(one, {"m.w.bias": np.ones(24, np.float16)})))
  assert said.startswith("m.w.bias (24,) is unexpected")


def test_scales_of_activations_are_one_note(checkpoint, plan, rng):
  beside = {
    f"m.w.{name}": np.ones((), np.float32) for name in ("input_scale", "activation_scale", "output_scale")
  }
  made = plan(checkpoint(written.fp8_blocks(rng, SHAPE), beside))
  assert made.notes() == [
    "3 tensors not loaded: the scale of quantised activations, which are not quantised here"
  ]


def test_what_the_table_ignores_may_be_wrong(checkpoint, plan, rng):
  one = written.fp8_blocks(rng, SHAPE)
  beside = {"tower.a.weight": one.tensors["weight"], "tower.a.weight_scale_inv": np.ones((7, 7), np.float32)}
  assert plan(checkpoint(one, beside)).notes() == ["2 tensors not loaded: a test"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_the_dtype_is_that_of_the_configuration_or_the_requested_one(checkpoint, plan, rng, dtype, save):
  one = written.fp8_blocks(rng, SHAPE)
  stored = checkpoint(one)
  (array,) = load_arrays(plan(stored, dtype=np.dtype(dtype))).values()
  np.testing.assert_array_equal(array, one.value.astype(dtype))
  directory = LocalFiles(stored.files.path)
  (save({}, folder="other") / "config.json").write_text("{}")
  raw = {"torch_dtype": dtype, one.key: one.said}
  (array,) = load_arrays(plan(read_safetensors(directory), raw=raw)).values()
  assert array.dtype == dtype


def test_a_number_that_does_not_fit_is_told(checkpoint, plan, rng):
  one = written.fp8_tensor(rng, SHAPE)
  one.tensors["weight_scale"] = np.float32(1e6).reshape(())
  said = problem(lambda: load_arrays(plan(checkpoint(one), dtype=np.dtype(np.float16))))
  assert said.startswith("m.w.weight: ")
  assert "does not fit into float16" in said


LIES = {
  "no version that is read": (written.awq, {"version": "gemv"}, "the weights are in AWQ's format 'gemv', which is not read"),
  "bits of AWQ": (written.awq, {"bits": 8}, "its bits are 8 in the configuration, expected 4"),
  "bits of GPTQ": (written.gptq, {"bits": 5}, "its bits are 5 in the configuration, expected one of 2, 3, 4, 8"),
  "marlin": (written.gptq, {"checkpoint_format": "marlin"}, "the weights are in GPTQ's format 'marlin'"),
  "other bits": (written.gptq, {"bits": 8}, "m.w.qweight has shape (8, 24), which does not hold 64 codes of 8 bits"),
  "other groups": (written.gptq, {"group_size": 16}, "m.w.scales has shape (2, 24), but m.w.weight"),
  "excluded": (written.gptq, {"dynamic": {"-:m": {}}}, "m.w is quantised, but dynamic says '-:m', that it is not"),
  "rotated": (written.packed, {"transform_config": {"a": 1}}, "the weights are rotated (transform_config)"),
  "sparse": (written.packed, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "the weights are sparse"),
  "marlin-24": (written.packed, {"format": "marlin-24"}, "the weights are in the format marlin-24"),
  "ignored": (written.packed, {"ignore": ["re:.*w"]}, "m.w is quantised, but ignore says 're:.*w', that it is not"),
  "mode": (written.mlx, {"mode": "exp"}, "the weights are in MLX's mode 'exp', which is not read"),
  "groups of MLX": (written.mlx, {"group_size": 96}, "m.w.weight has shape (24, 8) and m.w.scales has (24, 2)"),
  "block": (written.fp8_blocks, {"weight_block_size": [0, 128]}, "its weight_block_size is [0, 128]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_statements_that_the_tensors_contradict(checkpoint, plan, rng, name):
  write, changes, said = LIES[name]
  assert problem(lambda: plan(checkpoint(write(rng, SHAPE), **changes))).startswith(said)


DAMAGE = [
  (written.fp8_blocks, "weight_scale_inv", np.full((1, 1), np.nan, np.float32), "holds a number that is not finite: nan"),
  (written.mxfp4, "weight_scale", np.full((24, 2), 255, np.uint8), "holds a number that is not finite: nan"),
  (written.nvfp4, "weight_global_scale", np.zeros(1, np.float32), "holds 0.0, expected a positive scale"),
  (lambda rng, shape: written.packed(rng, shape, order=True), "weight_g_idx", np.full(64, 2, np.int32), "holds the group 2, but there are 2"),
  (lambda rng, shape: written.gptq(rng, shape, order=True), "g_idx", np.full(64, -1, np.int32), "holds the group -1, but there are 2"),
  (lambda rng, shape: written.gptq(rng, shape, sym=True), "qzeros", np.full((2, 3), 0x77777776, np.int32), "holds zero points besides 7 and 8"),
  (written.bnb4, "weight.quant_map", np.full(16, np.inf, np.float32), "holds a number that is not finite: inf"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_companions(checkpoint, plan, rng, number):
  write, name, tensor, said = DAMAGE[number]
  one = write(rng, SHAPE)
  assert one.tensors[name].shape == tensor.shape
  one.tensors[name] = tensor
  assert problem(lambda: load_arrays(plan(checkpoint(one)))).startswith(f"m.w.{name} {said}")


@pytest.mark.parametrize(
  "write", [written.fp8_blocks, written.packed, written.awq, written.gptq, written.bnb4, written.mlx]
)
def test_a_missing_companion(checkpoint, plan, rng, write):
  whole = write(rng, SHAPE)
  optional = {"g_idx"}
  for name in whole.tensors.keys() - optional:
    rest = {other: tensor for other, tensor in whole.tensors.items() if other != name}
    said = problem(lambda rest=rest: plan(checkpoint(dataclasses.replace(whole, tensors=rest))))
    assert "m.w." in said


def test_a_base_holds_plain_tensors(checkpoint, rng):
  one = written.gptq(rng, SHAPE)
  base = dequantised(checkpoint(one))
  (saved,) = plan_save({"w": np.zeros(SHAPE, written.BF16)}, TABLE, base=base)
  assert (saved.name, saved.shape) == ("m.w.weight", SHAPE)


def test_a_mapping_of_names_gets_floats(checkpoint, toy, rng):
  one = written.awq(rng, SHAPE)
  make = lambda config, *, rngs: toy({"w": (SHAPE[::-1], P())}, rngs=rngs)
  mapping = lambda config: {r"m\.(\w)\.weight": (r"\1", ((1, 0), None))}
  model = load_and_create_model(checkpoint(one).files.path, make, None, mapping, dtype="float32")
  np.testing.assert_array_equal(model.w.get_value(), one.value.T)
