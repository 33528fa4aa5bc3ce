"""Layers against numpy in float64, written from the formulas."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from models_core import rope_scaling
from models_core.dtypes import common_dtype
from models_core.errors import CacheError
from models_core.layers import attention, rope, visibility
from models_core.layers import cache as cache_lib
from models_core.layers.linear import BiasedProjection, Embedder, Head, Projection
from models_core.layers.mlp import GatedMLP, gated, gelu_tanh
from models_core.layers.norm import OffsetRMSNorm, RMSNorm
from models_core.sharding import ShardingConfig

# One program for a call, not one for each operation.
attend = jax.jit(attention.attend, static_argnames=("scale", "soft_cap"))
visible_keys = jax.jit(
  lambda *args, window=None, **kwargs: visibility.dense_mask(
    visibility.visible_keys(*args, window=window, **kwargs)
  ),
  static_argnames="window",
)
rotate = jax.jit(rope.rotate, static_argnums=2)
extend_cache = jax.jit(cache_lib.extend_cache)


def call(function, x):
  return jax.jit(lambda x: function(x))(x)


def array(x, dtype="float32"):
  """An array whose cast numpy does."""
  return jnp.asarray(np.asarray(x).astype(jnp.dtype(dtype)))


def module(cls, *args, **values):
  """A module with these values."""
  made = nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0)))
  for name, value in values.items():
    getattr(made, name).set_value(value)
  return made


def close(actual, expected, tolerance=2e-6):
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance)


class TestRope:
  def reference(self, x, positions, frequencies):
    """Each pair (i, i + H/2) is a complex number that turns."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)

  @pytest.mark.parametrize(("head_dim", "theta"), [(2, 10_000.0), (8, 10_000.0), (64, 500_000.0), (6, 1e6)])
  def test_pairs_of_the_two_halves_turn_by_position_times_frequency(self, head_dim, theta, rng):
    x = rng.normal(size=(2, 5, 3, head_dim))
    positions = np.array([[0, 1, 2, 3, 4], [100, -3, 7, 7, 1000]])
    frequencies = np.array([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    close(rope.rotary(head_dim, theta).frequencies, frequencies, 1e-7)
    out = rotate(array(x), jnp.asarray(positions), rope.rotary(head_dim, theta))
    assert out.dtype == jnp.float32
    close(out, self.reference(x, positions, frequencies), 2e-4)

  def test_the_result_has_the_inputs_dtype_and_float32_angles(self, rng):
    x = rng.normal(size=(1, 3, 2, 8)).astype(ml_dtypes.bfloat16)
    positions = np.array([[0, 4097, 100_001]])  # No bfloat16 numbers.
    rotary = rope.rotary(8, 10_000.0)
    out = rotate(jnp.asarray(x), jnp.asarray(positions), rotary)
    assert out.dtype == jnp.bfloat16
    close(out, self.reference(x.astype(np.float64), positions, rotary.frequencies.astype(np.float64)), 0.02)

  @pytest.mark.parametrize("factor", [8.0, 32.0])
  @pytest.mark.parametrize("head_dim", [64, 128])
  def test_llama3_scaling_is_the_published_formula(self, factor, head_dim):
    low, high, length = 1.0, 4.0, 8192
    plain = [500_000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    expected, kinds = [], []
    for frequency in plain:
      wavelength = 2 * math.pi / frequency
      if wavelength < length / high:
        kinds.append("kept")
        expected.append(frequency)
      elif wavelength > length / low:
        kinds.append("stretched")
        expected.append(frequency / factor)
      else:
        kinds.append("between")
        smooth = (length / wavelength - low) / (high - low)
        expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    assert set(kinds) == {"kept", "between", "stretched"}
    scaling = rope_scaling.Llama3Scaling(factor, low, high, length)
    close(rope.rotary(head_dim, 500_000.0, scaling).frequencies, expected, 1e-7)

  def test_linear_scaling_divides_positions(self, rng):
    x = array(rng.normal(size=(1, 4, 1, 8)))
    plain = rope.rotary(8, 10_000.0)
    scaled = rope.rotary(8, 10_000.0, rope_scaling.LinearScaling(4.0))
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    close(rotate(x, positions * 4, scaled), np.asarray(rotate(x, positions, plain)), 1e-5)

  def test_frequency_factors_divide_one_by_one(self):
    factors = (1.0, 2.0, 4.0, 8.0)
    plain = rope.rotary(8, 10_000.0).frequencies
    close(
      rope.rotary(8, 10_000.0, rope_scaling.FrequencyFactors(factors)).frequencies,
      plain / np.array(factors),
      1e-7,
    )


# What transformers 5.24 gives for theta 321.5 and a head of 16.
PLAIN_RAMP = [1.0, 0.36447155, 0.11807957, 0.028691096, 0.013942784, 0.0067756642, 0.0032927161, 0.0016001351]
LONG_RAMP = [1.0, 0.45116317, 0.15581404, 0.044893105, 0.013942784, 0.0067756642, 0.0032927161, 0.0016001351]


@pytest.mark.parametrize(
  ("options", "frequencies", "magnitude"),
  [
    ({}, PLAIN_RAMP, 1.138629436111989),
    ({"attention_factor": 1.7}, PLAIN_RAMP, 1.7),
    (
      {"beta_fast": 3.0, "beta_slow": 0.4, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.2},
      LONG_RAMP,
      1.0674447524556663,
    ),
  ],
  ids=["defaults", "attention factor", "all else"],
)
def test_yarn(options, frequencies, magnitude):
  scaling = rope_scaling.YarnScaling(4.0, 32, **options)
  rotary = rope.rotary(16, 321.5, scaling)
  close(rotary.frequencies, frequencies, 1e-7)
  assert rotary.magnitude == pytest.approx(magnitude)
  x, positions = np.random.default_rng(0).normal(size=(1, 3, 1, 16)).astype(np.float32), np.arange(3)[None]
  plain = rotate(array(x), jnp.asarray(positions), rope.Rotary(rotary.frequencies, 1.0))
  close(rotate(array(x), jnp.asarray(positions), rotary), magnitude * np.asarray(plain), 1e-6)


def test_yarn_s_ramp_ends_within_the_head_s_dimension():
  """Beyond index 15 of a head of 16, where a small theta would put its end; there are 8 frequencies."""
  # `_compute_yarn_parameters` of transformers, worked out for theta 4: from index 2 to min(38, 16 - 1).
  expected = [1.0, 0.84089642, 0.70710678, 0.56029951, 0.44230769, 0.34767833, 0.27196415, 0.21154165]
  scaling = rope_scaling.YarnScaling(4.0, 4096, beta_fast=400.0, beta_slow=1.0)
  close(rope.rotary(16, 4.0, scaling).frequencies, expected, 1e-7)


def test_a_projection_with_a_bias(rng):
  x, w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 8), (20, 8), (20,)))
  made = module(BiasedProjection, 20, 8, P("tp", "fsdp"), P("tp"), w=array(w), b=array(b))
  close(call(made, array(x)), x @ w.T + b, 1e-6)
  half = module(BiasedProjection, 20, 8, P(), P(None), w=array(w, "bfloat16"), b=array(b, "bfloat16"))
  out = call(half, array(x, "bfloat16"))
  assert out.dtype == jnp.bfloat16
  close(out, x @ w.T + b, 0.03)


