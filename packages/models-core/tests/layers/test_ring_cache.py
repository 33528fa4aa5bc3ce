"""Rings: the newest tokens of a row, wherever padding lies and however the tokens come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models_core.errors import CacheError
from models_core.hlo import Program
from models_core.layers import cache as cache_lib
from models_core.layers.attention import attend
from models_core.layers.cache import extend_cache, init_layer
from models_core.layers.visibility import visible_keys

B, K, H, WINDOW, SIZE = 2, 1, 4, 4, 32
# Negative: padding, on the left, between chunks and in rows of different lengths.
POSITIONS = np.array(
  [
    [-1, -1, 0, 1, 2, 3, 4, 5, 6, -1, -1, -1, -1, -1, 7, 8, 9, 10, 11, 12],
    [0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7, 8, 9, 10, 11, -1, -1, 12, 13, -1],
  ],
  np.int32,
)
T = POSITIONS.shape[1]
Q, KEYS, VALUES = (np.random.default_rng(i).normal(size=(B, T, K, H)).astype(np.float32) for i in range(3))
CHUNKS = {
  "one pass": [T],
  "single tokens": [1] * T,
  "longer than the ring": [9, 11],
  "shorter than the ring": [3, 2, 3, 3, 3, 3, 3],
  "mixed": [1, 9, 1, 1, 6, 2],
}


def layer(window=None):
  return init_layer(B, SIZE, K, H, np.float32, mesh=None, spec=(None,) * 4, window=window)


def run(layer, chunks, mask=None):
  """Attention outputs [B, T, K, H] with a sliding window of WINDOW, and the layer at the end."""
  out, start = [], 0
  for stop in np.cumsum(chunks):
    cut = np.s_[:, start:stop]
    visible = visible_keys(POSITIONS[cut], layer, None if mask is None else mask[cut], window=WINDOW)
    layer, keys, values = extend_cache(layer, *(jnp.asarray(x[cut]) for x in (KEYS, VALUES, POSITIONS)))
    assert visible["key_slots"].shape == (B, keys.shape[1])
    out.append(attend(jnp.asarray(Q[cut]), keys, values, visible, scale=1.0))
    start = stop
  return np.concatenate(out, axis=1), layer


CAUSAL = np.tril(np.ones((T, T), bool)) & (POSITIONS >= 0)[:, None, :]
HOLES = CAUSAL & ~((np.arange(T)[:, None] - np.arange(T)) % 3 == 1)


@pytest.mark.parametrize("mask", [None, CAUSAL, HOLES], ids=["no mask", "causal mask", "mask with holes"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_a_ring_gives_the_numbers_of_a_whole_cache(chunks, mask):
  expected, whole = run(layer(), [T], mask)
  actual, ring = run(layer(WINDOW), chunks, mask)
  np.testing.assert_allclose(actual[POSITIONS >= 0], expected[POSITIONS >= 0], rtol=1e-5, atol=1e-6)
  assert ring["k"].shape == (B, K, H, WINDOW)
  np.testing.assert_array_equal(ring["end_index"], whole["end_index"])


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_a_ring_holds_the_newest_tokens_and_no_padding(chunks):
  _, ring = run(layer(WINDOW), chunks)
  for row in range(B):
    newest = np.flatnonzero(POSITIONS[row] >= 0)[-WINDOW:]
    order = np.argsort(ring["slots"][row])
    np.testing.assert_array_equal(ring["slots"][row][order], newest)
    np.testing.assert_array_equal(ring["positions"][row][order], POSITIONS[row, newest])
    np.testing.assert_array_equal(ring["k"][row][..., order], KEYS[row, newest].transpose(1, 2, 0))


def test_left_padding_may_have_positions_where_a_mask_hides_it():
  positions = np.maximum(POSITIONS[:1, :9], 0)
  mask = CAUSAL[:1, :9, :9]
  outs = []
  for window in (None, WINDOW):
    cache = init_layer(1, SIZE, K, H, np.float32, mesh=None, spec=(None,) * 4, window=window)
    out = []
    for cut in (np.s_[:, :5], np.s_[:, 5:9]):
      visible = visible_keys(positions[cut], cache, mask[cut], window=WINDOW)
      cache, keys, values = extend_cache(
        cache, jnp.asarray(KEYS[:1][cut]), jnp.asarray(VALUES[:1][cut]), positions[cut]
      )
      out.append(attend(jnp.asarray(Q[:1][cut]), keys, values, visible, scale=1.0))
    outs.append(np.concatenate(out, axis=1)[:, 2:])
  np.testing.assert_allclose(outs[1], outs[0], rtol=1e-5, atol=1e-6)


def test_a_window_as_long_as_the_cache_needs_no_ring():
  assert not cache_lib.is_ring(layer(SIZE))
  assert cache_lib.is_ring(layer(SIZE - 1))


def test_room_is_that_of_the_layers_that_keep_all():
  cache = {"layer_0": layer(WINDOW), "layer_1": layer()}
  cache_lib.check_room(cache, SIZE)
  with pytest.raises(CacheError, match=f"layer_1.*cache_size={SIZE + 1}"):
    cache_lib.check_room(cache, SIZE + 1)
  cache_lib.check_room({"layer_0": layer(WINDOW)}, SIZE + 1)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("told", [True, False], ids=["spec", "no spec"])
def test_writing_to_a_sharded_cache_sends_nothing_between_devices(meshes, window, new, told):
  mesh = meshes("auto", (2, 2), ("fsdp", "tp"))
  spec = PartitionSpec("fsdp", None, "tp", None)
  sharded = init_layer(4, SIZE, 2, H, np.float32, mesh=mesh, spec=PartitionSpec("fsdp", "tp"), window=window)
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec[: len(shape)]))
  )
  k, positions = struct((4, new, 2, H), np.float32), struct((4, new), np.int32)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    run = jax.jit(lambda *args: extend_cache(*args, spec if told else None)[0])
    compiled = run.lower(sharded, k, k, positions).compile()
  assert not Program(compiled.as_text()).collectives
  whole = init_layer(4, SIZE, 2, H, np.float32, mesh=None, spec=PartitionSpec(), window=window)
  keys = np.random.default_rng(0).normal(size=k.shape).astype(np.float32)
  at = np.tile(np.arange(new, dtype=np.int32), (4, 1))
  used = {"end_index": np.array([0, 7, SIZE - 1, SIZE], np.int32)}
  on = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec[: x.ndim])))
  actual = compiled(sharded | {"end_index": on(used["end_index"])}, on(keys), on(keys), on(at))
  expected, _, _ = extend_cache(whole | used, keys, keys, at)
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
