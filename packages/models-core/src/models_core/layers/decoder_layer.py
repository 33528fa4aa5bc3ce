"""The decoder layer of Llama and Qwen: a norm before attention and a norm before the feed-forward block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from models_core.layers.cache import LayerCache
from models_core.layers.mesh import shard
from models_core.layers.norm import RMSNorm
from models_core.layers.rope import Rotary
from models_core.layers.visibility import VisibleKeys


class PreNormLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: Any, attention: Callable[..., Any], mlp: Callable[..., Any], *, rngs: nnx.Rngs):
    """Makes norms and blocks in the order of the forward pass, which decides the random numbers that each one draws.

    Args:
      config: has embed_dim, norm_eps, shd_config and remat_config.
      attention: called with `rngs=`, returns the attention block: `attn(x, positions, rotary, cache, visible)` -> x
        [B, T, D] and the cache.
      mlp: called with `rngs=`, returns the feed-forward block: `mlp(x)` -> [B, T, D].
      rngs: source of random keys.
    """
    dim, eps, spec = config.embed_dim, config.norm_eps, config.shd_config.spec("rms_norm_weight", "d")
    self.config = config
    self.input_layernorm = RMSNorm(dim, eps, spec, rngs=rngs)
    self.attn = attention(rngs=rngs)
    self.post_attention_layernorm = RMSNorm(dim, eps, spec, rngs=rngs)
    self.mlp = mlp(rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    attention = self.config.remat_config.block(self.attn)
    act_btd = self.config.shd_config.spec("act_btd", "b t d")
    out, cache = attention(self.input_layernorm(x), positions, rotary, cache, visible)
    x = shard(x + out, act_btd)
    return shard(x + self.mlp(self.post_attention_layernorm(x)), act_btd), cache
