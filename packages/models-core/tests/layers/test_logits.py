import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.layers import cross_entropy, log_probs, logits, mean_cross_entropy, top_k

B, T, V = 4, 6, 4096
SPECS = [
  P(),
  P("fsdp"),
  P(None, None, "tp"),
  P("fsdp", None, "tp"),
  P("tp", None, "fsdp"),
  P(None, "fsdp", "tp"),
  P(None, None, ("fsdp", "tp")),
]
reference = optax.softmax_cross_entropy_with_integer_labels
specs = pytest.mark.parametrize("spec", SPECS, ids=str)


@pytest.fixture(scope="module")
def arrays():
  """Logits, targets, and a weight for each token."""
  rng = np.random.default_rng(0)
  scores = (5 * rng.normal(size=(B, T, V))).astype(np.float32)
  targets = rng.integers(0, V, (B, T), np.int32)
  targets[0, :3] = 0, V // 2, V - 1
  return scores, targets, rng.random((B, T), np.float32)


def weighted(function):
  """A sum over tokens in which each has a weight of its own."""
  return lambda scores, targets, weights: jnp.sum(function(scores, targets) * weights)


@pytest.fixture(scope="module")
def expected(arrays):
  """Losses and the gradient of their weighted sum on one device."""
  return reference(*arrays[:2]), jax.grad(weighted(reference))(*arrays)


def place(x, mesh, spec):
  return jax.device_put(x, NamedSharding(mesh, spec))


def close(actual, expected, tolerance=1e-6):
  np.testing.assert_allclose(
    np.asarray(actual, np.float64), np.asarray(expected), rtol=tolerance, atol=tolerance
  )


def sizes(program, opcodes="all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"):
  """Numbers of elements of the results of a compiled program's collectives."""
  shapes = re.findall(rf"\w+\[([\d,]*)\]\S* (?:{opcodes})(?:-start)?\(", program.as_text())
  return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


def test_losses_gradients_and_probabilities_equal_optax(arrays, expected):
  scores, targets, _ = arrays
  for call in (cross_entropy, jax.jit(cross_entropy)):
    losses = call(scores, targets)
    assert losses.dtype == jnp.float32
    close(losses, expected[0])
  close(log_probs(scores, targets), -expected[0])
  close(jax.grad(weighted(cross_entropy))(*arrays), expected[1])
  close(cross_entropy(scores[0, 0], targets[0, 0]), expected[0][0, 0])


