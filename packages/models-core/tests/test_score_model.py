"""Score heads, on a model of attention alone; `FamilyContract` tests them on every family."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError
from models_core.family import Family
from models_core.formats import as_files, read_safetensors
from models_core.layers import Head
from models_core.loading import abstract_model, load, plan_load
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.score_model import ScoreModel, family_of, score_family
from models_core.weights import Ignored, Tied, WeightTable

from .layers.tiny_lm import POSITIONS, TOKENS, Config, D, Model, V, run

CONFIG = Config(windows=(None, 2))


class Untied(Model):
  """The same model with a head of its own."""

  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.lm_head = Head(V, D, config.shd_config.spec("lm_head_vd", "v d"), rngs=rngs)

  def _logits(self, hidden):
    return self.lm_head(hidden)


def mesh_of(kind):
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  return {
    "one": lambda: None,
    "auto": lambda: Mesh(devices, ("fsdp", "tp")),
    "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), devices=devices.flatten()),
  }[kind]()


@pytest.fixture(params=["one", "auto", "explicit"])
def mesh(request):
  return mesh_of(request.param)


def made(mesh, dtype=np.float32):
  """A model with values that need no compilation."""
  model, rng = abstract_model(Untied, CONFIG, mesh), np.random.default_rng(0)
  return model.fill(
    {
      name: jax.device_put((rng.normal(size=p.shape) * 0.5).astype(dtype), p.sharding)
      for name, p in model.parameters.items()
    }
  )


@nnx.jit
def step(model, optimizer):
  loss = lambda model: jnp.square(model(TOKENS, POSITIONS)[0] - 1.0).mean()
  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


def train(model):
  optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)
  return [float(step(model, optimizer)) for _ in range(3)]


def names(model):
  return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}


class TestScores:
  def test_they_are_products_of_the_hidden_states(self, mesh):
    model = made(mesh)
    scored = ScoreModel(model, rngs=nnx.Rngs(0), num_scores=2)
    hidden, _ = model(TOKENS, POSITIONS, skip_lm_head=True)
    expected = np.asarray(hidden) @ np.asarray(scored.score.w[...]).T
    for found, cache in (scored(TOKENS, POSITIONS), run(scored, TOKENS, POSITIONS)):
      assert (found.dtype, cache) == (jnp.float32, None)
      np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)

  def test_a_cache_mask_and_segments_reach_the_model(self, mesh):
    scored = ScoreModel(made(mesh), rngs=nnx.Rngs(0))
    whole = np.asarray(run(scored, TOKENS, POSITIONS)[0])
    cache, found = scored.init_cache(2, 4), []
    for t in range(4):
      scores, cache = run(scored, TOKENS[:, t : t + 1], POSITIONS[:, t : t + 1], cache)
      found.append(np.asarray(scores))
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=2e-5, atol=1e-6)
    own = np.asarray(run(scored, TOKENS, POSITIONS, None, np.eye(4, dtype=bool)[None].repeat(2, 0))[0])
    apart = np.asarray(run(scored, TOKENS, POSITIONS, segment_ids=np.arange(8).reshape(2, 4))[0])
    np.testing.assert_allclose(own, apart, rtol=2e-5, atol=1e-6)
    assert np.abs(own - whole)[:, 1:].min() > 1e-5

  def test_a_sharded_batch_stays_sharded(self, meshes):
    mesh = meshes("explicit", (2, 2), ("fsdp", "tp"))
    scored = ScoreModel(made(mesh), rngs=nnx.Rngs(0))
    tokens, positions = (jax.device_put(x, NamedSharding(mesh, P("fsdp"))) for x in (TOKENS, POSITIONS))
    assert jax.typeof(run(scored, tokens, positions)[0]).sharding.spec == P("fsdp", None, None)

  def test_they_are_float32_for_weights_of_half_precision(self):
    scored = ScoreModel(made(None, dtype=jnp.bfloat16), rngs=nnx.Rngs(0))
    assert run(scored, TOKENS, POSITIONS)[0].dtype == scored.score.w.dtype == jnp.float32
    assert scored.init_cache(2, 4)["layer_0"]["k"].dtype == jnp.bfloat16

  def test_a_tool_can_trace_the_model(self):
    scored = ScoreModel(made(None), rngs=nnx.Rngs(0))
    assert scored(**scored.get_model_input())[0].shape == (2, 1, 1)
    assert scored.config is scored.model.config

  def test_split_and_merge_keep_it(self, mesh):
    scored = ScoreModel(made(mesh), rngs=nnx.Rngs(0))
    again = nnx.merge(*nnx.split(scored))
    np.testing.assert_array_equal(run(again, TOKENS, POSITIONS)[0], run(scored, TOKENS, POSITIONS)[0])


class TestWeights:
  def test_they_are_shared_until_one_model_learns(self, mesh):
    model = made(mesh)
    before = np.asarray(run(model, TOKENS, POSITIONS)[0])
    scored = ScoreModel(model, rngs=nnx.Rngs(0))
    ours, theirs = (
      {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(m))}
      for m in (model, scored.model)
    )
    assert all(theirs[path] is ours[path] for path in theirs)
    assert theirs.keys() == ours.keys() - {("lm_head", "w")}
    losses = train(scored)
    assert losses[2] < losses[0]
    np.testing.assert_array_equal(run(model, TOKENS, POSITIONS)[0], before)

  def test_every_mesh_learns_the_same(self):
    expected = train(ScoreModel(made(None), rngs=nnx.Rngs(0)))
    for kind in ("auto", "explicit"):
      np.testing.assert_allclose(
        train(ScoreModel(made(mesh_of(kind)), rngs=nnx.Rngs(0))), expected, rtol=1e-5
      )

  def test_the_head_lies_on_every_device_of_the_model(self, mesh):
    model = made(mesh)
    head = ScoreModel(model, rngs=nnx.Rngs(0)).score.w
    assert head.shape == (1, D)
    assert head[...].sharding.is_fully_replicated
    assert head[...].sharding.device_set == model.final_norm.w[...].sharding.device_set
    assert head.get_metadata("out_sharding") == P(None, None)

  def test_the_key_decides_the_head(self):
    one, same, other = (ScoreModel(made(None), rngs=nnx.Rngs(seed)).score.w[...] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).min() > 0

  def test_only_a_language_model_gets_a_head(self):
    with pytest.raises(TypeError, match=r"model is Linear, expected a models_core\.layers\.CausalLM"):
      ScoreModel(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


TABLE = WeightTable(
  ("embedder.input_embedding", "model.embed.weight", "v d"),
  ("layers.{i}.q.w", "model.layers.{i}.q.weight", "q d"),
  ("layers.{i}.k.w", "model.layers.{i}.k.weight", "q d"),
  ("layers.{i}.v.w", "model.layers.{i}.v.weight", "q d"),
  ("layers.{i}.o.w", "model.layers.{i}.o.weight", "d q"),
  ("final_norm.w", "model.norm.weight", "d"),
  ("lm_head.w", "lm_head.weight", "v d"),
  ignored=[Ignored("model.rope", "the frequencies follow from the configuration")],
  tied=[Tied("lm_head.weight", "model.embed.weight")],
)


def read_config(raw):
  assert raw.keys() <= {"architectures", "model_type", "torch_dtype", "dtype"}
  return CONFIG


FAMILY = Family(
  name="toy",
  model_types=("toy",),
  model_class=Untied,
  config_class=Config,
  read_config=read_config,
  write_config=lambda config: {"architectures": ["ToyForCausalLM"], "model_type": "toy"},
  weights={"huggingface": TABLE, "gguf": TABLE},
)


def read(path, family, mesh=None):
  checkpoint = read_safetensors(as_files(path))
  family = family_of(family, checkpoint)
  return load(plan_load(checkpoint, abstract_model(family.model_class, CONFIG, mesh), family.huggingface))


def save(path, model, family, base=None):
  state = nnx.state(model, nnx.Param)
  save_model_to_safetensors(state, path, family=family, config=CONFIG, base=base)
  return safetensors.numpy.load_file(path / "model.safetensors")


class TestFiles:
  def test_a_score_model_comes_back_on_every_mesh(self, mesh, tmp_path):
    scored = ScoreModel(made(None), rngs=nnx.Rngs(0), num_scores=3)
    tensors = save(tmp_path / "scored", scored, score_family(FAMILY, 3))
    assert tensors["score.weight"].shape == (3, D)
    assert "lm_head.weight" not in tensors
    raw = json.loads((tmp_path / "scored/config.json").read_text())
    assert (raw["architectures"], raw["num_labels"]) == (["ToyForSequenceClassification"], 3)
    loaded = read(tmp_path / "scored", FAMILY, mesh)
    assert isinstance(loaded, ScoreModel)
    assert names(loaded) == names(scored)
    np.testing.assert_allclose(
      run(loaded, TOKENS, POSITIONS)[0], run(scored, TOKENS, POSITIONS)[0], rtol=2e-5, atol=1e-6
    )

  def test_its_own_checkpoint_is_a_base(self, tmp_path):
    scored = ScoreModel(made(None), rngs=nnx.Rngs(0))
    first = save(tmp_path / "first", scored, score_family(FAMILY))
    again = save(tmp_path / "again", scored, score_family(FAMILY), base=tmp_path / "first")
    assert first.keys() == again.keys()

  def test_the_language_model_is_a_base_without_its_head(self, tmp_path, caplog):
    model = made(None)
    whole = save(tmp_path / "whole", model, FAMILY)
    tensors = save(
      tmp_path / "out", ScoreModel(model, rngs=nnx.Rngs(0)), score_family(FAMILY), base=tmp_path / "whole"
    )
    assert tensors.keys() == whole.keys() - {"lm_head.weight"} | {"score.weight"}
    assert "lm_head.weight" in caplog.text

  def test_a_head_of_logits_beside_the_scores_is_ignored(self, tmp_path):
    model = made(None)
    scored = ScoreModel(model, rngs=nnx.Rngs(0))
    tensors = save(tmp_path / "scored", scored, score_family(FAMILY))
    head = {"lm_head.weight": np.asarray(model.lm_head.w[...])}
    safetensors.numpy.save_file(tensors | head, tmp_path / "scored/model.safetensors")
    loaded = read(tmp_path / "scored", FAMILY)
    np.testing.assert_array_equal(loaded.score.w[...], scored.score.w[...])

  def test_a_language_model_has_no_score_head(self, tmp_path):
    save(tmp_path / "whole", made(None), FAMILY)
    assert isinstance(read(tmp_path / "whole", FAMILY), Untied)
    with pytest.raises(CheckpointError, match=r"score\.weight is missing: the parameter score\.w \(1, 8\)"):
      read(tmp_path / "whole", score_family(FAMILY))

  def test_scores_of_another_width_are_refused(self, tmp_path):
    scored = ScoreModel(made(None), rngs=nnx.Rngs(0))
    tensors = save(tmp_path / "scored", scored, score_family(FAMILY))
    tensors["score.weight"] = np.zeros((1, D + 1), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "scored/model.safetensors")
    with pytest.raises(CheckpointError, match=r"score\.weight has shape \(1, 9\)"):
      read(tmp_path / "scored", FAMILY)
