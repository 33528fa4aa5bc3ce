"""The number of rows of the embedding and the head, on every kind of mesh, with the configuration."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import ModelsError
from models_core.layers import CausalLM, Embedder, Head, RematConfig, RMSNorm
from models_core.score_model import ScoreModel
from models_core.sharding import ShardingConfig
from models_core.vocabulary import pad_vocabulary, resize_vocabulary

V, D = 5, 4
MESHES = {
  "one": lambda: None,
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), devices=jax.devices()[:4]),
  "auto": lambda: Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp")),
}


@dataclasses.dataclass(frozen=True)
class Config:
  num_embed: int = V
  embed_dim: int = D
  num_layers: int = 1
  tied: bool = False
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE


class Unchanged(nnx.Module):
  def __call__(self, x, positions, rotary, cache, mask):
    return x, cache


class Model(CausalLM):
  def __init__(self, config, *, rngs):
    shd = config.shd_config
    self.config = config
    self.embedder = Embedder(config.num_embed, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    self.layers = nnx.List([Unchanged()])
    self.final_norm = RMSNorm(D, 1e-6, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    self.final_norm.config = config
    if not config.tied:
      self.lm_head = Head(config.num_embed, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def _rotary(self, window):
    return None

  def _logits(self, hidden):
    return self.embedder.decode(hidden) if self.config.tied else self.lm_head(hidden)


def parameters(model):
  return {
    ".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


@pytest.fixture(params=MESHES)
def mesh(request):
  return MESHES[request.param]()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_the_mean_and_the_former_size_is_the_former_model(tied, dtype, mesh):
  model = create_dummy_model(Model, Config(tied=tied), mesh, dtype=dtype)
  before = parameters(model)
  names = {"embedder.input_embedding"} | (set() if tied else {"lm_head.w"})
  resize_vocabulary(model, 9)
  after = parameters(model)
  assert after.keys() == before.keys()
  for name in names:
    assert (after[name].shape, after[name].dtype) == ((9, D), before[name].dtype)
    np.testing.assert_array_equal(after[name][:V], before[name])
    mean = np.asarray(before[name], np.float32).mean(0)
    np.testing.assert_allclose(
      np.asarray(after[name][V:], np.float32),
      np.tile(mean, (4, 1)),
      rtol=1e-2 if dtype == "bfloat16" else 1e-5,
    )
  assert model.config == model.final_norm.config == Config(num_embed=9, tied=tied)
  resize_vocabulary(model, V)
  for name, value in parameters(model).items():
    np.testing.assert_array_equal(value, before[name])
    assert value.sharding == before[name].sharding
  assert model.config == Config(tied=tied)


def test_padding_never_has_the_largest_logit():
  model = create_dummy_model(Model, Config(), scale=1.0)
  # All logits of the former rows are negative for this input, where a row of zeros would win.
  head = -np.abs(np.asarray(model.lm_head.w[...]))
  model.lm_head.w[...] = jax.numpy.asarray(head)
  resize_vocabulary(model, 64)
  logits = np.asarray(model.compute_final_logits(np.ones((1, 3, D), np.float32)))
  assert (logits[..., :V].max(-1) < 0).all()
  assert (logits.argmax(-1) < V).all()


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_padding_makes_a_vocabulary_that_the_mesh_shards(kind):
  mesh = MESHES[kind]()
  model = create_dummy_model(Model, Config(), mesh)
  assert parameters(model)["lm_head.w"].sharding.spec == P(None, "fsdp")
  pad_vocabulary(model)
  assert (model.num_embed, model.config.num_embed) == (6, 6)
  for name in ("embedder.input_embedding", "lm_head.w"):
    assert parameters(model)[name].sharding.spec == P("tp", "fsdp")
  pad_vocabulary(model, multiple_of=128)
  assert model.config.num_embed == 128
  assert np.isfinite(model(np.array([[0, 100]]))[0]).all()


def test_without_a_mesh_padding_changes_nothing():
  model = create_dummy_model(Model, Config())
  pad_vocabulary(model)
  assert model.config.num_embed == V


def test_a_sharding_of_the_user_s_own_is_kept():
  mesh = MESHES["auto"]()
  model = create_dummy_model(Model, Config(num_embed=8), mesh)
  own = jax.sharding.NamedSharding(mesh, P())
  model.lm_head.w.set_value(jax.device_put(model.lm_head.w.get_value(), own))
  resize_vocabulary(model, 10)
  assert parameters(model)["lm_head.w"].sharding.is_fully_replicated
  assert parameters(model)["embedder.input_embedding"].sharding.spec == P("tp", "fsdp")


def test_a_score_model_has_no_head_of_logits_to_change():
  scored = ScoreModel(create_dummy_model(Model, Config()), rngs=nnx.Rngs(0))
  resize_vocabulary(scored, 7)
  assert scored.config.num_embed == scored.model.num_embed == 7


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "9"])
def test_sizes_that_no_vocabulary_has(size):
  model = create_dummy_model(Model, Config())
  for change in (resize_vocabulary, pad_vocabulary):
    with pytest.raises(ValueError, match="expected a positive whole number"):
      change(model, size)


def test_what_cannot_be_resized_is_refused_before_anything_changes():
  with pytest.raises(ModelsError, match=r"Linear is no models_core\.layers\.CausalLM"):
    resize_vocabulary(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 3)
  model = create_dummy_model(Model, Config())
  model.lm_head.w_lora_a = nnx.LoRAParam(jax.numpy.zeros((D, 2)))
  with pytest.raises(ModelsError, match="w has LoRA factors: merge them first"):
    resize_vocabulary(model, 9)
  assert model.num_embed == V
