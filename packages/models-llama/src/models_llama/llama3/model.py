"""Llama 3 (arXiv:2407.21783): grouped-query attention, RoPE with the 3.1 scaling, SwiGLU, pre-norms."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from models_core.config import check_decoder
from models_core.layers import (
  Cache,
  CausalLM,
  Embedder,
  GatedMLP,
  Head,
  LayerCache,
  Projection,
  RematConfig,
  RMSNorm,
  Rotary,
  attend,
  make_causal_attn_mask,
  rotary,
  rotate,
  shard,
  update,
  visible_keys,
)
from models_core.rope_scaling import Llama3Scaling, RopeScaling
from models_core.sharding import ShardingConfig

__all__ = ["Llama3", "ModelConfig", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Numbers of a Llama model.

  Attributes:
    num_layers: decoder layers.
    vocab_size: V, rows of the embedding.
    embed_dim: D.
    hidden_dim: F, of the feed-forward block.
    num_heads: N, query heads.
    head_dim: H.
    num_kv_heads: K, key and value heads.
    rope_theta: base of the RoPE frequencies.
    norm_eps: added to the mean square in each norm.
    rope_scaling: of the RoPE frequencies; None up to Llama 3.
    weight_tying: the head is the embedding.
    shd_config: mesh axes of parameters and activations.
    remat_config: what the backward pass recomputes.
  """

  num_layers: int
  vocab_size: int
  embed_dim: int
  hidden_dim: int
  num_heads: int
  head_dim: int
  num_kv_heads: int
  rope_theta: float
  norm_eps: float
  rope_scaling: RopeScaling | None = None
  weight_tying: bool = False
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE

  def __post_init__(self):
    check_decoder(self)

  @classmethod
  def llama3_8b(cls) -> ModelConfig:
    """Llama 3 8B."""
    return cls(**_SHAPES["8b"])

  @classmethod
  def llama3_70b(cls) -> ModelConfig:
    """Llama 3 70B."""
    return cls(**_SHAPES["70b"])

  @classmethod
  def llama3p1_8b(cls) -> ModelConfig:
    """Llama 3.1 8B."""
    return cls(**_SHAPES["8b"], rope_scaling=_SCALING_3P1)

  @classmethod
  def llama3p1_70b(cls) -> ModelConfig:
    """Llama 3.1 70B."""
    return cls(**_SHAPES["70b"], rope_scaling=_SCALING_3P1)

  @classmethod
  def llama3p1_405b(cls) -> ModelConfig:
    """Llama 3.1 405B."""
    return cls(**_SHAPES["405b"], rope_scaling=_SCALING_3P1)

  @classmethod
  def llama3p2_1b(cls) -> ModelConfig:
    """Llama 3.2 1B."""
    return cls(**_SHAPES["1b"], rope_scaling=_SCALING_3P2, weight_tying=True)

  @classmethod
  def llama3p2_3b(cls) -> ModelConfig:
    """Llama 3.2 3B."""
    return cls(**_SHAPES["3b"], rope_scaling=_SCALING_3P2, weight_tying=True)

  @classmethod
  def llama3p3_70b(cls) -> ModelConfig:
    """Llama 3.3 70B, which is Llama 3.1's."""
    return cls.llama3p1_70b()

  @classmethod
  def deepseek_r1_distill_llama_8b(cls) -> ModelConfig:
    """R1-Distill-Llama 8B, which is Llama 3.1's."""
    return cls.llama3p1_8b()

  @classmethod
  def deepseek_r1_distill_llama_70b(cls) -> ModelConfig:
    """R1-Distill-Llama 70B, which is Llama 3.3's."""
    return cls.llama3p1_70b()


_SCALING_3P1 = Llama3Scaling(
  factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
)
_SCALING_3P2 = dataclasses.replace(_SCALING_3P1, factor=32.0)