class TestAttend:
  def reference(self, q, k, v, mask, scale, soft_cap):
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    for b in range(B):
      for n in range(N):
        group = n // (N // k.shape[2])
        for t in range(T):
          seen = np.flatnonzero(mask[b, t])
          logits = np.array([q[b, t, n] @ k[b, s, group] * scale for s in seen])
          if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
          weights = np.exp(logits - logits.max())
          out[b, t, n] = (weights / weights.sum()) @ v[b, seen, group]
    return out

  @pytest.mark.parametrize(
    ("heads", "kv_heads", "soft_cap"), [(4, 4, None), (4, 2, 0.7), (6, 2, None), (4, 1, 0.7), (1, 1, None)]
  )
  def test_grouped_attention_is_softmax_over_the_keys_that_are_seen(self, heads, kv_heads, soft_cap, rng):
    q, k, v = (rng.normal(size=(2, n, h, 8)) for n, h in ((3, heads), (5, kv_heads), (5, kv_heads)))
    mask = rng.random((2, 3, 5)) < 0.6
    mask[:, :, 1] = True
    out = attend(*map(array, (q, k, v)), jnp.asarray(mask), scale=0.31, soft_cap=soft_cap)
    assert out.shape == (2, 3, heads, 8)
    close(out, self.reference(q, k, v, mask, 0.31, soft_cap))

  def test_logits_are_float32_whatever_the_inputs_dtype(self):
    # In bfloat16 both logits would be 256.
    q = jnp.full((1, 1, 1, 2), 16.0, jnp.bfloat16)
    k = jnp.asarray([[[[16.0, 0.0]], [[16.0, 0.03125]]]], jnp.bfloat16)
    v = jnp.asarray([[[[0.0, 0.0]], [[1.0, 1.0]]]], jnp.bfloat16)
    out = attend(q, k, v, jnp.ones((1, 1, 2), bool), scale=1.0)
    assert out.dtype == jnp.bfloat16
    close(out, np.full((1, 1, 1, 2), 1 / (1 + math.exp(-0.5))), 0.005)

  def test_a_cache_of_another_dtype_is_used_in_the_queries(self, rng):
    q = array(rng.normal(size=(1, 2, 2, 4)))
    k, v = (array(rng.normal(size=(1, 3, 2, 4)), "bfloat16") for _ in range(2))
    out = attend(q, k, v, jnp.ones((1, 2, 3), bool), scale=0.5)
    assert out.dtype == jnp.float32
    wide = (np.asarray(x, np.float64) for x in (q, k, v))
    close(out, self.reference(*wide, np.ones((1, 2, 3), bool), 0.5, None))

  def test_a_query_that_sees_nothing_is_finite(self, rng):
    q, k, v = (array(rng.normal(size=(1, 3, 2, 4))) for _ in range(3))
    out = attend(q, k, v, jnp.zeros((1, 3, 3), bool), scale=0.5)
    close(out, np.broadcast_to(np.asarray(v, np.float64).mean(1, keepdims=True), (1, 3, 2, 4)))

  def test_gradients_of_masked_keys_are_zero(self, rng):
    q, k, v = (array(rng.normal(size=(1, 3, 2, 4))) for _ in range(3))
    mask = jnp.asarray(np.tril(np.ones((1, 3, 3), bool)))
    grads = jax.jit(jax.grad(lambda k, v: attend(q, k, v, mask, scale=0.5)[:, :2].sum(), argnums=(0, 1)))(
      k, v
    )
    for grad in grads:
      assert not np.asarray(grad)[:, 2].any()
      assert np.asarray(grad)[:, :2].any()


