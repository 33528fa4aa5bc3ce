import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models_core.hlo import Program
from models_core.layers.exchange import _equal_all_to_all
from models_core.layers.grouped import _ragged_dot, grouped_dot
from models_core.layers.mesh import call_auto
from models_core.layers.moe import Experts
from models_core.sharding import ShardingConfig, fit

B, T, D, E, F, N = 4, 20, 16, 6, 8, 3
SHARDING = ShardingConfig.get_default_sharding()
REPLICATED = PartitionSpec()


def close(actual, expected, tolerance=1e-5):
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def arrays():
  """x, the chosen experts' weights and numbers, and the three stacks."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  logits = normal(B, T, E)
  logits[..., 4] = -9  # nobody's expert
  probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  experts = np.argsort(-logits, -1)[..., :N].astype(np.int32)
  weights = np.take_along_axis(probabilities, experts, -1)
  return normal(B, T, D), weights, experts, normal(E, F, D), normal(E, F, D), normal(E, D, F)


def dense(x, weights, experts, gate, up, down, E=E):
  """All experts for all tokens."""
  hidden = jax.nn.silu(jnp.einsum("btd,efd->btef", x, gate)) * jnp.einsum("btd,efd->btef", x, up)
  chosen = jax.nn.one_hot(experts, E, dtype=jnp.float32)
  return jnp.einsum("bted,btn,btne->btd", jnp.einsum("btef,edf->bted", hidden, down), weights, chosen)


def sparse(sharding, E=E, D=D, F=F, out=REPLICATED):
  module = Experts(E, D, F, jax.nn.silu, sharding, rngs=nnx.Rngs(0))

  def run(x, weights, experts, gate, up, down):
    copy = nnx.clone(module)
    for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
      getattr(copy, name).set_value(value)
    return copy(x, experts, weights)

  return lambda *arrays: call_auto(run, out, *arrays)


def results(function, arrays):
  """The result and its gradients, to all but the experts' numbers."""
  x, weights, experts, *stacks = arrays

  def loss(x, weights, *stacks):
    out = function(x, weights, experts, *stacks)
    return jnp.sum(jnp.sin(out)), out

  return jax.jit(jax.grad(loss, tuple(range(5)), has_aux=True))(x, weights, *stacks)


@pytest.fixture(scope="module")
def expected(arrays):
  return results(dense, arrays)


def same(actual, expected):
  for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    close(ours, theirs)


def test_experts_equal_the_dense_form(arrays, expected):
  same(results(sparse(SHARDING), arrays), expected)