@pytest.mark.parametrize("inside", [False, True], ids=["outside set_mesh", "inside set_mesh"])
@specs
def test_any_sharding_gives_the_same_losses_gradients_and_largest(arrays, expected, mesh, spec, inside):
  scores, targets, weights = place(arrays[0], mesh, spec), *arrays[1:]
  gradient = jax.jit(jax.grad(weighted(cross_entropy)))
  jitted = jax.jit(top_k, static_argnums=(1, 2))
  with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
    # Targets on the host, and sharded in another way than the logits.
    close(cross_entropy(scores, targets), expected[0])
    close(jax.jit(cross_entropy)(scores, place(targets, mesh, P("fsdp"))), expected[0])
    for found in (top_k(scores, 9), jitted(scores, 9), jitted(scores, 9, spec)):
      for ours, theirs in zip(found, jax.lax.top_k(arrays[0], 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    slope = gradient(scores, place(targets, mesh, P("fsdp")), place(weights, mesh, P(*spec[:2])))
    close(slope, expected[1])
    if mesh.axis_types[0] is jax.sharding.AxisType.Explicit:
      assert slope.sharding == NamedSharding(mesh, P(*spec, *(None,) * (3 - len(spec))))
    # With Auto axes the compiler may shard it over more axes.
    assert slope.sharding.shard_shape(slope.shape) <= scores.sharding.shard_shape(scores.shape)


@specs
def test_no_device_makes_or_moves_anything_of_the_size_of_its_logits(mesh, spec):
  struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
  scores = struct((B, T, V), jnp.float32, spec)
  tokens = P(*spec[:2])
  targets, weights = struct((B, T), jnp.int32, tokens), struct((B, T), jnp.float32, tokens)
  part = math.prod(scores.sharding.shard_shape(scores.shape))
  # Older CPU backends do not fuse the exponential into the sum.
  bytes_left = part if jax.__version_info__ >= (0, 10) else 4.5 * part
  programs = [
    jax.jit(cross_entropy).lower(scores, targets),
    jax.jit(jax.value_and_grad(weighted(cross_entropy))).lower(scores, targets, weights),
    jax.jit(top_k, static_argnums=(1, 2)).lower(scores, 9, spec),
  ]
  for program in (lowered.compile() for lowered in programs):
    assert max(sizes(program), default=0) <= B * T * 9 * 4 < part / 4
    assert program.memory_analysis().temp_size_in_bytes < bytes_left


@specs
def test_the_largest_without_a_spec_move_once_and_whole_on_no_device(meshes, spec):
  mesh = meshes("auto", (2, 2), ("fsdp", "tp"))
  scores = jax.ShapeDtypeStruct((B, T, V), jnp.float32, sharding=NamedSharding(mesh, spec))
  program = jax.jit(top_k, static_argnums=1).lower(scores, 9).compile()
  assert max(sizes(program, "all-gather")) <= B * T * 9 * 4
  # The part of each device, once as it was and once as it is needed.
  assert program.memory_analysis().temp_size_in_bytes <= 2 * 4 * B * T * V / 4 * 1.1


def test_sizes_that_no_mesh_axis_divides(meshes, mesh):
  rng = np.random.default_rng(1)
  for shape in ((3, 5, 37), (2, 1, 38), (1, 4, 37)):
    scores, targets = rng.normal(size=shape).astype(np.float32), rng.integers(0, shape[-1], shape[:-1])
    placed = place(scores, mesh, P())
    close(jax.jit(cross_entropy)(placed, targets), reference(scores, targets))
    for k in (1, shape[-1]):
      found = jax.jit(top_k, static_argnums=1)(placed, k)
      for ours, theirs in zip(found, jax.lax.top_k(scores, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@specs
def test_of_equal_logits_the_first_is_the_largest(mesh, spec):
  scores = np.random.default_rng(1).integers(0, 3, (B, T, 64)).astype(np.float32)
  for ours, theirs in zip(top_k(place(scores, mesh, spec), 20), jax.lax.top_k(scores, 20), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@specs
def test_gradient_of_the_largest(arrays, mesh, spec):
  total = lambda scores, top_k: jnp.sum(jnp.sin(top_k(scores, 5)[0]))
  found = jax.jit(jax.grad(lambda scores: total(scores, functools.partial(top_k, spec=spec))))(
    place(arrays[0], mesh, spec)
  )
  close(found, jax.grad(total)(arrays[0], jax.lax.top_k))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32_and_the_gradient_rounded_once(arrays, dtype):
  scores = jnp.asarray(arrays[0]).astype(dtype)
  wide = scores.astype(jnp.float32)
  losses, slope = (
    jax.jit(cross_entropy)(scores, arrays[1]),
    jax.jit(jax.grad(weighted(cross_entropy)))(scores, *arrays[1:]),
  )
  assert (losses.dtype, slope.dtype) == (jnp.float32, jnp.dtype(dtype))
  close(losses, reference(wide, arrays[1]))
  exact = np.asarray(jax.grad(weighted(reference))(wide, *arrays[1:]))
  close(slope, exact.astype(slope.dtype), 2 * float(jnp.finfo(dtype).eps) * np.abs(exact).max())


def test_a_small_loss_of_large_logits_keeps_its_precision():
  scores = np.array([10_000.0, 9_990.0, 0.0], np.float32)
  close(cross_entropy(scores, 0), np.log1p(np.exp(-10.0)), 1e-7)


def test_forward_mode_and_second_derivatives(arrays):
  scores, targets, weights = (x[:2, :2] for x in arrays)
  scores, tangent = scores[..., :50], np.cos(scores[..., :50])
  targets = targets % 50
  curvature = lambda function: jax.jvp(
    jax.grad(lambda scores: weighted(function)(scores, targets, weights)), (scores,), (tangent,)
  )
  for ours, theirs in zip(curvature(cross_entropy), curvature(reference), strict=True):
    close(ours, theirs)


@pytest.mark.parametrize("choose", [logits._chosen_by_comparison, logits._chosen_by_gather])
@specs
def test_both_ways_to_choose_the_targets_logit(arrays, meshes, choose, spec):
  """On CPUs the gather is used, on all other devices the comparison."""
  scores, targets, _ = arrays
  chosen = jax.jit(choose)(place(scores, meshes("auto", (2, 2), ("fsdp", "tp")), spec), targets)
  assert chosen.dtype == jnp.float32
  np.testing.assert_array_equal(chosen, np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_targets_of_every_integer_type(dtype):
  scores = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
  targets = np.array([0, 5, 120], dtype)
  close(cross_entropy(scores, targets), reference(scores, targets.astype(np.int32)))


def test_a_target_outside_the_vocabulary_gives_nan_and_no_gradient(mesh):
  scores = place(
    np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32), mesh, P("fsdp", None, "tp")
  )
  targets = np.array([[8, -1, -100, 2**31 - 1], [0, 7, 3, 4]], np.int32)
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(np.isnan(cross_entropy(scores, targets)), [[True] * 4, [False] * 4])
    slope = np.asarray(jax.grad(lambda scores: jnp.sum(cross_entropy(scores, targets)))(scores))
    assert not slope[0].any()
    assert slope[1].any()
  # As an unsigned number, 2^32 - 1 is no target either.
  assert np.isnan(cross_entropy(np.zeros(3, np.float32), np.uint32(2**32 - 1)))


def test_logits_of_minus_infinity(arrays):
  scores, targets, weights = (x[:1] for x in arrays)
  scores = np.where(np.arange(V) % 3 == 1, -np.inf, scores)
  targets = targets - (targets % 3 == 1)
  close(cross_entropy(scores, targets), reference(scores, targets))
  close(
    jax.grad(weighted(cross_entropy))(scores, targets, weights),
    jax.grad(weighted(reference))(scores, targets, weights),
  )
  assert cross_entropy(scores[0, 0], 1) == np.inf


@pytest.mark.parametrize("where", ["host", "mesh"])
def test_the_mean_weights_tokens_and_skips_those_without_weight(arrays, expected, mesh, where):
  scores, targets, weights = arrays
  losses, weights = expected[0], np.where(weights < 0.4, 0, weights)
  scores = place(scores, mesh, P("fsdp", None, "tp"))
  mean = jax.jit(mean_cross_entropy)
  close(mean(scores, targets), losses.mean())
  for mask in (weights, weights > 0, (weights > 0).astype(np.int32)):
    placed = place(mask, mesh, P("tp", "fsdp")) if where == "mesh" else mask
    skipped = np.where(mask, targets, -100)
    for call in (mean, mean_cross_entropy):
      result = call(scores, skipped, placed)
      assert (result.shape, result.dtype) == ((), jnp.float32)
      close(result, np.average(losses, weights=mask))
    slope = jax.jit(jax.grad(mean_cross_entropy))(scores, skipped, placed)
    close(slope, jax.grad(weighted(reference))(arrays[0], targets, mask / mask.sum(dtype=np.float32)))
  none = np.zeros((B, T), bool)
  assert mean(scores, targets, none) == 0
  assert not np.asarray(jax.jit(jax.grad(mean_cross_entropy))(scores, targets, none)).any()


def test_inside_shard_map(arrays, expected, mesh):
  scores, targets, _ = (place(x, mesh, P("fsdp")) for x in arrays)
  run = lambda scores, targets: (cross_entropy(scores, targets), top_k(scores, 3)[1])
  losses, indices = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")))(
    scores, targets
  )
  close(losses, expected[0])
  np.testing.assert_array_equal(indices, jax.lax.top_k(arrays[0], 3)[1])


@pytest.mark.parametrize(
  ("shape", "targets", "error", "message"),
  [
    ((2, 3, 8), np.zeros((2, 3, 1), np.int32), ValueError, r"targets \(2, 3, 1\), expected \[\.\.\., V\]"),
    ((2, 3, 8), np.zeros((3,), np.int32), ValueError, "one target for each token"),
    ((2, 3, 8), np.zeros((2, 3), np.float32), TypeError, "targets float32, expected floats and integers"),
    ((2, 3, 8), np.zeros((2, 3), bool), TypeError, "targets bool"),
  ],
)
def test_targets_that_do_not_fit_are_refused(shape, targets, error, message):
  for call in (cross_entropy, log_probs, mean_cross_entropy, jax.jit(cross_entropy)):
    with pytest.raises(error, match=message):
      call(np.zeros(shape, np.float32), targets)


def test_other_arguments_that_do_not_fit_are_refused():
  zeros = np.zeros((2, 8), np.float32)
  with pytest.raises(TypeError, match="logits are int32"):
    cross_entropy(zeros.astype(np.int32), np.zeros(2, np.int32))
  with pytest.raises(ValueError, match=r"weights have shape \(8,\), expected \(2,\)"):
    mean_cross_entropy(zeros, np.zeros(2, np.int32), np.ones(8))
  for k in (0, 9, -1):
    with pytest.raises(ValueError, match=f"k is {k}, expected a number from 1 to V=8"):
      top_k(zeros, k)