def empty(batch, size, positions=True, kv_heads=1, head_dim=2, dtype=jnp.float32):
  layer = cache_lib.init_layer(
    batch, size, kv_heads, head_dim, dtype, mesh=None, spec=P("fsdp", None, "tp", None)
  )
  return layer if positions else {name: array for name, array in layer.items() if name != "positions"}


def sees(positions, key_positions=None, window=None, segments=None):
  """By the words of the rule, key by key: written no later, at no later position, no padding."""
  rows = []
  for b, row in enumerate(positions):
    rows.append(
      [
        [
          s <= t
          and row[s] <= row[t]
          and row[s] >= 0
          and (window is None or row[s] > row[t] - window)
          and (segments is None or segments[b][s] == segments[b][t])
          for s in range(len(row))
        ]
        for t in range(len(row))
      ]
    )
  return np.array(rows)


class TestVisibleKeys:
  POSITIONS = (
    ((0, 1, 2, 3), (0, 1, 2, 3)),
    ((-1, -1, 0, 1), (0, 1, -1, -1)),
    ((5, 6, 7, 8), (0, 1, 0, 1)),
  )

  @pytest.mark.parametrize("positions", POSITIONS, ids=range(3))
  @pytest.mark.parametrize("window", [None, 1, 2, 100])
  def test_without_a_mask_attention_is_causal_by_slot_and_position(self, positions, window):
    found = visible_keys(jnp.asarray(positions, jnp.int32), window=window)
    np.testing.assert_array_equal(found, sees(positions, window=window))

  def test_segments_do_not_see_each_other(self):
    positions = [[0, 1, 2, 0, 1, 0]]
    segments = [[1, 1, 1, 2, 2, 3]]
    found = visible_keys(jnp.asarray(positions), segment_ids=jnp.asarray(segments))
    np.testing.assert_array_equal(found, sees(positions, segments=segments))
    blocks = [np.tril(np.ones((n, n), bool)) for n in (3, 2, 1)]
    expected = np.zeros((6, 6), bool)
    for start, block in zip((0, 3, 5), blocks, strict=True):
      expected[start : start + len(block), start : start + len(block)] = block
    np.testing.assert_array_equal(found[0], expected)

  def test_segments_and_a_window_and_a_mask_all_count(self, rng):
    mask = rng.random((2, 5, 5)) < 0.7
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]])
    positions = np.array([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    found = visible_keys(jnp.asarray(positions), None, jnp.asarray(mask), jnp.asarray(segments), window=2)
    near = positions[:, None, :] > positions[:, :, None] - 2
    np.testing.assert_array_equal(found, mask & near & (segments[:, :, None] == segments[:, None, :]))

  @pytest.mark.parametrize("chunks", [(6,), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)])
  @pytest.mark.parametrize(("size", "window"), [(6, None), (9, 3)])
  def test_chunks_with_a_cache_see_what_the_whole_sees(self, chunks, window, size):
    positions = np.array([[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3], [0, 1, 2, -1, -1, -1]], np.int32)
    whole = sees(positions, window=window)
    layer, start = empty(3, size), 0
    for chunk in chunks:
      part = jnp.asarray(positions[:, start : start + chunk])
      found = np.asarray(visible_keys(part, layer, window=window))
      np.testing.assert_array_equal(found[:, :, :6], whole[:, start : start + chunk])
      assert not found[:, :, 6:].any()
      kv = jnp.zeros((3, chunk, 1, 2))
      layer, _, _ = extend_cache(layer, kv, kv, part)
      start += chunk

  def test_a_cache_without_positions_counts_slots(self):
    layer = empty(1, 5, positions=False)
    kv = jnp.zeros((1, 2, 1, 2))
    layer, _, _ = extend_cache(layer, kv, kv, jnp.asarray([[7, 8]], jnp.int32))
    assert "positions" not in layer
    found = visible_keys(jnp.asarray([[9, 10]], jnp.int32), layer, window=3)
    np.testing.assert_array_equal(found[0], [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])

  def test_a_mask_is_whole_and_a_short_one_is_padded_with_false(self, rng):
    layer = empty(2, 6)
    positions = jnp.asarray([[0, 1, 2]] * 2, jnp.int32)
    mask = rng.random((2, 3, 3)) < 0.5
    found = visible_keys(positions, layer, jnp.asarray(mask))
    np.testing.assert_array_equal(found[:, :, :3], mask)
    assert not found[:, :, 3:].any()
    # Slots that nothing was written to stay unseen whatever the mask says.
    everything = visible_keys(positions, layer, jnp.ones((2, 3, 6), bool))
    np.testing.assert_array_equal(everything, np.broadcast_to(np.arange(6) < 3, (2, 3, 6)))

  @pytest.mark.parametrize("shape", [(1, 3, 3), (2, 1, 3), (1, 1, 3), (1, 1, 2)])
  def test_a_mask_may_be_broadcast(self, shape, rng):
    mask = rng.random(shape) < 0.5
    found = visible_keys(jnp.zeros((2, 3), jnp.int32), mask=jnp.asarray(mask))
    padded = np.pad(mask, ((0, 0), (0, 0), (0, 3 - shape[2])))
    np.testing.assert_array_equal(found, np.broadcast_to(padded, (2, 3, 3)))

  def test_integers_are_masks_and_floats_are_not(self):
    positions = jnp.zeros((1, 2), jnp.int32)
    mask = jnp.asarray([[[1, 0], [0, 1]]], jnp.int32)
    np.testing.assert_array_equal(visible_keys(positions, mask=mask), np.eye(2, dtype=bool)[None])
    with pytest.raises(ValueError, match="float32, expected booleans"):
      visible_keys(positions, mask=jnp.where(mask == 1, 0.0, -jnp.inf))

  @pytest.mark.parametrize(
    ("shape", "message"),
    [
      ((2, 3), "make_causal_attn_mask makes one"),
      ((3, 3, 3), r"expected \[B=2, T=3 or 1, S<=3\]"),
      ((2, 2, 3), "expected"),
      ((2, 3, 4), "expected"),
      ((2, 1, 3, 3), "expected"),
    ],
  )
  def test_a_mask_of_another_shape_is_an_error(self, shape, message):
    with pytest.raises(ValueError, match=message):
      visible_keys(jnp.zeros((2, 3), jnp.int32), mask=jnp.ones(shape, bool))

  def test_segments_with_a_cache_are_an_error(self):
    positions = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="cache=None"):
      visible_keys(positions, empty(1, 4), segment_ids=positions)

  def test_a_causal_mask_is_made_from_a_padding_mask(self):
    padding = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0]])
    expected = [[[s <= t and bool(row[s]) for s in range(3)] for t in range(3)] for row in padding]
    np.testing.assert_array_equal(visibility.make_causal_attn_mask(jnp.asarray(padding)), expected)


