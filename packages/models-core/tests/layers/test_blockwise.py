"""Attention block by block, against the same attention computed at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models_core.layers import blockwise
from models_core.layers.attention import attend
from models_core.layers.blockwise import block_sizes
from models_core.layers.cache import extend_cache, init_layer
from models_core.layers.visibility import block_ranges, dense_mask, visible_keys

B, T, N, K, H = 2, 456, 4, 2, 16
RNG = np.random.default_rng(0)
Q, OUT = (RNG.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(2))
KEYS, VALUES = (RNG.normal(size=(B, T, K, H)).astype(np.float32) for _ in range(2))
STRAIGHT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
# Padding of different lengths on the left; three sequences in each row; positions in any order.
LEFT = np.maximum(STRAIGHT - np.array([[13], [70]]), -1).astype(np.int32)
LENGTHS = [50, 20, 386], [128, 256, 72]
SEGMENTS = np.stack([np.repeat([0, 1, 2], lengths) for lengths in LENGTHS])
PACKED = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in LENGTHS])
SHUFFLED = np.stack([RNG.permutation(T) for _ in range(B)]).astype(np.int32)
MASK = RNG.random((B, T, T)) < 0.3
MASK[0, 5] = MASK[1, 150] = False  # queries that see no key
CASES = {
  "causal": (STRAIGHT, None, None),
  "left padding": (LEFT, None, None),
  "packed": (PACKED.astype(np.int32), None, SEGMENTS),
  "any order": (SHUFFLED, None, None),
  "mask": (STRAIGHT, MASK, None),
  "mask of a block and a part": (STRAIGHT, MASK.astype(np.int32), None),
  "mask of keys": (LEFT, RNG.random((1, 1, T - 30)) < 0.5, None),
}

# Half precision differs in how numbers are rounded, whatever is visible.
HALF = ("left padding", "mask")


def close(ours, expected, bound: float) -> None:
  ours, expected = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
  assert np.abs(ours - expected).max() <= bound * np.abs(expected).max()


@pytest.fixture
def small_blocks(monkeypatch) -> None:
  """Several blocks of 64 queries and of 128 keys in sequences that would be one block."""
  monkeypatch.setattr(blockwise, "block_sizes", lambda *args: (64, 128))


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (40, 2.0), (300, None)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_blocks")
def test_results_and_gradients_are_those_of_attention_at_once(case, window, soft_cap) -> None:
  positions, mask, segments = (None if x is None else jnp.asarray(x) for x in CASES[case])

  def run(dtype, implementation="blockwise"):
    def weighted(q, k, v):
      visible = visible_keys(positions, None, mask, segments, window)
      out = attend(q, k, v, visible, scale=0.3, soft_cap=soft_cap, implementation=implementation)
      return jnp.sum(out.astype("float32") * OUT), out

    arrays = [jnp.asarray(x, dtype) for x in (Q, KEYS, VALUES)]
    (_, out), grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, *grads

  exact = run("float32", "dense")
  for ours, expected in zip(run("float32"), exact, strict=True):
    close(ours, expected, 2e-6)
  if case not in HALF:
    return
  # Half precision rounds the inputs in both; what the blocks add to it is smaller.
  for ours, rounded, expected in zip(run("bfloat16"), run("bfloat16", "dense"), exact, strict=True):
    error = np.abs(np.asarray(ours, np.float32) - expected).mean()
    assert error <= 1.5 * np.abs(np.asarray(rounded, np.float32) - expected).mean()


@pytest.mark.parametrize("ring", [False, True], ids=["all slots", "ring"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.usefixtures("small_blocks")
def test_chunks_in_a_cache(ring: bool, masked: bool) -> None:
  window = 90 if ring else None
  mask = jnp.asarray(MASK if masked else np.ones((B, T, T), bool)) if masked else None

  def run(implementation):
    layer = init_layer(B, 480, K, H, "float32", mesh=None, spec=jax.sharding.PartitionSpec(), window=window)
    out = []
    for cut in (slice(0, 200), slice(200, 201), slice(201, T)):
      positions = jnp.asarray(LEFT[:, cut])
      visible = visible_keys(positions, layer, None if mask is None else mask[:, cut], window=window)
      layer, k, v = extend_cache(layer, jnp.asarray(KEYS[:, cut]), jnp.asarray(VALUES[:, cut]), positions)
      out.append(attend(jnp.asarray(Q[:, cut]), k, v, visible, scale=0.3, implementation=implementation))
    return jnp.concatenate(out, axis=1)

  close(run("blockwise"), run("dense"), 2e-6)


def summed(q, k, v):
  return jnp.sum(attend(q, k, v, visible_keys(jnp.asarray(LEFT)), scale=0.3))


def gradients(*arrays):
  return jax.jit(jax.grad(summed, argnums=(0, 1, 2)))(*map(jnp.asarray, arrays))


@pytest.mark.parametrize(
  "option",
  [jax.numpy_rank_promotion("raise"), jax.enable_x64(True), jax.debug_nans(True)],
  ids=["ranks", "x64", "NaN"],
)
def test_options_of_jax(option) -> None:
  expected = gradients(Q, KEYS, VALUES)
  with option:
    found = gradients(Q, KEYS, VALUES)
  for ours, theirs in zip(found, expected, strict=True):
    close(ours, theirs, 2e-6)


def test_inside_shard_map_and_on_explicit_axes() -> None:
  expected = gradients(Q, KEYS, VALUES)
  P = jax.sharding.PartitionSpec

  def of_shard(positions, *arrays):
    visible = visible_keys(positions)
    run = lambda q, k, v: attend(q, k, v, visible, scale=0.3)
    return jax.vjp(run, *arrays)[1](jnp.ones_like(arrays[0]))

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
  mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=(P("d"),) * 4, out_specs=(P("d"),) * 3)
  explicit = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
  sharding = jax.sharding.NamedSharding(explicit, P(None, None, "d"))
  found = [
    jax.jit(mapped)(jnp.asarray(LEFT), Q, KEYS, VALUES),
    gradients(*(jax.device_put(x, sharding) for x in (Q, KEYS, VALUES))),
  ]
  for ours in found:
    for one, theirs in zip(ours, expected, strict=True):
      close(one, theirs, 2e-6)


@pytest.mark.parametrize("divided", [("d",), (None, "d")], ids=["rows", "sequence"])
def test_positions_and_segments_on_explicit_axes(divided) -> None:
  explicit = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
  spec = jax.sharding.PartitionSpec(*divided)
  put = lambda x: jax.device_put(x, jax.sharding.NamedSharding(explicit, spec))
  positions = np.tile(np.arange(512, dtype=np.int32), (2, 1))
  q = np.random.default_rng(1).normal(size=(2, 512, 2, 8)).astype(np.float32)

  @jax.jit
  def run(q, positions):
    visible = visible_keys(positions, segment_ids=positions // 200)
    return attend(q, q, q, visible, scale=0.3, spec=spec)

  with jax.set_mesh(explicit):
    found = run(put(q), put(positions))
  close(found, run(q, positions), 2e-6)


@pytest.mark.parametrize("implementation", ["blockwise", "dense"])
@pytest.mark.parametrize("array", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.usefixtures("small_blocks")
def test_nan_is_never_hidden(array, implementation) -> None:
  arrays = [jnp.asarray(x) for x in (Q, KEYS, VALUES)]
  arrays[array] = arrays[array].at[0, 100, 0, 0].set(jnp.nan)
  run = lambda *arrays: attend(
    *arrays, visible_keys(jnp.asarray(STRAIGHT)), scale=0.3, implementation=implementation
  )
  is_nan = np.isnan(np.asarray(run(*arrays))).any(axis=-1)  # [B, T, N]
  expected = np.zeros((B, T, N), bool)
  if array == 0:
    expected[0, 100, 0] = True
  else:
    expected[0, 100:, : N // K] = True
  assert (is_nan >= expected).all()
  assert not is_nan[1].any()
  assert not is_nan[:, :, N // K :].any()


def test_segments_are_integers_of_the_shape_of_positions() -> None:
  positions = jnp.asarray(STRAIGHT)
  with pytest.raises(TypeError, match=r"segment_ids are float32, expected integers .*astype\(int\)"):
    visible_keys(positions, segment_ids=jnp.zeros((B, T)))
  with pytest.raises(ValueError, match=r"segment_ids have shape \(456,\), expected \[B, T\]"):
    visible_keys(positions, segment_ids=jnp.zeros(T, jnp.int32))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "uint32", "int32"])
@pytest.mark.usefixtures("small_blocks")
def test_segments_of_any_integers(dtype) -> None:
  q, k, v, positions = (jnp.asarray(x) for x in (Q, KEYS, VALUES, PACKED))
  segments = jnp.asarray(SEGMENTS != 1 if dtype == "bool" else SEGMENTS).astype(dtype)
  if dtype in ("uint32", "int32"):
    segments = segments - 1  # also the greatest number, and negative ones
  visible = visible_keys(positions, segment_ids=segments)
  run = lambda kind: attend(q, k, v, visible, scale=0.3, implementation=kind)
  close(run("blockwise"), run("dense"), 2e-6)


def test_blocks_that_no_query_sees_are_skipped() -> None:
  positions = jnp.asarray(np.tile(np.arange(1024, dtype=np.int32), (1, 1)))
  first, end = block_ranges(visible_keys(positions), 256, 128)
  np.testing.assert_array_equal([first, end], [[0, 0, 0, 0], [2, 4, 6, 8]])
  first, end = block_ranges(visible_keys(positions, window=100), 256, 128)
  np.testing.assert_array_equal([first, end], [[0, 1, 3, 5], [2, 4, 6, 8]])
  first, end = block_ranges(visible_keys(positions - 600), 256, 128)
  np.testing.assert_array_equal([first, end], [[0, 0, 4, 4], [0, 0, 6, 8]])
  empty = init_layer(1, 4096, 1, 1, "float32", mesh=None, spec=jax.sharding.PartitionSpec())
  first, end = block_ranges(visible_keys(positions, empty), 256, 128)
  np.testing.assert_array_equal([first, end], [[0, 0, 0, 0], [2, 4, 6, 8]])


@pytest.mark.parametrize("window", [None, 30, 300])
@pytest.mark.parametrize("case", [name for name in CASES if "mask" not in name])
def test_no_key_outside_the_ranges_is_seen(case, window) -> None:
  positions, _, segments = (None if x is None else jnp.asarray(x) for x in CASES[case])
  visible = visible_keys(positions, None, None, segments, window)
  seen = np.asarray(dense_mask(visible))
  first, end = np.asarray(block_ranges(visible, 64, 128))
  blocks = np.arange(T) // 128
  for i in range(-(-T // 64)):
    visited = (blocks >= first[i]) & (blocks < end[i])
    assert not seen[:, 64 * i : 64 * (i + 1), ~visited].any()


def test_packed_sequences_visit_their_own_keys_alone() -> None:
  positions = jnp.arange(1024, dtype=jnp.int32)[None]
  first, end = block_ranges(visible_keys(positions % 256, segment_ids=positions // 256), 256, 128)
  np.testing.assert_array_equal([first, end], [[0, 2, 4, 6], [2, 4, 6, 8]])
  # Rows skip by their own segments, whose numbers overlap with those of other rows.
  rows = jnp.concatenate([positions // 256, 1 + positions // 512])
  first, end = block_ranges(visible_keys(jnp.tile(positions, (2, 1)), segment_ids=rows), 256, 128)
  np.testing.assert_array_equal([first, end], [[0, 0, 4, 4], [2, 4, 6, 8]])


def test_temporaries_grow_linearly() -> None:
  def temporaries(T: int, gradient: bool) -> int:
    q, k = (jax.ShapeDtypeStruct((1, T, n, 64), jnp.float32) for n in (8, 2))
    run = lambda q, k, v: jnp.sum(attend(q, k, v, visible_keys(jnp.arange(T)[None], window=4096), scale=0.1))
    run = jax.grad(run, argnums=(0, 1, 2)) if gradient else run
    return jax.jit(run).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

  for gradient in (False, True):
    small, large = (temporaries(T, gradient) for T in (4096, 16384))
    assert large <= 4.2 * small
    # Queries, keys and values take 8 + 2 + 2 heads.
    assert large <= (4 if gradient else 3) * 16384 * 12 * 64 * 4


@pytest.mark.parametrize("dtype", [bool, jnp.int32], ids=["bool", "int"])
def test_a_mask_is_cut_block_by_block_and_never_copied(dtype) -> None:
  T = 4104  # no multiple of a block

  def temporaries(mask) -> int:
    q, k = (jax.ShapeDtypeStruct((1, T, n, 16), jnp.float32) for n in (2, 1))
    run = lambda q, k, v, mask: attend(q, k, v, visible_keys(jnp.arange(T)[None], mask=mask), scale=0.1)
    return jax.jit(run).lower(q, k, k, mask).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(jax.ShapeDtypeStruct((1, T, T), dtype)) <= temporaries(None) + T * T / 4


def test_blocks_stay_in_the_caches_of_a_cpu() -> None:
  for rows in (1, 14, 32, 256):
    for T in (64, 128, 512, 100_000):
      queries, keys = block_sizes(rows, T, T, "cpu")
      assert queries % 64 == 0
      assert keys % 128 == 0
      assert queries < 2 * T
      assert queries * keys <= 1 << 14 or rows * queries * keys <= 1 << 20
  assert block_sizes(14, 1024, 1024, "cpu") == (256, 256)
  assert block_sizes(32, 1024, 1024, "cpu") == (256, 128)
  assert block_sizes(8 * 32, 1024, 1024, "cpu") == (128, 128)
  assert block_sizes(32, 8192, 8192, "tpu") == (512, 512)