SPECS = {
  "experts": ("tp", "fsdp", None),
  "experts on the tokens' axis": ("fsdp", None, "tp"),
  "experts on both": (("fsdp", "tp"), None, None),
  "hidden": (None, "fsdp", "tp"),
  "hidden on the tokens' axis": (None, None, "fsdp"),
  "an axis that the mesh lacks": ("expert", None, None),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sharded_experts_equal_the_dense_form(arrays, expected, mesh, spec):
  e, d, f = spec
  sharding = dataclasses.replace(SHARDING, exp_weight_edf=spec, exp_weight_efd=(e, f, d))
  up, down = sharding.spec("exp_weight_edf", "e f d"), sharding.spec("exp_weight_efd", "e d f")
  specs = (*[PartitionSpec("fsdp")] * 3, up, up, down)
  placed = [
    jax.device_put(a, NamedSharding(mesh, fit(a.shape, s, mesh)[0]))
    for a, s in zip(arrays, specs, strict=True)
  ]
  same(results(sparse(sharding), placed), expected)


ROUTINGS = {
  "each expert gets as many": lambda token, choice: (token * N + choice) % 8,
  "the first two of eight get most": lambda token, choice: np.where(token % 7 == 0, 7 - choice, choice % 2),
  "one gets all": lambda token, choice: 6 + 0 * (token + choice),
}


@pytest.mark.parametrize(
  ("kind", "shape", "spec"),
  [
    ("explicit", (4,), ("fsdp", None, None)),
    ("auto", (2, 2), ("fsdp", None, "tp")),
    ("explicit", (2, 2), (("tp", "fsdp"), None, None)),
  ],
)
def test_rows_go_to_their_experts_and_back_whatever_the_routing(arrays, meshes, kind, shape, spec):
  """Experts on the tokens' axis. Of one token several rows may go to one expert."""
  mesh = meshes(kind, shape, ("fsdp", "tp")[: len(shape)])
  (e, d, f), (x, weights, *_), rng = spec, arrays, np.random.default_rng(3)
  stacks = [rng.normal(0, 0.25, size=size).astype(np.float32) for size in ((8, F, D), (8, F, D), (8, D, F))]
  sharding = dataclasses.replace(SHARDING, exp_weight_edf=spec, exp_weight_efd=(e, f, d))
  module = sparse(sharding, E=8, out=PartitionSpec("fsdp"))

  def compiled(function):
    loss = lambda arrays, experts: jnp.sum(jnp.sin(function(*arrays[:2], experts, *arrays[2:])))
    return jax.jit(jax.value_and_grad(loss))

  ours, theirs = compiled(module), compiled(functools.partial(dense, E=8))
  place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
  placed = (*(place(a, "fsdp") for a in (x, weights)), *(place(w, e) for w in stacks))
  for routing in ROUTINGS.values():
    experts = routing(np.arange(B * T)[:, None], np.arange(N)).reshape(B, T, N).astype(np.int32)
    same(ours(placed, place(experts, "fsdp")), theirs((x, weights, *stacks), experts))
  text = ours.lower(placed, place(experts, "fsdp")).compile().as_text()
  gathers = [use.instruction for use in Program(text).collectives if "all-gather" in use.instruction.opcode]
  # Only the counts of rows: not the tokens.
  assert gathers
  assert max(gather.size for gather in gathers) <= 4 * 8


def test_rows_lie_where_their_routes_say(meshes):
  """The example of `jax.lax.ragged_all_to_all`, which XLA's CPU backend lacks."""
  mesh = meshes("auto", (2,), ("x",))
  move = functools.partial(_equal_all_to_all, axes=("x",))
  route = ([[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]])
  rows, out = jnp.array([1, 2, 2, 3, 4, 0.0])[:, None], jnp.zeros((8, 1))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    moved = jax.jit(jax.shard_map(move, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")))(
      *(
        jax.device_put(a, NamedSharding(mesh, PartitionSpec("x")))
        for a in (rows, out, *(jnp.array(r).reshape(-1) for r in route))
      )
    )
  np.testing.assert_array_equal(moved[:, 0], [1, 3, 0, 0, 2, 2, 4, 0])


def test_eager_experts_on_a_mesh(arrays, expected, mesh):
  placed = [jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a in arrays]
  close(sparse(SHARDING)(*placed), expected[1])


@pytest.mark.parametrize("tokens", [1, 64])
def test_optimised_gradients_of_one_row(tokens):
  """As users compile them: the other tests run with most optimisations off."""
  E, D, F, N = 16, 64, 24, 4
  rng = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  weights, experts = jax.lax.top_k(jax.nn.softmax(normal(1, tokens, E)), N)
  arrays = (normal(1, tokens, D), weights, experts, normal(E, F, D), normal(E, F, D), normal(E, D, F))

  def loss(function, *arrays):
    return jnp.sum(function(*arrays) ** 2)

  former = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    for argument in (0, 5):
      ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, function), argument))(*arrays)
        for function in (sparse(SHARDING, E, D, F), functools.partial(dense, E=E))
      )
      close(ours, theirs)
  finally:
    jax.config.update("jax_disable_most_optimizations", former)


def test_half_precision_and_a_token_without_numbers(arrays, expected):
  x, weights, experts, *stacks = arrays
  x = x.copy()
  x[1, 2] = np.nan
  halves = [jnp.asarray(a, jnp.bfloat16) for a in (x, *stacks)]
  out = sparse(SHARDING)(halves[0], weights, experts, *halves[1:])
  assert out.dtype == jnp.bfloat16
  nan = np.isnan(np.asarray(out, np.float32)).any(-1)
  assert nan[1, 2]
  assert nan.sum() == 1
  close(np.asarray(out, np.float32)[~nan], np.asarray(expected[1])[~nan], 0.05)


@pytest.mark.parametrize("sizes", [(100, 0, 3, 65), (0, 0, 0, 0), (0, 0, 200, 0)])
def test_grouped_dot_multiplies_each_group_by_its_matrix(rng, sizes):
  x, w = rng.normal(size=(200, 24)).astype(np.float32), rng.normal(size=(4, 12, 24)).astype(np.float32)
  dy = rng.normal(size=(200, 12)).astype(np.float32)
  expected, dx, dw = np.zeros((200, 12)), np.zeros((200, 24)), np.zeros((4, 12, 24))
  for group, (start, size) in enumerate(zip(np.cumsum((0, *sizes)), sizes, strict=False)):
    rows = slice(start, start + size)
    expected[rows], dx[rows] = x[rows] @ w[group].T, dy[rows] @ w[group]
    dw[group] = dy[rows].T @ x[rows]
  sizes = jnp.asarray(sizes, jnp.int32)
  out, pull = jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)
  a, b = pull(dy)
  np.testing.assert_allclose(out, expected, atol=1e-4)
  np.testing.assert_allclose(a, dx, atol=1e-4)
  np.testing.assert_allclose(b, dw, atol=1e-4)
  # A TPU's form gives the same.
  np.testing.assert_allclose(_ragged_dot(x, w, sizes, 2), expected, atol=1e-4)
  np.testing.assert_allclose(_ragged_dot(dy, w, sizes, 1), dx, atol=1e-4)
