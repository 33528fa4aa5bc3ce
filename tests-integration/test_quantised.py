"""A quantised checkpoint through all packages: the model is that of a plain checkpoint with the same numbers."""

import json
import logging
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from models_automodel import AutoModel
from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import CheckpointError
from models_core.formats import LocalFiles, file_layout, read_safetensors
from models_core.loading import load
from models_qwen.qwen3.model import ModelConfig, Qwen3
from models_sources.testing import StoreServer

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
# No size is a multiple of 128, and a mesh of 2 x 4 devices cuts through blocks.
CONFIG = ModelConfig(
  num_layers=2,
  vocab_size=136,
  embed_dim=152,
  hidden_dim=328,
  num_heads=8,
  num_kv_heads=4,
  head_dim=20,
  norm_eps=1e-6,
  rope_theta=1e4,
)
BLOCK = 128
MESHES = {
  "one device": lambda: None,
  "explicit": lambda: jax.make_mesh((2, 4), ("fsdp", "tp")),
  "auto": lambda: Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tp")),
}


def write(directory, tensors, changes):
  beginning, starts = file_layout({name: (t.dtype, t.shape) for name, t in tensors.items()})
  content = bytearray(max(start + tensors[name].nbytes for name, start in starts.items()))
  content[: len(beginning)] = beginning
  for name, start in starts.items():
    content[start : start + tensors[name].nbytes] = tensors[name].tobytes()
  directory.mkdir()
  (directory / "model.safetensors").write_bytes(content)
  (directory / "config.json").write_text(json.dumps(changes))
  return directory


def read(directory):
  checkpoint = read_safetensors(LocalFiles(str(directory)))
  reader = checkpoint.open(["model.safetensors"])
  tensors = {
    name: np.array(reader.read_box(info, info.everything)) for name, info in checkpoint.tensors.items()
  }
  reader.close()
  return tensors


