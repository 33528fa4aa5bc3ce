"""Sparse feed-forward blocks: each token goes through the few experts that its router chose.

Tokens are sorted by expert, so that each expert multiplies its own rows alone. On a mesh each device sorts
its own tokens for its own experts, and the parts are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from models_core.dtypes import common_dtype
from models_core.layers.mesh import fit_auto
from models_core.layers.mlp import gated
from models_core.layers.parameters import parameter
from models_core.sharding import ShardingConfig, axis_names


class Experts(nnx.Module):
  """E gated feed-forward blocks, stacked: `gate_proj` and `up_proj` [E, F, D], `down_proj` [E, D, F].

  The router is the family's. `exp_weight_edf` and `exp_weight_efd` shard the parameters over any mesh axes.
  While they multiply, E and F stay sharded and D is whole. Where an axis shards the tokens, too, E has
  precedence, for which the tokens are gathered, and F gives way.
  """

  def __init__(
    self,
    num_experts: int,
    embed_dim: int,
    hidden_dim: int,
    activation: Callable[[jax.Array], jax.Array],
    shd: ShardingConfig,
    *,
    rngs: nnx.Rngs,
  ):
    up, down = shd.spec("exp_weight_edf", "e f d"), shd.spec("exp_weight_efd", "e d f")
    self.activation = activation
    self.up_spec = up
    self.act_btd = shd.spec("act_btd", "b t d")
    self.gate_proj = parameter((num_experts, hidden_dim, embed_dim), up, rngs=rngs)
    self.up_proj = parameter((num_experts, hidden_dim, embed_dim), up, rngs=rngs)
    self.down_proj = parameter((num_experts, embed_dim, hidden_dim), down, rngs=rngs)

  def __call__(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum of the chosen experts' results.

    Args:
      x: [B, T, D].
      experts: int [B, T, n], the n experts of each token.
      weights: float32 [B, T, n], of their results.

    Returns:
      [B, T, D] in the dtype of x; the sum is float32.
    """
    gate, up, down = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
    dtype = functools.reduce(common_dtype, (gate.dtype, up.dtype, down.dtype, x.dtype))
    arrays = (x.astype(dtype), experts, weights, gate.astype(dtype), up.astype(dtype), down.astype(dtype))
    rows, e, f = _axes(fit_auto(x.shape, self.act_btd), fit_auto(gate.shape, self.up_spec))
    return _sharded(*arrays, activation=self.activation, rows=rows, e=e, f=f).astype(x.dtype)


Names = tuple[str, ...]
Activation = Callable[[jax.Array], jax.Array]


def _axes(act: PartitionSpec, up: PartitionSpec) -> tuple[tuple[Names, Names], Names, Names]:
  """Mesh axes of (B, T), E and F; none of them twice: E goes first, for its weights are the largest."""
  used: set[str] = set()

  def take(spec: PartitionSpec, axis: int) -> Names:
    names = axis_names(spec[axis]) if axis < len(spec) else ()
    free = tuple(name for name in names if name not in used)
    used.update(free)
    return free

  e = take(up, 0)
  return (take(act, 0), take(act, 1)), e, take(up, 1)


# Compiled also for eager callers, for whom shard_map would run one operation at a time.
@functools.partial(jax.jit, static_argnames=("activation", "rows", "e", "f"))
def _sharded(
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  *,
  activation: Activation,
  rows: tuple[Names, Names],
  e: Names,
  f: Names,
) -> jax.Array:
  """float32 [B, T, D]; every device computes its rows with its experts."""
  mesh_axes = (*rows[0], *rows[1], *e, *f)
  if not mesh_axes:
    return _apply(x, experts, weights, gate, up, down, 0, activation, ())

  def run(
    x: jax.Array, experts: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
  ) -> jax.Array:
    # The sums over devices that the gradients need follow from these.
    x, (gate, up, down) = _varying(x, (*e, *f)), (_varying(w, (*rows[0], *rows[1])) for w in (gate, up, down))
    first = lax.axis_index(e) * gate.shape[0] if e else 0
    out = _apply(x, experts, weights, gate, up, down, first, activation, mesh_axes)
    return lax.psum(out, (*e, *f)) if e or f else out

  tokens, wide, narrow = PartitionSpec(*rows), PartitionSpec(e, f), PartitionSpec(e, None, f)
  # No mesh is named: the one in context is the user's.
  axes = set(jax.sharding.get_abstract_mesh().auto_axes)
  specs = (tokens, tokens, tokens, wide, wide, narrow)
  return jax.shard_map(run, in_specs=specs, out_specs=tokens, axis_names=axes)(
    x, experts, weights, gate, up, down
  )


def _varying(array: jax.Array, axes: Names) -> jax.Array:
  """An array that shard_map's types hold to be the same along mesh axes, as one that may differ."""
  return lax.pcast(array, axes, to="varying") if axes else array


