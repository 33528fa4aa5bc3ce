import json

import pytest

from models_core.config.keys import ConfigKeys
from models_core.config.quantisation import (
  QUANTISATION_KEYS,
  SCHEMES,
  is_mark,
  quantisation_problem,
  scheme_of,
  stated_quantisation,
)
from models_core.formats import LocalFiles


@pytest.fixture
def stated(tmp_path):
  """What files with these contents, by their names, state."""

  def read(**files):
    for name, value in files.items():
      (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return stated_quantisation(LocalFiles(str(tmp_path)))

  return read


@pytest.mark.parametrize(
  ("files", "said"),
  [
    ({"config": {"quantization_config": {"quant_method": "gptq"}}}, "config.json: quantization_config GPTQ"),
    ({"config": {"quantization_config": {"load_in_4bit": True}}}, "config.json: quantization_config bitsandbytes"),
    ({"config": {"quantization_config": {"quant_method": "new"}}}, "config.json: quantization_config new"),
    ({"config": {"quantization_config": {"bits": 4}}}, "config.json: quantization_config an unnamed method"),
    ({"config": {"quantization_config": "awq"}}, "config.json: quantization_config AWQ"),
    ({"config": {"quantization": {"bits": 4}}}, "config.json: quantization MLX"),
    ({"config": {key: {"bits": 4} for key in ("quantization", "quantization_config")}}, "config.json: quantization_config MLX"),
    ({"config": {"compression_config": {"format": "x"}}}, "config.json: compression_config compressed-tensors"),
    (
      {"config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}},
      "config.json: text_config.quantization_config FP8 blocks",
    ),
    ({"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}}, "hf_quant_config.json: quantization NVIDIA ModelOpt"),
    ({"quantize_config": {"quant_method": "gptq", "bits": 4}}, "quantize_config.json GPTQ"),
  ],
)  # fmt: skip
def test_where_and_how_files_state_it(stated, files, said):
  found = stated(**files)
  assert f"{found.place} {found.name}" == said


@pytest.mark.parametrize(
  "files",
  [{}, {"config": {}}, {"config": {"quantization_config": {}, "quantization": None, "text_config": None}}],
)
def test_files_that_state_nothing(stated, files):
  assert stated(**files) is None


def test_config_json_is_read_whatever_it_states():
  keys = ConfigKeys({key: {"quant_method": "fp8"} for key in QUANTISATION_KEYS})
  keys.done()


def test_each_mark_and_each_method_is_that_of_one_scheme():
  for things in ([m for s in SCHEMES for m in s.marks], [m for s in SCHEMES for m in s.methods]):
    assert len(set(things)) == len(things)
  for scheme in SCHEMES:
    for mark in scheme.marks:
      assert is_mark(f"model.layers.0.mlp.up_proj.{mark}")
      assert scheme_of([f"a.weight_scale.{mark}"]) is scheme


@pytest.mark.parametrize(
  "name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"]
)
def test_names_of_plain_tensors_are_no_marks(name):
  assert not is_mark(name)


def test_the_sentences(stated):
  marks = ["m.0.weight_scale", "m.1.weight_scale"]
  assert quantisation_problem(stated(hf_quant_config={"quantization": {"quant_algo": "FP8"}}), marks, {}) == (
    "the weights are quantised by NVIDIA ModelOpt (hf_quant_config.json: quantization; 2 tensors such as "
    "m.0.weight_scale), which is not read here: load the unquantised repository or a GGUF file"
  )
  assert quantisation_problem(None, ["m.0.absmax"], {"m.0.weight": "uint8"}) == (
    "the weights are quantised by bitsandbytes (m.0.absmax), but no configuration says how: add the config.json of the "
    "repository, or load the unquantised repository or a GGUF file"
  )
  assert quantisation_problem(None, [], {"m.0.weight": "int8", "m.1.weight": "int8"}).startswith(
    "2 tensors such as m.0.weight are int8, and no quantisation is known that says what these integers stand for"
  )