class TestCache:
  def test_an_empty_cache_has_no_key(self):
    layer = empty(2, 4, kv_heads=3, head_dim=8, dtype=jnp.bfloat16)
    shapes = {name: (array.shape, array.dtype.name) for name, array in layer.items()}
    assert shapes == {
      "k": ((2, 3, 8, 4), "bfloat16"),
      "v": ((2, 3, 8, 4), "bfloat16"),
      "end_index": ((2,), "int32"),
      "positions": ((2, 4), "int32"),
    }
    assert (np.asarray(layer["positions"]) < 0).all()
    assert not np.asarray(layer["end_index"]).any()

  def test_slots_fill_from_the_left_row_by_row(self, rng):
    layer = empty(2, 5) | {"end_index": jnp.asarray([0, 2], jnp.int32)}
    k, v = (rng.normal(size=(2, 3, 1, 2)).astype(np.float32) for _ in range(2))
    positions = np.array([[4, 5, 6], [0, 1, 2]], np.int32)
    new, keys, values = extend_cache(layer, jnp.asarray(k), jnp.asarray(v), jnp.asarray(positions))
    np.testing.assert_array_equal(keys, new["k"].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(values, new["v"].transpose(0, 3, 1, 2))
    for name, value in (
      ("k", k.transpose(0, 2, 3, 1)),
      ("v", v.transpose(0, 2, 3, 1)),
      ("positions", positions),
    ):
      np.testing.assert_array_equal(new[name][0, ..., :3], value[0])
      np.testing.assert_array_equal(new[name][1, ..., 2:], value[1])
      np.testing.assert_array_equal(new[name][0, ..., 3:], layer[name][0, ..., 3:])
      np.testing.assert_array_equal(new[name][1, ..., :2], layer[name][1, ..., :2])
    np.testing.assert_array_equal(new["end_index"], [3, 5])
    assert layer["k"].sum() == 0

  def test_what_finds_no_room_is_dropped_never_wrapped(self):
    layer = empty(1, 2)
    for start in (0, 1, 5):
      kv = jnp.full((1, 3, 1, 2), start + 1.0)
      full = layer | {"end_index": jnp.asarray([start])}
      new, _, _ = extend_cache(full, kv, kv, jnp.zeros((1, 3), jnp.int32))
      written = np.asarray(new["k"])[0, 0, 0] != 0
      np.testing.assert_array_equal(written, [start == 0, start <= 1])

  def test_keys_take_the_caches_dtype(self):
    layer = empty(1, 2, dtype=jnp.bfloat16)
    kv = jnp.full((1, 1, 1, 2), 1.001)
    assert extend_cache(layer, kv, kv, jnp.zeros((1, 1), jnp.int32))[0]["k"].dtype == jnp.bfloat16

  def test_without_a_cache_tokens_attend_to_their_own_keys(self):
    k, v = jnp.zeros((1, 2, 1, 2)), jnp.ones((1, 2, 1, 2))
    assert cache_lib.extend_cache(None, k, v, jnp.zeros((1, 2), jnp.int32)) == (None, k, v)

  def test_no_room_is_an_error_that_names_the_row_and_the_remedy(self):
    cache = {"layer_0": empty(2, 4) | {"end_index": jnp.asarray([1, 3])}}
    cache_lib.check_room(cache, 1)
    with pytest.raises(CacheError, match=r"2 more tokens do not fit.*4 slots.*row 1 uses 3.*cache_size=5"):
      cache_lib.check_room(cache, 2)
    with pytest.raises(CacheError, match="5 more tokens"):
      jax.jit(lambda cache: cache_lib.check_room(cache, 5))(cache)
    jax.jit(lambda cache: cache_lib.check_room(cache, 4))(cache)
    cache_lib.check_room({}, 5)

  @pytest.mark.parametrize(
    ("kv_heads", "batch", "spec"),
    [(2, 2, P("fsdp", "tp", None, None)), (3, 2, P("fsdp")), (2, 1, P(None, "tp"))],
  )
  @pytest.mark.parametrize("under", ["eager", "jit"])
  def test_a_cache_lies_where_its_axes_divide(self, kv_heads, batch, spec, under, mesh):
    def make(like):
      where = mesh if under == "eager" else jax.typeof(like).sharding.mesh
      return cache_lib.init_layer(
        batch, 4, kv_heads, 8, jnp.float32, mesh=where, spec=P("fsdp", "tp", None, None)
      ), +like

    like = jax.device_put(np.zeros(4, np.float32), jax.sharding.NamedSharding(mesh, P()))
    layer, _ = (jax.jit(make) if under == "jit" else make)(like)
    assert layer["k"].sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), 4)
    assert layer["end_index"].sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, P(*spec[:1])), 1)


