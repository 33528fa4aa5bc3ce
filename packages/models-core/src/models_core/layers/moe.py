"""Sparse feed-forward blocks: a router chooses a few experts for each token.

Tokens are sorted by expert, so that each expert multiplies only the rows of its own tokens. On a mesh each device sorts
its own tokens for the experts that it reaches: its own, and those that it sends rows to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from models_core.dtypes import common_dtype
from models_core.layers.exchange import exchange, routes
from models_core.layers.grouped import Names, grouped_dot, varying
from models_core.layers.linear import products_are_replaced
from models_core.layers.mesh import fit_auto
from models_core.layers.mlp import gated
from models_core.layers.parameters import parameter
from models_core.sharding import ShardingConfig, axis_names


class Experts(nnx.Module):
  """E gated feed-forward blocks, stacked: `gate_proj` and `up_proj` [E, F, D], `down_proj` [E, D, F].

  The caller routes: it passes the chosen experts and their weights. `exp_weight_edf` and `exp_weight_efd` of the
  ShardingConfig shard the parameters over any mesh axes. For the products, E and F stay sharded and D is gathered.
  Along a mesh axis that shards E and not the tokens, each device computes its experts' part of the sum. Along one that
  shards both, tokens are sent to the devices of their experts, and results back (expert parallelism, arXiv:2006.16668).
  One that shards both F and the tokens keeps sharding the tokens, and F is gathered.

  No token is dropped, whatever the routing: for each token's expert there is a row on each device that may get it. With
  X devices along the axes that rows are sent along, and M rows of (token, expert) on each, these are X * M rows.
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
    axes = _axes(fit_auto(x.shape, self.act_btd), fit_auto(gate.shape, self.up_spec))
    return _sharded(*arrays, activation=self.activation, axes=axes).astype(x.dtype)

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


Activation = Callable[[jax.Array], jax.Array]


class Axes(NamedTuple):
  """Mesh axes of the experts' block: each shards one of these, or the tokens as well as E.

  Attributes:
    rows: of B and T.
    experts: of E.
    hidden: of F.
    exchanged: those of `experts` that shard B or T, too: along them rows go to their experts and back.
  """

  rows: tuple[Names, Names]
  experts: Names
  hidden: Names
  exchanged: Names

  @property
  def all(self) -> Names:
    """Every axis, once."""
    return (*self.rows[0], *self.rows[1], *self.summed)

  @property
  def summed(self) -> Names:
    """The axes along which devices have other experts, or other parts of them, for the same tokens."""
    return (*(name for name in self.experts if name not in self.exchanged), *self.hidden)


def _axes(act: PartitionSpec, up: PartitionSpec) -> Axes:
  """The mesh axes, given those of activations [B, T, D] and of a stack [E, F, D]."""
  b, t, e, f = (
    axis_names(spec[axis]) if axis < len(spec) else ()
    for spec, axis in ((act, 0), (act, 1), (up, 0), (up, 1))
  )
  rows = {*b, *t}
  return Axes((b, t), e, tuple(n for n in f if n not in rows), tuple(n for n in e if n in rows))


# Compiled for eager callers, too: for them shard_map would run one operation at a time.
@functools.partial(jax.jit, static_argnames=("activation", "axes"))
def _sharded(
  x: jax.Array, experts: jax.Array, weights: jax.Array, *stacks: jax.Array, activation: Activation, axes: Axes
) -> jax.Array:
  """Computes the weighted sum, float32 [B, T, D], on each device with the device's own experts."""
  if not axes.all:
    return _apply(x, experts, weights, stacks, activation, axes)
  tokens = tuple(name for names in axes.rows for name in names if name not in axes.exchanged)

  def run(x: jax.Array, experts: jax.Array, weights: jax.Array, *stacks: jax.Array) -> jax.Array:
    # Marked as varying, so that differentiation adds the sums over devices that gradients need.
    x, stacks = varying(x, axes.summed), tuple(varying(w, tokens) for w in stacks)
    out = _apply(x, experts, weights, stacks, activation, axes)
    return lax.psum(out, axes.summed) if axes.summed else out

  rows, e, f = PartitionSpec(*axes.rows), axes.experts, axes.hidden
  wide, narrow = PartitionSpec(e, f), PartitionSpec(e, None, f)
  # shard_map gets no mesh: it takes the one in context, which is the user's.
  mesh_axes = set(jax.sharding.get_abstract_mesh().auto_axes)
  specs = (rows, rows, rows, wide, wide, narrow)
  return jax.shard_map(run, in_specs=specs, out_specs=rows, axis_names=mesh_axes)(
    x, experts, weights, *stacks
  )


