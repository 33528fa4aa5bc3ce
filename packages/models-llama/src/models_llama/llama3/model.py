"""Llama 3 (arXiv:2407.21783): grouped-query attention, RoPE with the 3.1 scaling, SwiGLU, pre-norms."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from models_core.config import check_decoder, preset_rows
from models_core.layers import (
  CausalLM,
  Embedder,
  GatedMLP,
  Head,
  LayerCache,
  PreNormLayer,
  RematConfig,
  RMSNorm,
  Rotary,
  VisibleKeys,
  attend,
  decoder_layers,
  extend_cache,
  join_heads,
  make_causal_attn_mask,
  projection,
  rotary,
  rotate,
  shard,
  silu,
  split_heads,
)
from models_core.rope_scaling import Llama3Scaling, RopeScaling
from models_core.sharding import ShardingConfig

__all__ = ["Llama3", "ModelConfig", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


_SIZES = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim")
_SHARED = {"vocab_size": 128256, "num_kv_heads": 8, "rope_theta": 500_000.0, "norm_eps": 1e-5}
_SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
_SCALING_3P2 = dataclasses.replace(_SCALING, factor=32.0)

_llama3 = preset_rows(*_SIZES, **_SHARED)
_llama3p1 = preset_rows(*_SIZES, **_SHARED, rope_scaling=_SCALING)
_llama3p2 = preset_rows(*_SIZES, **_SHARED, rope_scaling=_SCALING_3P2, weight_tying=True)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Configuration of a Llama model.

  Attributes:
    num_layers: number of decoder layers.
    vocab_size: V, rows of the embedding.
    embed_dim: D, width of the model.
    hidden_dim: F, width of the feed-forward block.
    num_heads: N, query heads.
    head_dim: H, dimension of a head.
    num_kv_heads: K, key and value heads.
    rope_theta: base of the RoPE frequencies.
    norm_eps: added to the mean square in each norm.
    rope_scaling: scaling of the RoPE frequencies; None in Llama 3, set since Llama 3.1.
    weight_tying: whether the head is the embedding.
    attention_bias: whether the four projections of attention have biases.
    mlp_bias: whether the three projections of the feed-forward block have biases.
    shd_config: mesh axes of parameters and activations.
    remat_config: activations that the backward pass recomputes.
    attn_implementation: how attention is computed, one of `models_core.layers.ATTENTION_IMPLEMENTATIONS`.
    scan_layers: whether each parameter of the layers is one array of them all, and one scan runs them.
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
  attention_bias: bool = False
  mlp_bias: bool = False
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE
  attn_implementation: str = "auto"
  scan_layers: bool = False

  def __post_init__(self) -> None:
    check_decoder(self)

  # fmt: off
  #                                            L    D      F      N    H
  llama3_8b     = _llama3("Llama 3 8B.",       32,  4096,  14336, 32,  128)
  llama3_70b    = _llama3("Llama 3 70B.",      80,  8192,  28672, 64,  128)
  llama3p1_8b   = _llama3p1("Llama 3.1 8B.",   32,  4096,  14336, 32,  128)
  llama3p1_70b  = _llama3p1("Llama 3.1 70B.",  80,  8192,  28672, 64,  128)
  llama3p1_405b = _llama3p1("Llama 3.1 405B.", 126, 16384, 53248, 128, 128)
  llama3p2_1b   = _llama3p2("Llama 3.2 1B.",   16,  2048,  8192,  32,  64)
  llama3p2_3b   = _llama3p2("Llama 3.2 3B.",   28,  3072,  8192,  24,  128)
  # fmt: on
  # Models with the same configuration under other names.
  llama3p3_70b = deepseek_r1_distill_llama_70b = llama3p1_70b
  deepseek_r1_distill_llama_8b = llama3p1_8b


class Attention(nnx.Module):
  """Grouped-query self-attention."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "(n h) d"), shd.spec("kv_weight_dnh", "(k h) d")
    o = shd.spec("o_weight_nhd", "d (n h)")
    self.config = config
    self.num_heads, self.num_kv_heads, self.head_dim = N, K, H
    q_bias = kv_bias = o_bias = None
    if config.attention_bias:
      q_bias, kv_bias = shd.spec("q_bias_nh", "(n h)"), shd.spec("kv_bias_nh", "(k h)")
      o_bias = shd.spec("o_weight_nhd", "d")
    self.q_proj = projection(N * H, D, q, q_bias, heads=(N, None), rngs=rngs)
    self.k_proj = projection(K * H, D, kv, kv_bias, heads=(K, None), rngs=rngs)
    self.v_proj = projection(K * H, D, kv, kv_bias, heads=(K, None), rngs=rngs)
    self.o_proj = projection(D, N * H, o, o_bias, heads=(None, N), rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    act_btnh = self.config.shd_config.spec("act_btnh", "b t n h")
    q = shard(rotate(split_heads(self.q_proj(x), self.num_heads), positions, rotary), act_btnh)
    k = shard(rotate(split_heads(self.k_proj(x), self.num_kv_heads), positions, rotary), act_btnh)
    v = shard(split_heads(self.v_proj(x), self.num_kv_heads), act_btnh)
    cache, k, v = extend_cache(cache, k, v, positions, act_btnh)
    kind = self.config.attn_implementation
    out = attend(q, k, v, visible, scale=self.config.head_dim**-0.5, implementation=kind, spec=act_btnh)
    return self.o_proj(join_heads(shard(out, act_btnh))), cache


class Llama3(CausalLM):
  """The plain decoder: Llama 3, and 3.1, 3.2 and 3.3 with scaled RoPE frequencies."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.vocab_size, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    attention = functools.partial(Attention, config)
    mlp = functools.partial(GatedMLP, D, config.hidden_dim, silu, shd, bias=config.mlp_bias)
    make = lambda _: PreNormLayer(config, attention, mlp, rngs=rngs)
    self.layers = decoder_layers(config, self.windows(), make)
    self.final_norm = RMSNorm(D, config.norm_eps, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    if not config.weight_tying:
      self.lm_head = Head(config.vocab_size, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def _rotary(self, window: int | None) -> Rotary:
    return rotary(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

  def _logits(self, hidden: jax.Array) -> jax.Array:
    return self.embedder.decode(hidden) if self.config.weight_tying else self.lm_head(hidden)