def _shape(num_layers: int, embed_dim: int, hidden_dim: int, num_heads: int, head_dim: int) -> dict[str, Any]:
  """What differs between sizes, and what all of them share."""
  return {
    "num_layers": num_layers,
    "vocab_size": 128256,
    "embed_dim": embed_dim,
    "hidden_dim": hidden_dim,
    "num_heads": num_heads,
    "head_dim": head_dim,
    "num_kv_heads": 8,
    "rope_theta": 500_000.0,
    "norm_eps": 1e-5,
  }


_SHAPES = {
  #              L    D      F      N    H
  "1b": _shape(16, 2048, 8192, 32, 64),
  "3b": _shape(28, 3072, 8192, 24, 128),
  "8b": _shape(32, 4096, 14336, 32, 128),
  "70b": _shape(80, 8192, 28672, 64, 128),
  "405b": _shape(126, 16384, 53248, 128, 128),
}


class Attention(nnx.Module):
  """Grouped-query self-attention."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "n h d"), shd.spec("kv_weight_dnh", "k h d")
    self.config = config
    self.q_proj = Projection("btd,nhd->btnh", (N, H, D), q, rngs=rngs)
    self.k_proj = Projection("btd,khd->btkh", (K, H, D), kv, rngs=rngs)
    self.v_proj = Projection("btd,khd->btkh", (K, H, D), kv, rngs=rngs)
    self.o_proj = Projection("btnh,dnh->btd", (D, N, H), shd.spec("o_weight_nhd", "d n h"), rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, mask: jax.Array
  ) -> tuple[jax.Array, LayerCache | None]:
    act_btnh = self.config.shd_config.spec("act_btnh", "b t n h")
    q = shard(rotate(self.q_proj(x), positions, *rotary), act_btnh)
    k = shard(rotate(self.k_proj(x), positions, *rotary), act_btnh)
    v = shard(self.v_proj(x), act_btnh)
    if cache is not None:
      cache = update(cache, k, v, positions)
      k, v = cache["k"], cache["v"]
    out = attend(q, k, v, mask, scale=self.config.head_dim**-0.5)
    return self.o_proj(shard(out, act_btnh)), cache


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    norm = config.shd_config.spec("rms_norm_weight", "d")
    self.config = config
    self.input_layernorm = RMSNorm(config.embed_dim, config.norm_eps, norm, rngs=rngs)
    self.attn = Attention(config, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(config.embed_dim, config.norm_eps, norm, rngs=rngs)
    self.mlp = GatedMLP(config.embed_dim, config.hidden_dim, jax.nn.silu, config.shd_config, rngs=rngs)

  def __call__(self, x, positions, rotary, cache, mask):
    attention = self.config.remat_config.block(Attention.__call__)
    act_btd = self.config.shd_config.spec("act_btd", "b t d")
    out, cache = attention(self.attn, self.input_layernorm(x), positions, rotary, cache, mask)
    x = shard(x + out, act_btd)
    return shard(x + self.mlp(self.post_attention_layernorm(x)), act_btd), cache


class Llama3(CausalLM):
  """Llama 3, 3.1, 3.2, 3.3. Peculiar to it: nothing but the scaling of long wavelengths in RoPE since 3.1."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.vocab_size, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
    self.final_norm = RMSNorm(D, config.norm_eps, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    if not config.weight_tying:
      self.lm_head = Head(config.vocab_size, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def _hidden(self, tokens, positions, cache, attention_mask, segment_ids):
    config = self.config
    rope = rotary(config.head_dim, config.rope_theta, config.rope_scaling)
    mask = visible_keys(positions, cache and cache["layer_0"], attention_mask, segment_ids)
    layer_call = config.remat_config.layer(DecoderLayer.__call__)
    x = shard(self.embedder.encode(tokens), config.shd_config.spec("act_btd", "b t d"))
    new_cache: Cache = {}
    for i, layer in enumerate(self.layers):
      name = f"layer_{i}"
      x, new_cache[name] = layer_call(layer, x, positions, rope, cache and cache[name], mask)
    return self.final_norm(x), new_cache if cache is not None else None

  def _logits(self, hidden):
    return self.embedder.decode(hidden) if self.config.weight_tying else self.lm_head(hidden)
