"""The gated feed-forward block."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models_core.linear import Projection
from models_core.mesh import shard
from models_core.sharding import ShardingConfig


class GatedMLP(nnx.Module):
  """down(activation(gate(x)) * up(x)) (arXiv:2002.05202); what is between the products is float32, rounded once."""

  def __init__(
    self,
    embed_dim: int,
    hidden_dim: int,
    activation: Callable[[jax.Array], jax.Array],
    shd: ShardingConfig,
    *,
    rngs: nnx.Rngs,
  ):
    up, down = shd.spec("ffw_weight_df", "f d"), shd.spec("ffw_weight_fd", "d f")
    self.activation = activation
    self.act_btf = shd.spec("act_btf", "b t f")
    self.gate_proj = Projection("btd,fd->btf", (hidden_dim, embed_dim), up, rngs=rngs)
    self.up_proj = Projection("btd,fd->btf", (hidden_dim, embed_dim), up, rngs=rngs)
    self.down_proj = Projection("btf,df->btd", (embed_dim, hidden_dim), down, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    gate, up = (proj(x).astype(jnp.float32) for proj in (self.gate_proj, self.up_proj))
    hidden = (self.activation(gate) * up).astype(x.dtype)
    return self.down_proj(shard(hidden, self.act_btf))


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by its tanh approximation (arXiv:1606.08415), in float32 and rounded once."""
  return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)
