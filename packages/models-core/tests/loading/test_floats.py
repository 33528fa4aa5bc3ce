"""Weights are floats: what is quantised, or said to be."""

import json

import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError
from models_core.formats.files import LocalFiles
from models_core.formats.safetensors import read_safetensors
from models_core.loading.abstract import abstract_model
from models_core.loading.plan import plan_load
from models_core.weights.table import Ignored, Tied, WeightTable

TABLE = WeightTable(
  ("emb", "embed.weight", "v d"),
  ("w", "m.up_proj.weight", "f d"),
  ("count", "m.count", "n"),
  ignored=[Ignored("tower.**", "a test")],
  tied=[Tied("head.weight", "embed.weight")],
)
PARAMETERS = {"emb": ((8, 4), P()), "w": ((6, 4), P()), "count": ((2,), P(), np.int32)}
PLAIN = {
  "embed.weight": np.zeros((8, 4), np.float32),
  "m.up_proj.weight": np.zeros((6, 4), np.float32),
  "m.count": np.zeros(2, np.int32),
}


@pytest.fixture
def plan(save, toy):
  """The plan of a checkpoint with these tensors, in the place of plain ones, and these JSON files."""

  def make(tensors, **files):
    directory = save(PLAIN | tensors)
    for name, value in files.items():
      (directory / f"{name}.json").write_text(json.dumps(value))
    return plan_load(read_safetensors(LocalFiles(str(directory))), abstract_model(toy, PARAMETERS), TABLE)

  return make


def problem(plan, tensors, **files):
  with pytest.raises(CheckpointError) as caught:
    plan(tensors, **files)
  (problem,) = caught.value.problems
  return problem


def test_plain_numbers_have_no_note(plan):
  assert plan({}, config={"quantization_config": None}).notes() == []


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_])
@pytest.mark.parametrize("name", ["m.up_proj.weight", "embed.weight"])
def test_bare_integers_are_refused_by_name(plan, name, dtype):
  said = problem(plan, {name: PLAIN[name].astype(dtype)})
  assert said.startswith(f"{name} is {np.dtype(dtype)}, and no quantisation is known")


def test_an_integer_head_of_a_tied_embedding_is_refused(plan):
  assert problem(plan, {"head.weight": np.zeros((8, 4), np.int8)}).startswith("head.weight is int8")


def test_packed_weights_are_one_problem(plan):
  """Whatever else follows from them, such as wrong shapes and missing tensors."""
  packed = {
    "m.up_proj.weight": np.zeros((12, 1), np.uint8),
    "m.up_proj.weight.absmax": np.zeros(1, np.float32),
  }
  assert problem(plan, packed).startswith(
    "the weights are quantised by bitsandbytes (m.up_proj.weight.absmax)"
  )
  hqq = {"m.up_proj.W_q": np.zeros((6, 2), np.uint8), "m.up_proj.scale": np.zeros((6, 1), np.float16)}
  said = problem(plan, hqq, config={"quantization_config": {"quant_method": "hqq"}})
  assert said.startswith("the weights are quantised by HQQ (config.json: quantization_config; m.up_proj.W_q)")


@pytest.mark.parametrize(
  "files",
  [
    {"hf_quant_config": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}},
    {"config": {"quantization_config": {"quant_method": "modelopt"}}},
  ],
)
def test_8_bit_floats_with_a_scale_need_a_statement_of_their_scheme(plan, files):
  tensors = {
    "m.up_proj.weight": np.zeros((6, 4), ml_dtypes.float8_e4m3fn),
    "m.up_proj.weight_scale": np.ones((), np.float32),
    "m.up_proj.input_scale": np.ones((), np.float32),
  }
  assert "but no configuration says how" in problem(plan, tensors)
  assert plan(tensors, **files).casts() == {("FP8 per tensor", "bfloat16"): 1}


def test_8_bit_floats_without_a_scale_are_floats_unless_it_is_stated_that_they_are_not(plan):
  tensors = {"m.up_proj.weight": np.zeros((6, 4), ml_dtypes.float8_e4m3fn)}
  assert plan(tensors).notes() == []
  said = problem(plan, tensors, config={"quantization_config": {"quant_method": "fp8"}})
  assert said.startswith("m.up_proj.weight_scale_inv is missing, which m.up_proj.weight needs (config.json")


@pytest.mark.parametrize(
  ("raw", "name"),
  [
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config says that the weights are quantised by bitsandbytes"),
    ({"quantization": {"bits": 4}}, "quantization says that the weights are quantised by MLX"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config says that the weights are quantised by compressed-tensors"),
  ],
)  # fmt: skip
def test_a_leftover_statement_beside_plain_weights_is_a_note(plan, raw, name):
  assert plan({}, config=raw).notes() == [
    f"config.json: {name}, but all weights are plain floating-point numbers: it is not read"
  ]


def test_methods_that_compute_otherwise_even_with_floats_are_refused(plan):
  said = problem(plan, {}, config={"quantization_config": {"quant_method": "bitnet"}})
  assert "quantised by BitNet, which computes in a way of its own" in said


def test_scales_of_a_cache_are_left_out_with_a_note(plan):
  scales = {
    f"model.layers.0.self_attn.{name}": np.ones((), np.float32) for name in ("k_scale", "v_proj.v_scale")
  }
  assert plan(scales).notes() == [
    "2 tensors not loaded: the scale of a quantised KV cache, which is not quantised here"
  ]


def test_what_the_table_ignores_may_be_anything(plan):
  made = plan({"tower.weight": np.zeros((2, 2), np.int8), "tower.weight_scale": np.ones((), np.float32)})
  assert made.notes() == ["2 tensors not loaded: a test"]
