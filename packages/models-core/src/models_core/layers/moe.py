"""Sparse feed-forward blocks: a router chooses a few experts for each token.

Tokens are sorted by expert, so that each expert multiplies only the rows of its own tokens. On a mesh each device sorts
its own tokens for its own experts, and the results are summed over devices.
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
from models_core.layers.linear import products_are_replaced
from models_core.layers.mesh import fit_auto
from models_core.layers.mlp import gated
from models_core.layers.parameters import parameter
from models_core.sharding import ShardingConfig, axis_names


class Experts(nnx.Module):
  """E gated feed-forward blocks, stacked: `gate_proj` and `up_proj` [E, F, D], `down_proj` [E, D, F].

  The caller routes: it passes the chosen experts and their weights. `exp_weight_edf` and `exp_weight_efd` of the
  ShardingConfig shard the parameters over any mesh axes. For the products, E and F stay sharded and D is gathered. A
  mesh axis that shards both E and the tokens keeps sharding E, and the tokens are gathered along it; one that shards
  both F and the tokens keeps sharding the tokens, and F is gathered.
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
    """Computes the weighted sum of the results of each token's experts.

    Args:
      x: [B, T, D].
      experts: int [B, T, n], numbers of the n experts chosen for each token, from 0 to E - 1.
      weights: float32 [B, T, n], weights of these experts' results.

    Returns:
      [B, T, D] in the dtype of x; summed in float32.
    """
    if products_are_replaced():
      return self._all_experts(x, experts, weights)
    gate, up, down = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
    dtype = functools.reduce(common_dtype, (gate.dtype, up.dtype, down.dtype, x.dtype))
    arrays = (x.astype(dtype), experts, weights, gate.astype(dtype), up.astype(dtype), down.astype(dtype))
    rows, e, f = _axes(fit_auto(x.shape, self.act_btd), fit_auto(gate.shape, self.up_spec))
    return _sharded(*arrays, activation=self.activation, rows=rows, e=e, f=f).astype(x.dtype)

  def _all_experts(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes the same from the results of all experts for all tokens.

    Its products have the parameters themselves as operands, which a library for quantisation or LoRA needs. It costs
    E / n times as much.
    """
    E = self.gate_proj.shape[0]
    # Not as [E, B * T, D], the shape of a parameter by chance, by which qwix would take the rows for one.
    rows = jnp.broadcast_to(x, (E, *x.shape))
    gate, up = (_batched(rows, w[...]) for w in (self.gate_proj, self.up_proj))
    out = _batched(gated(gate, up, self.activation), self.down_proj[...]).astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, E, axis=0, dtype=jnp.float32)  # [E, B, T, n]
    share = jnp.sum(chosen * weights, axis=-1, keepdims=True)
    return jnp.sum(out * share, axis=0).astype(x.dtype)


def _batched(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [E, B, T, in] times w [E, out, in] -> [E, B, T, out] in the dtype of x."""
  dtype = common_dtype(w.dtype, x.dtype)
  w = w if w.dtype == dtype else w.astype(dtype)
  return jax.lax.dot_general(x.astype(dtype), w, (((3,), (2,)), ((0,), (0,)))).astype(x.dtype)


Names = tuple[str, ...]
Activation = Callable[[jax.Array], jax.Array]


def _axes(act: PartitionSpec, up: PartitionSpec) -> tuple[tuple[Names, Names], Names, Names]:
  """Mesh axes of (B, T), E and F, each mesh axis once: E takes its axes first, then B and T, then F.

  E takes precedence, since gathering the experts' weights would cost more than gathering tokens.
  """
  used: set[str] = set()

  def take(spec: PartitionSpec, axis: int) -> Names:
    names = axis_names(spec[axis]) if axis < len(spec) else ()
    free = tuple(name for name in names if name not in used)
    used.update(free)
    return free

  e = take(up, 0)
  return (take(act, 0), take(act, 1)), e, take(up, 1)


# Compiled for eager callers, too: for them shard_map would run one operation at a time.
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
  """Computes the weighted sum, float32 [B, T, D], on each device with the device's own tokens and experts.

  `rows`, `e` and `f` are the mesh axes of (B, T), E and F, as `_axes` returns them.
  """
  mesh_axes = (*rows[0], *rows[1], *e, *f)
  if not mesh_axes:
    return _apply(x, experts, weights, gate, up, down, 0, activation, ())

  def run(
    x: jax.Array, experts: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
  ) -> jax.Array:
    # Marked as varying, so that differentiation adds the sums over devices that gradients need.
    x, (gate, up, down) = _varying(x, (*e, *f)), (_varying(w, (*rows[0], *rows[1])) for w in (gate, up, down))
    first = lax.axis_index(e) * gate.shape[0] if e else 0
    out = _apply(x, experts, weights, gate, up, down, first, activation, mesh_axes)
    return lax.psum(out, (*e, *f)) if e or f else out

  tokens, wide, narrow = PartitionSpec(*rows), PartitionSpec(e, f), PartitionSpec(e, None, f)
  # shard_map gets no mesh: it takes the one in context, which is the user's.
  axes = set(jax.sharding.get_abstract_mesh().auto_axes)
  specs = (tokens, tokens, tokens, wide, wide, narrow)
  return jax.shard_map(run, in_specs=specs, out_specs=tokens, axis_names=axes)(
    x, experts, weights, gate, up, down
  )


def _varying(array: jax.Array, axes: Names) -> jax.Array:
  """Marks an array that shard_map's types hold to be equal along mesh axes as one that may differ along them."""
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
  """Contribution of the E experts numbered from `first` on to the weighted sum: float32 [B, T, D]."""
  B, T, n = experts.shape
  E = gate.shape[0]
  group = experts.reshape(-1).astype(jnp.int32) - first
  group = jnp.where((group >= 0) & (group < E), group, E)  # experts of other devices come last
  order = jnp.argsort(group)
  sizes = jnp.bincount(group, length=E + 1)[:E].astype(jnp.int32)
  rows = x.reshape(B * T, -1)[order // n]
  hidden = gated(*(grouped_dot(rows, w, sizes, mesh_axes) for w in (gate, up)), activation)
  out = grouped_dot(hidden, down, sizes, mesh_axes)[jnp.argsort(order)].astype(jnp.float32)
  # B * T as one axis: with a leading B = 1, the CPU backend of jaxlib 0.10.2 miscompiles the gradient of this sum.
  out = jnp.sum(out.reshape(B * T, n, -1) * weights.reshape(B * T, n, 1), axis=1)
  return out.reshape(B, T, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, mesh_axes: Names = ()) -> jax.Array:
  """Multiplies each of E groups of rows by a matrix of its own.

  With sizes [2, 1], rows 0 and 1 are multiplied by w[0], row 2 by w[1], and all further rows of the result are 0.

  Args:
    x: [M, D], the rows of the first group first.
    w: [E, F, D].
    sizes: int32 [E], number of rows of each group.
    mesh_axes: the mesh axes along which the arrays differ, inside shard_map.

  Returns:
    [M, F]; rows that belong to no group are 0.
  """
  return _dot(x, w, sizes, 2, mesh_axes)


def _dot(x: jax.Array, w: jax.Array, sizes: jax.Array, axis: int, mesh_axes: Names) -> jax.Array:
  """Contracts the last axis of x with an axis of w [E, F, D]: 1 or 2."""
  # XLA's CPU backend computes a ragged dot by multiplying all rows with all experts.
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
    # Rows that a block writes past the end of its group are overwritten by the first block of the next group.
    return lax.dynamic_update_slice_in_dim(out, product, start, 0)

  out = _varying(jnp.zeros((M + block, w.shape[3 - axis]), x.dtype), mesh_axes)
  out = _for_blocks(sizes, block, multiply, out)[:M]
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes), out, 0)


def _weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array, mesh_axes: Names) -> jax.Array:
  """Sums the outer products of each group's rows: x [M, D], dy [M, F] -> [E, F, D]."""
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
  """Number of rows multiplied at a time: about twice the average size of a group, 128 at most, which is fastest."""
  rows, groups = x.shape[0], sizes.shape[0]
  return 1 if rows <= groups else min(128, 1 << (2 * rows // groups - 1).bit_length())


def _for_blocks(sizes: jax.Array, block: int, body: Callable[..., jax.Array], out: jax.Array) -> jax.Array:
  """Folds `out = body(group, first row, rows left in the group, out)` over the blocks of all groups, in order.

  With sizes [3, 1] and blocks of 2 rows, `body` gets (0, 0, 3), (0, 2, 1) and (1, 3, 1).
  """
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