def _apply(
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  stacks: tuple[jax.Array, ...],
  activation: Activation,
  axes: Axes,
) -> jax.Array:
  """Contribution of the experts that a device reaches to the weighted sum of its tokens: float32 [B, T, D]."""
  B, T, n = experts.shape
  E = stacks[0].shape[0]
  devices = math.prod(lax.axis_size(name) for name in axes.exchanged)
  group = _group(experts.reshape(-1).astype(jnp.int32), E, devices, axes)
  order = jnp.argsort(group)
  back = jnp.argsort(order)
  counts = jnp.bincount(group, length=devices * E + 1)[:-1].astype(jnp.int32).reshape(devices, E)
  rows = _take(x.reshape(B * T, -1), order, back, n)
  if axes.exchanged:
    out = _exchanged(rows, counts, stacks, activation, axes)
  else:
    out = _products(rows, counts[0], stacks, activation, axes.all)
  out = _take(out, back, order, 1).astype(jnp.float32)
  # B * T as one axis: with a leading B = 1, the CPU backend of jaxlib 0.10.2 miscompiles the gradient of this sum.
  out = jnp.sum(out.reshape(B * T, n, -1) * weights.reshape(B * T, n, 1), axis=1)
  return out.reshape(B, T, -1)


def _group(experts: jax.Array, E: int, devices: int, axes: Axes) -> jax.Array:
  """Group of each row: E groups for each device that rows go to, and a last one for experts that others reach.

  Each device holds E experts. Experts lie on the devices in the order of the mesh axes `experts`.
  """
  holder, sizes = experts // E, [lax.axis_size(name) for name in axes.experts]
  device, mine = jnp.zeros_like(experts), jnp.ones_like(experts, bool)
  for i, (name, size) in enumerate(zip(axes.experts, sizes, strict=True)):
    place = holder // math.prod(sizes[i + 1 :]) % size
    if name in axes.exchanged:
      device = device * size + place
    else:
      mine &= place == lax.axis_index(name)
  return jnp.where(mine, device * E + experts % E, devices * E)


def _exchanged(
  rows: jax.Array, counts: jax.Array, stacks: tuple[jax.Array, ...], activation: Activation, axes: Axes
) -> jax.Array:
  """Sends rows to the devices of their experts, applies the experts, and sends the results back.

  Args:
    rows: [M, D], in the order of devices and, for each device, of its experts.
    counts: int32 [X, E], number of rows for each expert of each device.
    stacks: as `Experts` has them.
    activation: of the gate.
    axes: the mesh axes.

  Returns:
    [M, D] in the same order.
  """
  devices, E = counts.shape
  there, back, arriving = routes(counts, axes.exchanged)
  # From every device all rows may come. As many rows would be multiplied if tokens were gathered instead.
  length = devices * rows.shape[0]
  received = exchange(rows, there, back, length, axes.exchanged, axes.all)
  ends = jnp.cumsum(arriving.reshape(-1))
  block = jnp.searchsorted(ends, jnp.arange(length), side="right", method="compare_all")
  order = jnp.argsort(jnp.where(block < devices * E, block % E, E))
  inverse = jnp.argsort(order)
  out = _products(_take(received, order, inverse, 1), jnp.sum(arriving, axis=0), stacks, activation, axes.all)
  return exchange(_take(out, inverse, order, 1), back, there, rows.shape[0], axes.exchanged, axes.all)


def _products(
  rows: jax.Array, sizes: jax.Array, stacks: tuple[jax.Array, ...], activation: Activation, mesh_axes: Names
) -> jax.Array:
  """Applies each expert to its group of rows: [M, D] -> [M, D]; rows that belong to no group give 0."""
  gate, up, down = stacks
  hidden = gated(*(grouped_dot(rows, w, sizes, mesh_axes) for w in (gate, up)), activation)
  return grouped_dot(hidden, down, sizes, mesh_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(x: jax.Array, order: jax.Array, inverse: jax.Array, n: int) -> jax.Array:
  """Rows of x [M, D], each repeated n times, in another order: [M * n, D].

  `inverse` is the inverse permutation of `order`: by it the gradient is gathered as well, and not scattered.
  """
  return x[order // n]


def _take_forward(x: jax.Array, order: jax.Array, inverse: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
  return x[order // n], inverse


def _take_backward(n: int, inverse: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, None]:
  dx = dy[inverse]
  if n > 1:
    dx = jnp.sum(dx.astype(jnp.float32).reshape(-1, n, dx.shape[1]), axis=1).astype(dx.dtype)
  return dx, None, None


_take.defvjp(_take_forward, _take_backward)
