"""A call changes the model itself, on any mesh and in any transformation."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import pickle
import threading

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.layers.remat import RematConfig
from models_core.layers.stand_in import StandIn

from .tiny_lm import POSITIONS, TOKENS, Config, D, make, run

REMATS = [RematConfig.NONE, RematConfig.BLOCK, RematConfig.DECODER]


class Probe(nnx.Module):
  """Wraps a layer and does what libraries do in a call: counts, drops, sows, adds and replaces parameters."""

  def __init__(self, inner, fail=False):
    self.inner = inner
    self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
    self.calls = 0
    self.fail = fail

  def __call__(self, x, *args):
    self.count[...] += 1
    self.calls += 1
    if not hasattr(self, "factor"):
      self.factor = nnx.LoRAParam(jnp.ones((D, 2)), out_sharding=P("fsdp"), eager_sharding=False)
      self.inner.q.added = self.extra = Extra()
    if self.fail:
      raise RuntimeError("in the middle")
    x, cache = self.inner(x, *args)
    return self.drop(x) + (x @ self.factor[...]).sum() * 0, cache


class Extra(nnx.Module):
  """A module that a call adds in two places."""

  def __init__(self):
    self.w = nnx.Param(jnp.arange(4.0))


def wrapped(mesh, remat=RematConfig.NONE, **options):
  model = make(mesh, Config(windows=(None, None), remat_config=remat))
  model.layers[0] = Probe(model.layers[0], **options)
  return model


AXES = ((2, 2), ("fsdp", "tp"))


@pytest.fixture(params=["none", "auto", "explicit"])
def place(request, meshes):
  """No mesh, or one with Auto or Explicit axes."""
  return None if request.param == "none" else meshes(request.param, *AXES)


def inside(place):
  """The context of a mesh; none without one."""
  return contextlib.nullcontext() if place is None else jax.set_mesh(place)


@pytest.mark.parametrize(
  "context", [lambda place: contextlib.nullcontext(), inside], ids=["outside", "inside"]
)
@pytest.mark.parametrize("remat", REMATS)
def test_what_a_call_changes_stays_changed(place, context, remat):
  with context(place):
    model = wrapped(place, remat)
    probe = model.layers[0]
    before = probe.inner.q.w.get_raw_value()
    eager, jitted = model(TOKENS, POSITIONS)[0], [run(model, TOKENS, POSITIONS)[0] for _ in range(2)]
  assert int(probe.count[...]) == 3
  assert probe.calls >= 2  # tracing counts once
  assert probe.extra is probe.inner.q.added
  np.testing.assert_array_equal(probe.extra.w[...], np.arange(4.0))
  assert np.abs(np.asarray(eager) - np.asarray(jitted[0])).max() > 1e-3, "each call drops other values"
  assert np.abs(np.asarray(jitted[0]) - np.asarray(jitted[1])).max() > 1e-3
  if place is not None:
    factor = probe.factor.get_raw_value()
    assert factor.sharding.mesh == probe.inner.q.w.get_raw_value().sharding.mesh == before.sharding.mesh
    assert probe.inner.q.w.get_raw_value().sharding == before.sharding


def test_eager_calls_leave_unchanged_arrays_alone(place):
  model = wrapped(place)
  before = {path: v.get_raw_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  model(TOKENS, POSITIONS)
  after = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  assert all(after[path].get_raw_value() is value for path, value in before.items())


@pytest.mark.parametrize("remat", REMATS)
def test_changes_survive_gradients_and_splitting_outside(place, remat):
  model = wrapped(place, remat)
  loss = lambda model: (model(TOKENS, POSITIONS)[0] ** 2).mean()
  grads = nnx.jit(nnx.grad(loss))(model)
  assert int(model.layers[0].count[...]) == 1
  assert np.abs(np.asarray(grads["layers"][1]["q"]["w"][...])).max() > 0
  graphdef, state = nnx.split(model)

  @jax.jit
  def step(state):
    model = nnx.merge(graphdef, state)
    model(TOKENS, POSITIONS)
    return nnx.state(model)

  nnx.update(model, step(state))
  assert int(model.layers[0].count[...]) == 2


@pytest.mark.parametrize("remat", REMATS)
def test_functions_that_close_over_a_model_call_it(place, remat):
  model = make(place, Config(windows=(None, None), remat_config=remat))
  expected = np.asarray(model(TOKENS, POSITIONS)[0])
  one = lambda row: model(row[None], POSITIONS[:1])[0][0]
  tokens = jnp.asarray(TOKENS)
  with inside(place):
    found = [
      jax.jit(lambda tokens: model(tokens, POSITIONS)[0])(tokens),
      jax.jit(jax.vmap(one))(tokens),
      jax.lax.scan(lambda carry, row: (carry, one(row)), 0, tokens)[1],
    ]
    embeds = model.embed(tokens)
    grad = jax.jit(jax.grad(lambda e: model(None, POSITIONS, inputs_embeds=e)[0].sum()))(embeds)
  for logits in found:
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=2e-5, atol=2e-5)
  assert grad.shape == embeds.shape
  assert np.abs(np.asarray(grad)).max() > 0
  np.testing.assert_allclose(np.asarray(model(TOKENS, POSITIONS)[0]), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("remat", REMATS)
def test_a_change_inside_a_function_that_closes_over_the_model_is_refused(place, remat):
  model = wrapped(place, remat)
  before = nnx.state(model)
  with inside(place), pytest.raises(flax.errors.TraceContextError):
    jax.jit(lambda tokens: model(tokens, POSITIONS)[0])(jnp.asarray(TOKENS))
  assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)
  assert int(model.layers[0].count[...]) == 0


def test_a_call_that_fails_leaves_a_sharded_model_as_it_was(mesh):
  model = wrapped(mesh, fail=True)
  state = nnx.state(model)
  fails = nnx.jit(lambda model: model(TOKENS, POSITIONS)[0])
  calls = [lambda: fails(model)]
  if mesh.abstract_mesh.explicit_axes:
    calls.append(lambda: model(TOKENS, POSITIONS))
  for call in calls:
    with pytest.raises(RuntimeError, match="in the middle"):
      call()
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(state)
    assert all(x is y for x, y in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(state), strict=True))
  model.layers[0].fail = False
  assert np.isfinite(np.asarray(run(model, TOKENS, POSITIONS)[0])).all()


def test_two_threads_call_one_model(mesh):
  model = make(mesh)
  expected = np.asarray(run(model, TOKENS, POSITIONS)[0])
  before = jax.tree.leaves(nnx.state(model))
  barrier = threading.Barrier(2)

  def call():
    # Compiling runs the model's Python code; running it at once on a few cores would test XLA's collectives.
    with jax.set_mesh(mesh):
      barrier.wait()
      for _ in range(3):
        jax.jit(lambda tokens: model(tokens, POSITIONS)[0]).lower(jnp.asarray(TOKENS)).compile()

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for future in [pool.submit(call) for _ in range(2)]:
      future.result()
  assert all(x is y for x, y in zip(jax.tree.leaves(nnx.state(model)), before, strict=True))
  np.testing.assert_allclose(np.asarray(run(model, TOKENS, POSITIONS)[0]), expected, rtol=2e-5, atol=2e-5)


def test_a_copied_and_a_pickled_model_are_the_model(place):
  model = make(place)
  expected = np.asarray(model(TOKENS, POSITIONS)[0])
  for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    np.testing.assert_allclose(np.asarray(again(TOKENS, POSITIONS)[0]), expected, rtol=2e-5, atol=2e-5)


def test_removed_and_replaced_attributes_are_handed_back():
  module = Probe(nnx.List([Extra(), Extra()]))
  first, second = module.inner
  graphdef, state = nnx.split(module)
  stand_in = StandIn(module, graphdef, state)
  del stand_in.module.drop
  stand_in.module.inner[0], stand_in.module.inner[1] = stand_in.module.inner[1], stand_in.module.inner[0]
  stand_in.module.inner[0].w = nnx.Param(jnp.zeros(2))
  stand_in.module.calls = "many"
  leaves = stand_in.changes()
  assert [leaf.value.shape for leaf in leaves] == [(2,)]
  stand_in.hand_back([leaf.value + 1 for leaf in leaves])
  assert not hasattr(module, "drop")
  assert module.calls == "many"
  assert (module.inner[0], module.inner[1]) == (second, first)
  np.testing.assert_array_equal(second.w[...], np.ones(2))
  np.testing.assert_array_equal(first.w[...], np.arange(4.0))


class TestShardings:
  def test_logits_are_sharded_as_the_tokens_or_as_activations(self, mesh):
    model = make(mesh)
    explicit = bool(mesh.abstract_mesh.explicit_axes)
    rows = P("fsdp", None, None) if explicit else P(None, None, None)
    for logits in (run(model, TOKENS, POSITIONS)[0], model(TOKENS, POSITIONS)[0]):
      assert jax.typeof(logits).sharding.spec == rows
    one = model(TOKENS[:1], POSITIONS[:1])[0]  # one row cannot be sharded
    assert jax.typeof(one).sharding.spec == P(None, None, None)
    placed = jax.device_put(TOKENS, NamedSharding(mesh, P("tp")))
    if explicit:
      assert jax.typeof(run(model, placed, POSITIONS)[0]).sharding.spec == P("tp", None, None)

  def test_the_vocabulary_is_sharded_on_request(self, mesh):

    shd = dataclasses.replace(Config().shd_config, act_btv=("fsdp", None, "tp"))
    model = make(mesh, Config(shd_config=shd))
    for logits in (
      run(model, TOKENS, POSITIONS)[0],
      model.compute_final_logits(model(TOKENS, POSITIONS, skip_lm_head=True)[0]),
    ):
      assert logits.sharding.shard_shape(logits.shape) == (1, 4, 8)
    if mesh.abstract_mesh.explicit_axes:
      tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("tp")))
      assert jax.typeof(model(tokens, POSITIONS)[0]).sharding.spec == P("tp", None, None)

  @pytest.mark.parametrize("remat", REMATS)
  def test_gradients_are_sharded_as_their_parameters(self, mesh, remat):
    model = make(mesh, Config(remat_config=remat))
    graphdef, state = nnx.split(model)
    loss = lambda state: (nnx.merge(graphdef, state)(TOKENS, POSITIONS)[0] ** 2).mean()
    grads = jax.jit(jax.grad(loss))(state)
    for grad, weight in zip(jax.tree.leaves(grads), jax.tree.leaves(state), strict=True):
      assert grad.sharding.shard_shape(grad.shape) == weight.sharding.shard_shape(weight.shape)

  def test_a_state_is_the_same_tree_on_any_mesh(self, meshes):
    states = [
      nnx.state(make(m))
      for m in (None, meshes("auto", *AXES), meshes("explicit", *AXES), meshes("auto", (4,), ("x",)))
    ]
    for state in states[1:]:
      close = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), states[0], state)
      assert all(jax.tree.leaves(close))
    metadata = states[1]["layers"][0]["q"]["w"].get_metadata()
    assert metadata["out_sharding"] == P("tp", "fsdp")


class TestInputs:
  def test_embeddings_take_the_place_of_tokens(self, place):
    model = make(place)
    embeds = model.embed(TOKENS)
    logits, _ = model(None, POSITIONS, inputs_embeds=embeds)
    np.testing.assert_allclose(logits, np.asarray(model(TOKENS, POSITIONS)[0]), rtol=2e-5, atol=2e-5)

  @pytest.mark.parametrize(
    ("tokens", "embeds", "message"),
    [
      (None, None, "give either tokens or inputs_embeds"),
      (TOKENS, np.zeros((2, 4, D)), "give either tokens or inputs_embeds"),
      (None, np.zeros((2, 5, D)), r"inputs_embeds have shape \(2, 5, 8\) and positions \(2, 4\)"),
    ],
  )
  def test_what_is_no_input_is_refused(self, tokens, embeds, message):
    with pytest.raises(ValueError, match=message):
      make(None)(tokens, POSITIONS, inputs_embeds=embeds)

  def test_the_last_token_alone(self, place):
    model = make(place)
    whole = np.asarray(model(TOKENS, POSITIONS)[0])
    logits, _ = model(TOKENS, POSITIONS, decode_only_last_token=True)
    np.testing.assert_allclose(np.asarray(logits), whole[:, -1:], rtol=2e-5, atol=2e-5)
    hidden, _ = model(TOKENS, POSITIONS, decode_only_last_token=True, skip_lm_head=True)
    assert hidden.shape == (2, 1, D)