class TestModules:
  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
  def test_a_norm_is_computed_in_float32_and_returned_as_it_came(self, dtype, rng):
    norm = module(RMSNorm, 6, 0.01, P("tp"), w=array(rng.normal(size=6), jnp.bfloat16))
    x = array(rng.normal(size=(2, 3, 6)) * 100, dtype)
    out = call(norm, x)
    assert out.dtype == dtype
    wide, w = np.asarray(x, np.float64), np.asarray(norm.w[...], np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.01) * w
    close(out, expected, {4: 1e-6, 2: 0.01}[out.dtype.itemsize])

  def test_squares_of_large_float16_numbers_do_not_overflow(self):
    norm = RMSNorm(4, 1e-6, P(), rngs=nnx.Rngs(0))
    out = call(norm, array(np.full((1, 4), 60_000.0), "float16"))
    np.testing.assert_array_equal(out, np.ones((1, 4)))

  @pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")], ids=str
  )
  def test_a_projection_is_its_product_in_the_inputs_dtype(self, dtypes, rng):
    layer = module(Projection, 7, 4, P(), w=array(rng.normal(size=(7, 4)), dtypes[1]))
    value = array(rng.normal(size=(2, 3, 4)), dtypes[0])
    out = call(layer, value)
    assert out.dtype == value.dtype
    expected = np.asarray(value, np.float64) @ np.asarray(layer.w[...], np.float64).T
    close(out, expected, 1e-5 if dtypes[0] == "float32" else 0.02)

  def test_the_product_is_computed_in_the_wider_type(self):
    layer = module(Projection, 1, 2, P(), w=array([[1.0, -1.001]]))
    # In bfloat16 the weight would be -1 and the result zero.
    assert np.asarray(call(layer, array(np.ones((1, 1, 2)), "bfloat16"))).item() != 0

  def test_a_token_outside_of_the_vocabulary_gives_nan(self, rng):
    table = rng.normal(size=(5, 3)).astype(np.float32)
    embedder = module(Embedder, 5, 3, P(), input_embedding=array(table))
    out = np.asarray(embedder.encode(jnp.asarray([[0, 4, 5, -1, -100, 2**30]])))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[False, False, True, True, True, True]])
    np.testing.assert_array_equal(out[0, :2], table[[0, 4]])

  @pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str
  )
  def test_heads_give_float32_logits(self, dtypes, rng):
    x = array(rng.normal(size=(2, 3, 4)), dtypes[0])
    w = array(rng.normal(size=(5, 4)), dtypes[1])
    head, embedder = module(Head, 5, 4, P(), w=w), module(Embedder, 5, 4, P(), input_embedding=w)
    assert head.in_features == 4
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    for out in (call(head, x), call(embedder.decode, x)):
      assert out.dtype == jnp.float32
      close(out, expected, 1e-5)

  def test_a_gated_block_is_its_formula(self, rng):
    mlp = module(GatedMLP, 4, 6, jax.nn.silu, ShardingConfig.get_default_sharding())
    x, gate, up, down = (rng.normal(size=shape) for shape in ((2, 3, 4), (6, 4), (6, 4), (4, 6)))
    for name, w in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
      assert getattr(mlp, name).w.shape == w.shape
      getattr(mlp, name).w.set_value(array(w))
    z = x @ gate.T
    close(call(mlp, array(x)), (z / (1 + np.exp(-z)) * (x @ up.T)) @ down.T)

  def test_a_gated_block_rounds_once_between_its_products(self, rng):
    mlp = module(GatedMLP, 64, 64, jax.nn.silu, ShardingConfig.get_default_sharding())
    for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
      projection.w.set_value(array(np.eye(64), "bfloat16"))
    x = array(rng.normal(size=(1, 9, 64)), "bfloat16")
    exact = np.asarray(x, np.float64)
    once = (exact / (1 + np.exp(-exact)) * exact).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(mlp(x), once)
    assert np.any(np.asarray(jax.nn.silu(x) * x) != once)

  def test_a_norm_that_is_added_to_a_sum_rounds_once(self, rng):
    norm = module(OffsetRMSNorm, 64, 1e-3, P(), w=array(rng.normal(size=64)))
    x, y = (array(rng.normal(size=(1, 9, 64)), "bfloat16") for _ in range(2))
    exact = np.asarray(y, np.float64)
    exact = (
      exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-3) * (1 + np.asarray(norm.w, np.float64))
    )
    once = (np.asarray(x, np.float64) + exact).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(norm.add_to(x, y), once)
    assert np.any(np.asarray(x + norm(y)) != once)