def quantise(weight):
  """The codes, the scales and the numbers that they stand for."""
  blocks = [-(-size // BLOCK) for size in weight.shape]
  spread = lambda grid: np.kron(grid, np.ones((BLOCK, BLOCK), np.float32))[
    : weight.shape[0], : weight.shape[1]
  ]
  largest = np.zeros(blocks, np.float32)
  for row, column in np.ndindex(*blocks):
    part = weight[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
    largest[row, column] = np.abs(part).max()
  scale = (largest / 448).astype(BF16)
  codes = (weight.astype(np.float32) / spread(scale.astype(np.float32))).clip(-448, 448).astype(E4M3)
  return codes, scale, (codes.astype(np.float32) * spread(scale.astype(np.float32))).astype(BF16)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """A quantised checkpoint, and a plain one with the same numbers."""
  directory = tmp_path_factory.mktemp("checkpoints")
  model = create_dummy_model(Qwen3, CONFIG, dtype="bfloat16")
  AutoModel.save_pretrained(model, directory / "original", progress=False)
  raw = json.loads((directory / "original" / "config.json").read_text())
  quantised, plain = {}, {}
  for name, weight in read(directory / "original").items():
    if name.endswith("_proj.weight"):
      quantised[name], quantised[f"{name}_scale_inv"], plain[name] = quantise(weight)
    else:
      quantised[name] = plain[name] = weight
  quantised["model.layers.0.self_attn.k_proj.k_scale"] = np.ones((), np.float32)
  said = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head"],
  }
  return (
    write(directory / "quantised", quantised, raw | {"quantization_config": said}),
    write(directory / "plain", plain, raw),
  )


def arrays(model):
  return {
    ".".join(map(str, path)): leaf.get_value()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


@pytest.mark.parametrize("mesh", MESHES)
def test_the_model_is_that_of_the_plain_checkpoint(checkpoints, mesh):
  quantised, plain = (arrays(AutoModel.from_pretrained(str(path), MESHES[mesh]())[0]) for path in checkpoints)
  for name, array in plain.items():
    assert quantised[name].dtype == array.dtype == BF16
    assert quantised[name].sharding == array.sharding
    np.testing.assert_array_equal(quantised[name], array, name)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_byte_is_read_once(checkpoints, mesh):
  plan = AutoModel.plan(str(checkpoints[0]), MESHES[mesh]())
  counts = []
  load(plan, on_bytes=counts.append)
  weights = sum(
    part.stop - part.start
    for info in plan.checkpoint.tensors.values()
    for part in info.stored
    if not part.name.endswith("_scale_inv")
  )
  scales = plan.stored_nbytes - weights
  assert weights < sum(counts) <= weights + 2 * scales


@pytest.mark.parametrize("mesh", ["one device", "explicit"])
def test_from_a_store_the_same_is_read(checkpoints, mesh, tmp_path, monkeypatch):
  alone, _ = AutoModel.from_pretrained(str(checkpoints[0]), MESHES[mesh](), progress=False)
  with StoreServer() as store:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.endpoint)
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in checkpoints[0].iterdir():
      store.put(f"bucket/model/{file.name}", file.read_bytes())
    model, _ = AutoModel.from_pretrained("gs://bucket/model", MESHES[mesh](), progress=False)
    received = store.received("bucket/model/model.safetensors")
  headers = 256 * 1024
  assert received <= (checkpoints[0] / "model.safetensors").stat().st_size + headers
  expected = arrays(alone)
  for name, array in arrays(model).items():
    np.testing.assert_array_equal(array, expected[name], name)


def test_the_plan_says_what_is_stored_and_what_is_loaded(checkpoints):
  said = str(AutoModel.plan(str(checkpoints[0])))
  assert "14 tensors: FP8 128x128 -> bfloat16, 0." in said
  assert "1 tensor not loaded: the scale of a quantised KV cache" in said


def test_what_is_saved_is_plain(checkpoints, tmp_path, caplog):
  quantised, plain = checkpoints
  model, path = AutoModel.from_pretrained(str(quantised))
  with caplog.at_level(logging.WARNING):
    AutoModel.save_pretrained(model, tmp_path / "saved", base=path, progress=False)
  assert f"{quantised} is quantised; what is saved is not" in caplog.text
  assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
  saved, expected = read(tmp_path / "saved"), read(plain)
  assert saved.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(saved[name], tensor, name)


def test_the_digest_is_that_of_the_plain_checkpoint(checkpoints):
  from models_automodel.digest import digest

  first, second = (digest(str(path)) for path in checkpoints)
  assert first == second


def changed(checkpoints, tmp_path, change):
  tensors = read(checkpoints[0])
  change(tensors)
  raw = json.loads((pathlib.Path(checkpoints[0]) / "config.json").read_text())
  return write(tmp_path / "changed", tensors, raw)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda t: t.pop(f"{NAME}_scale_inv"), f"{NAME}_scale_inv is missing, which {NAME} needs"),
    (lambda t: t.update({f"{NAME}_scale_inv": t[f"{NAME}_scale_inv"][:2]}), f"{NAME}_scale_inv has shape (2, 2), but"),
    (lambda t: t[f"{NAME}_scale_inv"].__setitem__((1, 1), np.inf), f"{NAME}_scale_inv holds a number that is not finite: inf"),
    (lambda t: t.update({NAME: t[NAME].astype(BF16)}), f"{NAME} is bfloat16, expected float8_e4m3fn"),
    (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(E4M3), "lm_head.weight_scale_inv": np.ones((2, 2), np.float32)}),
     "lm_head is quantised, but modules_to_not_convert says 'lm_head'"),
    (lambda t: t.update({"model.layers.0.mlp.side.weight_scale_inv": np.ones((1, 1), np.float32)}),
     "model.layers.0.mlp.side.weight_scale_inv (1, 1) is unexpected"),
  ],
)  # fmt: skip
def test_contradictions_are_told_by_name(checkpoints, tmp_path, change, said):
  with pytest.raises(CheckpointError) as caught:
    AutoModel.from_pretrained(str(changed(checkpoints, tmp_path, change)))
  (problem,) = caught.value.problems
  assert problem.startswith(said)
