"""What trainers save with Orbax, through AutoModel: steps with optimizer state, own names, and configurations for them."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx

from models_automodel import AutoModel, CheckpointError, ConfigError
from models_automodel.convert import convert
from models_core.dummy_model_creator import create_dummy_model
from models_core.layers import dotted
from models_core.loading import abstract_model
from models_core.score_model import ScoreModel
from models_gemma.gemma3 import FAMILY as GEMMA_3
from models_gemma.gemma3.model import AttentionType
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3 import FAMILY
from models_llama.llama3.model import ModelConfig


def bits(model):
  return {
    dotted(path): np.asarray(variable.get_value()).tobytes()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def arrays_of(model):
  """The parameters as a tree of arrays, without variables."""
  tree = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    place = tree
    for key in path[:-1]:
      place = place.setdefault(str(key), {})
    place[path[-1]] = variable.get_value()
  return tree


def save_steps(directory, *states):
  """Saves a step for each state, with the state of an optimizer beside it, as tunix's trainer does."""
  with ocp.CheckpointManager(directory, item_names=("model_params", "optimizer_state")) as manager:
    for step, state in enumerate(states, 1):
      moments = ocp.args.PyTreeSave({"mu": state})
      manager.save(
        step, args=ocp.args.Composite(model_params=ocp.args.PyTreeSave(state), optimizer_state=moments)
      )


@pytest.fixture(scope="module")
def models(config):
  return [create_dummy_model(FAMILY.model_class, config, random_seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def run(models, config, tmp_path_factory):
  """Two steps of a training run, with the configuration of the model beside them."""
  directory = tmp_path_factory.mktemp("my-run")
  save_steps(directory, *(nnx.state(model) for model in models))
  (directory / "config.json").write_text(json.dumps(FAMILY.write_config(config)))
  return directory


def test_the_newest_step(run, models, config, caplog):
  model, path = AutoModel.from_pretrained(run)
  assert path == str(run)
  assert model.config == config
  assert bits(model) == bits(models[1])
  assert "step 2 is loaded, not 1: for another step, give the path of its folder" in caplog.text
  assert "optimizer_state is not loaded: the state of a training run" in caplog.text


@pytest.mark.parametrize("path", ["1", "1/model_params"])
def test_another_step(run, models, config, path):
  model, _ = AutoModel.from_pretrained(run / path, config=config)
  assert bits(model) == bits(models[0])


@pytest.mark.parametrize("with_variables", [True, False])
@pytest.mark.parametrize("arguments", [ocp.args.StandardSave, ocp.args.PyTreeSave])
def test_every_way_to_save_it(models, config, tmp_path, arguments, with_variables):
  state = nnx.state(models[0], nnx.Param) if with_variables else arrays_of(models[0])
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    manager.save(0, args=arguments(state))
  model, _ = AutoModel.from_pretrained(tmp_path / "run", config=config)
  assert bits(model) == bits(models[0])


def test_a_family_with_a_naming_scheme_of_its_own(tmp_path):
  config = Gemma3Config(
    num_layers=2, num_embed=32, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=8, num_kv_heads=1,
    attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL), rope_theta=700.0, local_rope_theta=30.0,
    norm_eps=1e-6, query_pre_attn_scalar=8, sliding_window_size=3,
  )  # fmt: skip
  model = create_dummy_model(GEMMA_3.model_class, config)
  save_steps(tmp_path, nnx.state(model))
  (tmp_path / "config.json").write_text(json.dumps(GEMMA_3.write_config(config)))
  loaded, _ = AutoModel.from_pretrained(tmp_path)
  assert bits(loaded) == bits(model)


def test_a_score_model(models, config, tmp_path):
  model = ScoreModel(models[0], rngs=nnx.Rngs(0))
  save_steps(tmp_path, nnx.state(model))
  loaded, _ = AutoModel.from_pretrained(tmp_path, config=config)
  assert isinstance(loaded, ScoreModel)
  assert bits(loaded) == bits(model)


def test_a_tree_of_own_names_as_the_base_of_a_published_naming_scheme(tmp_path, run, models):
  convert(run, tmp_path / "huggingface", progress=False)
  model, _ = AutoModel.from_pretrained(tmp_path / "huggingface")
  assert bits(model) == bits(models[1])
  convert(run, tmp_path / "tree", to="orbax", progress=False)
  model, _ = AutoModel.from_pretrained(tmp_path / "tree")
  assert bits(model) == bits(models[1])


def test_without_a_configuration(run):
  with pytest.raises(
    ConfigError,
    match=r"has no config\.json, .* no preset of .*llama3.* put the config\.json beside it, or pass con",
  ):
    AutoModel.plan(run / "2")


def write_shapes(directory, family, config):
  """A tree of full size under the model's own names, whose arrays hold nothing."""
  base = {"driver": "file", "path": f"{directory}/"}
  for name, parameter in abstract_model(family.model_class, config).parameters.items():
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}.value/"}
    ts.open(
      {"driver": "zarr", "kvstore": kvstore}, create=True, dtype=ts.bfloat16, shape=parameter.shape
    ).result()


def test_shapes_of_a_published_size(tmp_path):
  write_shapes(tmp_path / "tuned" / "7" / "model_params", FAMILY, ModelConfig.llama3p2_1b())
  plan = AutoModel.plan(tmp_path / "tuned")
  assert (plan.family, plan.config) == (FAMILY, ModelConfig.llama3p2_1b())


def test_shapes_of_several_published_sizes(tmp_path):
  write_shapes(tmp_path / "tuned", FAMILY, ModelConfig.llama3_8b())
  with pytest.raises(
    ConfigError, match=r"the presets llama3_8b, llama3p1_8b all have its shapes: .*pass config="
  ):
    AutoModel.plan(tmp_path / "tuned")
  plan = AutoModel.plan("meta-llama/Llama-3.1-8B", model_source="local", model_path=tmp_path / "tuned")
  assert plan.config == ModelConfig.llama3p1_8b()


@pytest.mark.parametrize("alone", [True, False])
def test_lora_factors_are_refused(models, config, tmp_path, alone):
  weights = {} if alone else {"final_norm": arrays_of(models[0])["final_norm"]}
  factors = {"embedder": {f"input_embedding_lora_{side}": np.ones((2, 2), np.float32) for side in "ab"}}
  save_steps(tmp_path, weights | factors)
  beside = "" if alone else " beside the weights that they change"
  with pytest.raises(
    CheckpointError,
    match=rf"it holds LoRA factors{beside}, such as embedder\.input_embedding_lora_a: load the mod",
  ):
    AutoModel.plan(tmp_path, config=config)
