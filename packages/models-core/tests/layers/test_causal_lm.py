"""The calling convention and the way through the layers, on models of attention alone."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.errors import CacheError
from models_core.layers.causal_lm import CallOptions, CausalLM
from models_core.layers.logits import mean_cross_entropy
from models_core.layers.mesh import call_auto, find_mesh, shard, spec_of
from models_core.layers.remat import RematConfig
from models_core.layers.rope import rotary
from models_core.layers.visibility import visible_keys

from .tiny_lm import POSITIONS, TOKENS, Config, D, H, Model, T, V, make, run


@pytest.fixture(scope="module")
def single():
  """A model without a mesh."""
  return make(None)


@pytest.fixture(scope="module")
def plain(single):
  return np.asarray(run(single, TOKENS, POSITIONS)[0])


@pytest.fixture
def model(mesh):
  return make(mesh)


def close(actual, expected):
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=2e-5, atol=2e-5)


def test_logits_are_those_of_one_device_eagerly_and_in_a_mesh_context(model, mesh, plain):
  logits, cache = model(TOKENS, POSITIONS)
  assert cache is None
  assert logits.dtype == jnp.float32
  close(logits, plain)
  with jax.set_mesh(mesh):
    close(run(model, TOKENS, POSITIONS)[0], plain)


def test_sharded_tokens_keep_their_batch_axis(model, mesh, plain):
  place = NamedSharding(mesh, P("fsdp"))
  tokens, positions = (jax.device_put(x, place) for x in (TOKENS, POSITIONS))
  logits, _ = run(model, tokens, positions)
  close(logits, plain)
  if mesh.abstract_mesh.explicit_axes:
    assert jax.typeof(logits).sharding.spec == P("fsdp", None, None)
  # The vocabulary is whole, so that a loss may pick from it.
  picked = jax.jit(lambda logits, tokens: jnp.take_along_axis(logits, tokens[..., None], -1))(logits, tokens)
  close(picked[..., 0], np.take_along_axis(plain, TOKENS[..., None], -1)[..., 0])


def test_a_loss_of_optax_takes_the_logits_in_a_mesh_context(model, mesh, single):
  def loss(model):
    logits, _ = model(TOKENS, POSITIONS)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()

  with jax.set_mesh(mesh):
    found = jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))
  for array, expected in zip(found, jax.tree.leaves(nnx.jit(nnx.grad(loss))(single)), strict=True):
    close(array, expected)


def test_decoding_token_by_token_gives_the_logits_of_one_pass(model, mesh, plain):
  cache, found = model.init_cache(2, 6), []
  for t in range(T):
    logits, cache = run(model, TOKENS[:, t : t + 1], POSITIONS[:, t : t + 1], cache)
    found.append(np.asarray(logits))
  close(np.concatenate(found, axis=1), plain)
  np.testing.assert_array_equal(cache["layer_0"]["end_index"], [T, T])
  assert cache["layer_0"]["k"].sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", "tp")), 4)


def test_hidden_states_and_the_head_apart_give_the_logits(single, plain):
  @nnx.jit
  def apart(model):
    hidden, _ = model(TOKENS, POSITIONS, skip_lm_head=True)
    return hidden, model.compute_final_logits(hidden)

  hidden, logits = apart(single)
  assert hidden.shape == (2, T, D)
  close(logits, plain)


def test_gradients_are_those_of_one_device_and_lie_as_the_parameters(single, meshes):
  model = make(meshes("explicit", (2, 2), ("fsdp", "tp")))

  def loss(model):
    return (model(TOKENS, POSITIONS)[0] ** 2).mean()

  grads = nnx.jit(nnx.grad(loss))(model)
  expected = nnx.jit(nnx.grad(loss))(single)
  for grad, other, parameter in zip(*map(jax.tree.leaves, (grads, expected, nnx.state(model))), strict=True):
    close(grad, np.asarray(other))
    assert grad.shape == parameter.shape
  assert (
    jax.typeof(grads.layers[0].q.w[...]).sharding.spec == jax.typeof(model.layers[0].q.w[...]).sharding.spec
  )


def test_a_call_that_overflows_the_cache_is_an_error_and_nan_under_jit(model):
  with pytest.raises(CacheError, match="4 more tokens do not fit into a cache of 3 slots"):
    model(TOKENS, POSITIONS, model.init_cache(2, 3))
  _, full = run(model, TOKENS, POSITIONS, model.init_cache(2, 6))
  with pytest.raises(CacheError, match="row 0 uses 4"):
    model(TOKENS, POSITIONS + T, full)
  logits, _ = run(model, TOKENS, POSITIONS + T, full)
  np.testing.assert_array_equal(np.isnan(np.asarray(logits)).all(-1), [[False, False, True, True]] * 2)
  assert np.isfinite(np.asarray(logits)[:, :2]).all()


def test_left_padding_changes_nothing(single, plain):
  tokens = np.concatenate([np.zeros((2, 2), int), TOKENS], axis=1)
  positions = np.concatenate([np.full((2, 2), -1), POSITIONS], axis=1)
  close(np.asarray(run(single, tokens, positions)[0])[:, 2:], plain)


def test_packed_segments_are_separate_sequences(single, plain):
  tokens, positions = TOKENS.reshape(1, -1), POSITIONS.reshape(1, -1)
  segments = np.repeat([[1, 2]], T, axis=1)
  close(np.asarray(run(single, tokens, positions, segment_ids=segments)[0]).reshape(2, T, V), plain)


@pytest.mark.parametrize(
  ("tokens", "positions"), [((T,), (T,)), ((2, T), (T,)), ((2, T), (1, T)), ((2, T), (2, T + 1))]
)
def test_tokens_and_positions_are_rows_of_equal_shape(tokens, positions):
  model = nnx.eval_shape(lambda: Model(Config(), rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r"expected the same \[B, T\] for both"):
    model(np.zeros(tokens, int), np.zeros(positions, int))


def test_positions_may_be_of_any_integer_type(single, plain):
  close(run(single, TOKENS.astype(np.uint8), POSITIONS.astype(np.uint32), single.init_cache(2, T))[0], plain)


def test_positions_that_are_left_out_count_from_0_and_go_on_with_the_cache(model, plain):
  close(run(model, TOKENS)[0], plain)
  close(model(TOKENS)[0], plain)
  cache, parts = model.init_cache(2, T + 2), []
  for part in np.split(TOKENS, [1, 3], axis=1):
    logits, cache = run(model, part, None, cache)
    parts.append(logits)
  close(np.concatenate(parts, 1), plain)
  embeds = model.embed(TOKENS)
  close(model(None, inputs_embeds=embeds)[0], plain)


def test_arrays_may_be_nested_lists(single, plain):
  causal = np.tril(np.ones((1, T, T), int))
  for mask in (causal, causal.astype(bool)):
    close(single(TOKENS.tolist(), POSITIONS.tolist(), None, mask.tolist())[0], plain)
  segments = np.array([[1, 1, 2, 2]] * 2)
  close(single(TOKENS, segment_ids=segments.tolist())[0], single(TOKENS, POSITIONS, segment_ids=segments)[0])
  with pytest.raises(ValueError, match="attention_mask is float32, expected booleans"):
    single(TOKENS, None, None, causal.astype(float).tolist())


def test_sizes_may_be_symbols(single, plain):
  b, t = jax.export.symbolic_shape("b, t")
  exported = jax.export.export(jax.jit(lambda tokens: single(tokens)[0]))(
    jax.ShapeDtypeStruct((b, t), jnp.int32)
  )
  close(exported.call(TOKENS.astype(np.int32)), plain)


def test_calls_promote_no_rank_and_make_no_nan(model, plain):
  mask = np.tril(np.ones((1, T, T), bool))
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
    for call in (run, lambda model, *args: model(*args)):
      close(call(model, TOKENS)[0], plain)
      close(call(model, TOKENS, POSITIONS, None, mask)[0], plain)
      cache = model.init_cache(2, T)
      close(call(model, TOKENS, POSITIONS, cache)[0], plain)
    padded, positions = np.pad(TOKENS, ((0, 0), (2, 0))), np.arange(-2, T)[None].repeat(2, 0)
    close(run(model, padded, positions)[0][:, 2:], plain)
    grads = nnx.jit(nnx.grad(lambda model: mean_cross_entropy(model(TOKENS)[0], TOKENS)))(model)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_smallest_input_is_one(single):
  assert run(single, **single.get_model_input())[0].shape == (2, 1, V)
  assert single.num_embed == V


WINDOWS = (2, 2, None, 2, 2)


def test_each_layer_gets_the_mask_and_rope_of_its_window():
  model = make(None, Config(windows=WINDOWS))
  x, positions = model.embedder.encode(TOKENS), jnp.asarray(POSITIONS, jnp.int32)
  for layer, window in zip(model.layers, WINDOWS, strict=True):
    mask = visible_keys(positions, window=window)
    x, _ = layer(x, positions, rotary(H, 10.0 if window is None else 100.0), None, mask)
  close(run(model, TOKENS, POSITIONS)[0], np.asarray(model.embedder.decode(model.final_norm(x))))


def test_rings_of_some_layers_change_nothing(mesh):
  model = make(mesh, Config(windows=WINDOWS))
  expected, _ = run(model, TOKENS, POSITIONS)
  cache, found = model.init_cache(2, 9, ring=True), []
  for start, stop in ((0, 2), (2, 3), (3, 4)):
    logits, cache = run(model, TOKENS[:, start:stop], POSITIONS[:, start:stop], cache)
    found.append(np.asarray(logits))
  close(np.concatenate(found, axis=1), np.asarray(expected))
  assert [layer["k"].shape[-1] for layer in cache.values()] == [2, 2, 9, 2, 2]


class Doubled(nnx.Module):
  """Around a layer, of which it knows nothing."""

  def __init__(self, layer):
    self.layer = layer

  def __call__(self, *args):
    x, cache = self.layer(*args)
    return 2 * x, cache


@pytest.mark.parametrize("remat", [RematConfig.NONE, RematConfig.BLOCK, RematConfig.DECODER])
def test_a_layer_may_be_replaced_by_what_wraps_it(remat):
  model = make(None, Config(windows=(None, None), remat_config=remat))
  model.layers[0] = Doubled(model.layers[0])
  positions = jnp.asarray(POSITIONS, jnp.int32)
  mask, rope = visible_keys(positions), rotary(H, 10.0)
  x, _ = model.layers[0].layer(model.embedder.encode(TOKENS), positions, rope, None, mask)
  x, _ = model.layers[1](2 * x, positions, rope, None, mask)
  close(run(model, TOKENS, POSITIONS)[0], np.asarray(model.embedder.decode(model.final_norm(x))))
  grads = nnx.jit(nnx.grad(lambda model: model(TOKENS, POSITIONS)[0].std()))(model)
  assert np.abs(grads.layers[0].layer.q.w[...]).max() > 0


class TestMesh:
  def test_the_mesh_is_that_of_the_context_else_that_of_the_arrays(self, mesh, meshes):
    x = jax.device_put(np.zeros(4), NamedSharding(mesh, P()))
    other = meshes("auto", (4,), ("x",))
    assert find_mesh(1, None, np.zeros(2), {"a": [x]}) == mesh
    assert find_mesh(np.zeros(2), jnp.zeros(2)) is None
    with jax.set_mesh(other):
      assert find_mesh(x).axis_names == ("x",)
    seen = []
    jax.jit(lambda x: seen.append(find_mesh(x)) or x)(x)
    assert seen[0] == mesh.abstract_mesh

  def test_a_function_runs_where_all_axes_are_auto(self, mesh):
    x = jax.device_put(np.arange(8.0).reshape(2, 4), NamedSharding(mesh, P("fsdp", "tp")))
    seen = []

    def function(x, none, number):
      seen.append(jax.sharding.get_abstract_mesh().explicit_axes)
      assert none is None
      return shard(x @ x.T, P("fsdp", "pp")) * number

    out = call_auto(function, P("fsdp"), x, None, 2)
    np.testing.assert_array_equal(out, 2 * np.asarray(x) @ np.asarray(x).T)
    assert set(seen) == {()}
    assert call_auto(lambda x: x + 1, P(), 1) == 2

  def test_a_constraint_without_a_mesh_is_none(self):
    x = jnp.zeros((2, 4))
    assert shard(x, P("fsdp", "tp")) is x

  def test_the_spec_of_an_array_is_what_its_type_states(self, mesh):
    x = jax.device_put(np.zeros((2, 4)), NamedSharding(mesh, P("fsdp")))
    explicit = bool(mesh.abstract_mesh.explicit_axes)
    assert spec_of(x) == P("fsdp" if explicit else None, None)
    assert spec_of(jnp.zeros((2, 4))) == P(None, None)


def test_arguments_that_do_not_fit_are_named():
  model = make(None)
  with pytest.raises(TypeError, match="tokens are float32, expected integers"):
    model(TOKENS.astype(np.float32), POSITIONS)
  with pytest.raises(ValueError, match=r"segment_ids have shape \(2, 3\), expected \[B, T\]"):
    model(TOKENS, POSITIONS, segment_ids=np.zeros((2, 3), np.int32))
  with pytest.raises(CacheError, match="the cache has 3 rows, but tokens have 2"):
    model(TOKENS, POSITIONS, model.init_cache(3, 8))
  with pytest.raises(ValueError, match=r"cache_size is 8\.0, expected a positive whole number"):
    model.init_cache(2, 8.0)


@nnx.register_data_type
@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Replaced:
  """As qwix replaces a parameter: an object that is no variable."""

  value: nnx.Param

  def __getitem__(self, key):
    return self.value[key]


def test_a_library_may_put_its_own_object_in_the_place_of_the_embedding(model, plain):
  model.embedder.input_embedding = Replaced(model.embedder.input_embedding)
  close(model(TOKENS, POSITIONS)[0], plain)
  assert model.num_embed == V
  assert model.init_cache(2, 4)["layer_0"]["k"].dtype == jnp.float32


def test_types_know_all_keyword_arguments_of_a_call():
  taken = inspect.signature(CausalLM.__call__).parameters.values()
  assert set(CallOptions.__annotations__) == {one.name for one in taken if one.kind is one.KEYWORD_ONLY}