def _apply(
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  first: jax.Array | int,
  activation: Activation,
  mesh_axes: Names,
) -> jax.Array:
  """What these experts, numbered from `first`, give to the result: float32 [B, T, D]."""
  B, T, n = experts.shape
  E = gate.shape[0]
  group = experts.reshape(-1).astype(jnp.int32) - first
  group = jnp.where((group >= 0) & (group < E), group, E)  # others' experts come last
  order = jnp.argsort(group)
  sizes = jnp.bincount(group, length=E + 1)[:E].astype(jnp.int32)
  rows = x.reshape(B * T, -1)[order // n]
  hidden = gated(*(grouped_dot(rows, w, sizes, mesh_axes) for w in (gate, up)), activation)
  out = grouped_dot(hidden, down, sizes, mesh_axes)[jnp.argsort(order)].astype(jnp.float32)
  # One axis of tokens: with B = 1 in front, the CPU backend of jaxlib 0.10.2 compiles this sum's gradient wrong.
  out = jnp.sum(out.reshape(B * T, n, -1) * weights.reshape(B * T, n, 1), axis=1)
  return out.reshape(B, T, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, mesh_axes: Names = ()) -> jax.Array:
  """Multiplies groups of rows by a matrix each.

  Args:
    x: [M, D], rows of the first group first.
    w: [E, F, D].
    sizes: int32 [E], rows of each group.
    mesh_axes: inside shard_map, those along which the arrays differ.

  Returns:
    [M, F]; rows that no group has are 0.
  """
  return _dot(x, w, sizes, 2, mesh_axes)


def _dot(x: jax.Array, w: jax.Array, sizes: jax.Array, axis: int, mesh_axes: Names) -> jax.Array:
  """Contracts the last axis of x with `axis` of w."""
  # XLA's CPU backend multiplies all rows with all experts for a ragged dot.
  in_blocks = functools.partial(_dot_in_blocks, axis=axis, mesh_axes=mesh_axes)
  return lax.platform_dependent(x, w, sizes, cpu=in_blocks, default=functools.partial(_ragged_dot, axis=axis))


def _ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, axis: int) -> jax.Array:
  numbers = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (axis,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
  )
  return lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=x.dtype)


def _dot_in_blocks(x: jax.Array, w: jax.Array, sizes: jax.Array, axis: int, mesh_axes: Names) -> jax.Array:
  M, block = x.shape[0], _block(x, sizes)
  padded = jnp.pad(x, ((0, block), (0, 0)))

  def multiply(group: jax.Array, start: jax.Array, left: jax.Array, out: jax.Array) -> jax.Array:
    rows = lax.dynamic_slice_in_dim(padded, start, block)
    matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)
    product = lax.dot_general(rows, matrix, (((1,), (axis - 1,)), ((), ())))
    # What a block writes past its group, the next group's first block writes again.
    return lax.dynamic_update_slice_in_dim(out, product, start, 0)

  out = _varying(jnp.zeros((M + block, w.shape[3 - axis]), x.dtype), mesh_axes)
  out = _for_blocks(sizes, block, multiply, out)[:M]
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes), out, 0)


def _weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array, mesh_axes: Names) -> jax.Array:
  """[M, D], [M, F] -> [E, F, D]: the outer products of each group's rows."""
  return lax.platform_dependent(
    x, dy, sizes, cpu=functools.partial(_outer_in_blocks, mesh_axes=mesh_axes), default=_ragged_outer
  )


def _ragged_outer(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
  numbers = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
  )
  return lax.ragged_dot_general(dy, x, sizes, numbers, preferred_element_type=x.dtype)


def _outer_in_blocks(x: jax.Array, dy: jax.Array, sizes: jax.Array, mesh_axes: Names) -> jax.Array:
  block = _block(x, sizes)
  padded, padded_dy = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, dy))

  def add(group: jax.Array, start: jax.Array, left: jax.Array, out: jax.Array) -> jax.Array:
    rows, dy = (lax.dynamic_slice_in_dim(array, start, block) for array in (padded, padded_dy))
    dy = jnp.where(jnp.arange(block)[:, None] < left, dy, 0)
    return out.at[group].add(jnp.einsum("mf,md->fd", dy, rows, preferred_element_type=jnp.float32))

  out = _varying(jnp.zeros((sizes.shape[0], dy.shape[1], x.shape[1]), jnp.float32), mesh_axes)
  return _for_blocks(sizes, block, add, out).astype(x.dtype)


def _block(x: jax.Array, sizes: jax.Array) -> int:
  """Rows that are multiplied at a time: about two groups' worth, which measures fastest."""
  rows, groups = x.shape[0], sizes.shape[0]
  return 1 if rows <= groups else min(128, 1 << (2 * rows // groups - 1).bit_length())


def _for_blocks(sizes: jax.Array, block: int, body: Callable[..., jax.Array], out: jax.Array) -> jax.Array:
  """Folds `body(group, first row, rows left in the group, out)` over the blocks of all groups, in order."""
  blocks = -(-sizes // block)
  ends, starts = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes

  def step(i: jax.Array, out: jax.Array) -> jax.Array:
    group = jnp.sum((i >= ends).astype(jnp.int32))
    done = (i - ends[group] + blocks[group]) * block
    return body(group, starts[group] + done, sizes[group] - done, out)

  return lax.fori_loop(0, ends[-1], step, out)


def _forward(
  x: jax.Array, w: jax.Array, sizes: jax.Array, mesh_axes: Names
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  return _dot(x, w, sizes, 2, mesh_axes), (x, w, sizes)


def _backward(
  mesh_axes: Names, kept: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x, w, sizes = kept
  return _dot(dy, w, sizes, 1, mesh_axes), _weight_gradient(x, dy, sizes, mesh_axes), None


grouped_dot.defvjp(_forward, _backward)
