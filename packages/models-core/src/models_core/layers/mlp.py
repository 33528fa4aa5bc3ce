"""The gated feed-forward block."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models_core.layers.linear import projection
from models_core.layers.mesh import shard
from models_core.sharding import ShardingConfig


class GatedMLP(nnx.Module):
  """down(activation(gate(x)) * up(x)) (arXiv:2002.05202).

  Activation and product are computed in float32 and rounded once, before the down projection.
  """

  def __init__(
    self,
    embed_dim: int,
    hidden_dim: int,
    activation: Callable[[jax.Array], jax.Array],
    shd: ShardingConfig,
    *,
    rngs: nnx.Rngs,
    bias: bool = False,
  ):
    """Makes the projections.

    Args:
      embed_dim: D, size of the input and of the result.
      hidden_dim: F, size between the projections.
      activation: of the gate.
      shd: mesh axes.
      rngs: source of random keys.
      bias: whether each projection has a bias.
    """
    up, down = shd.spec("ffw_weight_df", "f d"), shd.spec("ffw_weight_fd", "d f")
    up_bias = shd.spec("ffw_weight_df", "f") if bias else None
    down_bias = shd.spec("ffw_weight_fd", "d") if bias else None
    self.activation = activation
    self.act_btf = shd.spec("act_btf", "b t f")
    self.gate_proj = projection(hidden_dim, embed_dim, up, up_bias, rngs=rngs)
    self.up_proj = projection(hidden_dim, embed_dim, up, up_bias, rngs=rngs)
    self.down_proj = projection(embed_dim, hidden_dim, down, down_bias, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    hidden = gated(self.gate_proj(x), self.up_proj(x), self.activation)
    return self.down_proj(shard(hidden, self.act_btf))


# For the backward pass only gate and up are kept: the float32 values are larger, and cheap to recompute.
@functools.partial(jax.checkpoint, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Computes activation(gate) * up in float32, rounded once to the dtype of gate. All shapes are equal."""
  return (activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def silu(x: jax.Array) -> jax.Array:
  """x * sigmoid(x) (arXiv:1702.03118). Unlike `jax.nn.silu`, it can be pickled."""
  return jax.nn.silu(x)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU in its tanh approximation (arXiv:1606.08415), computed in float32 and rounded once to the dtype of x."""
  return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)
