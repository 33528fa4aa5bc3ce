"""Score models through AutoModel: loaded by their head, saved as transformers' sequence classifiers."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models_automodel import AutoModel, CheckpointError, ConfigError, digest
from models_automodel.convert import convert
from models_core.generation import generate
from models_core.score_model import ScoreModel

TOKENS = np.arange(8, dtype=np.int32).reshape(2, 4)
POSITIONS = np.broadcast_to(np.arange(4, dtype=np.int32), (2, 4)).copy()


@pytest.fixture
def scored(checkpoint):
  """A score model on the tiny Llama, and the directory of the Llama."""
  model, path = AutoModel.from_pretrained(checkpoint[0])
  return ScoreModel(model, rngs=nnx.Rngs(0)), path


@pytest.fixture
def saved(scored, tmp_path):
  model, path = scored
  AutoModel.save_pretrained(model, tmp_path / "scored", base=path)
  return tmp_path / "scored"


def weights(model):
  return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


def assert_same(ours, theirs):
  ours, theirs = weights(ours), weights(theirs)
  assert ours.keys() == theirs.keys()
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name])


def test_the_files_are_those_of_a_sequence_classifier(scored, saved, checkpoint):
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  assert tensors.keys() == checkpoint[1].keys() - {"lm_head.weight"} | {"score.weight"}
  np.testing.assert_array_equal(tensors["score.weight"], scored[0].score.w[...])
  raw = json.loads((saved / "config.json").read_text())
  assert raw["architectures"] == ["LlamaForSequenceClassification"]
  assert (raw["model_type"], raw["num_labels"]) == ("llama", 1)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_score_model_comes_back(scored, saved, sharded):
  mesh = jax.make_mesh((2, 2), ("fsdp", "tp")) if sharded else None
  loaded, path = AutoModel.from_pretrained(saved, mesh, remat_config="block")
  assert isinstance(loaded, ScoreModel)
  assert path == str(saved)
  assert_same(loaded, scored[0])
  scores = [np.asarray(model(TOKENS, POSITIONS)[0]) for model in (loaded, scored[0])]
  np.testing.assert_allclose(*scores, rtol=2e-5, atol=1e-7)


def test_transformers_own_config_json_is_read(scored, saved):
  raw = json.loads((saved / "config.json").read_text())
  del raw["num_labels"]
  raw |= {"id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}, "problem_type": "regression"}
  (saved / "config.json").write_text(json.dumps(raw))
  assert_same(AutoModel.from_pretrained(saved)[0], scored[0])


def test_a_plan_and_a_digest_know_the_head(scored, saved):
  plan = AutoModel.plan(saved)
  assert plan.parameters[-1].parameter.name == "score.w"
  assert digest(scored[0]) == digest(saved)


def test_both_formats_keep_it(scored, saved, tmp_path):
  convert(saved, tmp_path / "again", dtype="float32", progress=False)
  assert_same(AutoModel.from_pretrained(tmp_path / "again")[0], scored[0])
  convert(saved, tmp_path / "tree", to="orbax", progress=False)
  assert_same(AutoModel.from_pretrained(tmp_path / "tree")[0], scored[0])


def test_a_kept_copy_is_loaded_as_a_score_model(scored, saved, tmp_path):
  for _ in range(2):
    model, _ = AutoModel.from_pretrained(saved, intermediate_ckpt_dir=tmp_path / "kept")
    assert_same(model, scored[0])


def test_another_head_is_refused(saved):
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  tensors["v_head.weight"] = tensors.pop("score.weight")
  safetensors.numpy.save_file(tensors, saved / "model.safetensors")
  with pytest.raises(CheckpointError, match=r"v_head\.weight \(1, 16\) is unexpected"):
    AutoModel.from_pretrained(saved)


def test_a_score_model_generates_nothing(scored):
  with pytest.raises(ConfigError, match="ScoreModel gives no logits: take a language model"):
    generate(scored[0], [[1, 2]], max_new_tokens=1)