def kept(f, *args):
  """Dtypes and shapes of the arrays that the gradient of f keeps, in bfloat16 and float32."""
  arrays = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))
  return sorted((array.dtype.name, array.shape) for array in arrays)


class TestWhatAGradientKeeps:
  """Arguments alone, as they are: float32 between them is computed again."""

  def test_of_a_gated_product(self):
    gate = up = array(np.ones((2, 3, 8)), "bfloat16")
    assert kept(lambda gate, up: gated(gate, up, gelu_tanh), gate, up) == [("bfloat16", (2, 3, 8))] * 2

  @pytest.mark.parametrize("norm_class", [RMSNorm, OffsetRMSNorm])
  def test_of_a_norm(self, norm_class):
    norm = module(norm_class, 8, 1e-3, P(), w=array(np.ones(8)))
    x = array(np.ones((2, 3, 8)), "bfloat16")
    assert kept(norm, x) == [("bfloat16", (2, 3, 8)), ("float32", (8,))]
    if norm_class is OffsetRMSNorm:
      assert kept(norm.add_to, x, x) == [("bfloat16", (2, 3, 8)), ("float32", (8,))]

  @pytest.mark.parametrize("soft_cap", [None, 5.0])
  def test_of_attention(self, soft_cap):
    q, k = (array(np.ones((2, 3, heads, 4)), "bfloat16") for heads in (6, 2))
    mask = jnp.ones((2, 3, 3), bool)
    found = kept(lambda q, k, v: attention.attend(q, k, v, mask, scale=0.5, soft_cap=soft_cap), q, k, k)
    # Neither products nor weights [B, K, N // K, T, S].
    assert [one for one in found if one[1][-2:] == (3, 3)] == [("bool", (2, 3, 3))]


@pytest.mark.parametrize(
  ("a", "b", "common"),
  [
    ("float32", "float32", "float32"),
    ("bfloat16", "float32", "float32"),
    ("bfloat16", "float16", "float32"),
    ("float8_e4m3fn", "bfloat16", "bfloat16"),
    ("float8_e4m3fn", "float8_e5m2", "float32"),
    ("int8", "bfloat16", "bfloat16"),
    ("int32", "float16", "float16"),
    ("int8", "float8_e5m2", "float8_e5m2"),
  ],
)
def test_the_common_dtype_holds_both_floats(a, b, common):
  assert (
    common_dtype(jnp.dtype(a), jnp.dtype(b)) == common_dtype(jnp.dtype(b), jnp.dtype(a)) == jnp.dtype(common)
  )
