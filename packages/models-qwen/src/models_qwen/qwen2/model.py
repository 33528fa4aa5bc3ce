"""Qwen 2.5 (arXiv:2412.15115): grouped-query attention with biases on q, k and v, RoPE, SwiGLU, pre-norms."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from models_core.config import check_decoder
from models_core.layers import (
  BiasedProjection,
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
from models_core.rope_scaling import RopeScaling
from models_core.sharding import ShardingConfig

__all__ = ["ModelConfig", "Qwen2", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


def _preset(*fields: Any, tied: bool = False) -> classmethod[Any, [], Any]:
  """A published model, by the fields of its configuration in their order."""
  return classmethod(lambda cls: cls(*fields, use_tied_embedding=tied))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Numbers of a Qwen 2.5 model.

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
    rope_scaling: of the RoPE frequencies, such as YarnScaling.
    use_tied_embedding: the head is the embedding.
    sliding_window: tokens that a query sees, its own among them, in layers that slide; None where none does.
    max_window_layers: the first layer that slides; those below see all.
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
  use_tied_embedding: bool = False
  sliding_window: int | None = None
  max_window_layers: int = 0
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE

  def __post_init__(self):
    check_decoder(self)

  # fmt: off
  # Keyed by repository, for theta and eps differ within a size. Variants that are not here are as their size.
  #                                   L   V       D     F      N   H    K  theta eps
  qwen2p5_0p5b               = _preset(24, 151936, 896,  4864,  14, 64,  2, 1e6, 1e-6, tied=True)
  qwen2p5_1p5b               = _preset(28, 151936, 1536, 8960,  12, 128, 2, 1e6, 1e-6, tied=True)
  qwen2p5_3b                 = _preset(36, 151936, 2048, 11008, 16, 128, 2, 1e6, 1e-6, tied=True)
  qwen2p5_7b                 = _preset(28, 152064, 3584, 18944, 28, 128, 4, 1e6, 1e-6)
  qwen2p5_14b                = _preset(48, 152064, 5120, 13824, 40, 128, 8, 1e6, 1e-5)
  qwen2p5_14b_instruct       = _preset(48, 152064, 5120, 13824, 40, 128, 8, 1e6, 1e-6)
  qwen2p5_32b                = _preset(64, 152064, 5120, 27648, 40, 128, 8, 1e6, 1e-5)
  qwen2p5_32b_instruct       = _preset(64, 152064, 5120, 27648, 40, 128, 8, 1e6, 1e-6)
  qwen2p5_72b                = _preset(80, 152064, 8192, 29568, 64, 128, 8, 1e6, 1e-5)
  qwen2p5_72b_instruct       = _preset(80, 152064, 8192, 29568, 64, 128, 8, 1e6, 1e-6)
  qwen2p5_7b_instruct_1m     = _preset(28, 152064, 3584, 18944, 28, 128, 4, 1e7, 1e-5)
  qwen2p5_14b_instruct_1m    = _preset(48, 152064, 5120, 13824, 40, 128, 8, 1e7, 1e-5)
  qwen2p5_coder_0p5b         = qwen2p5_0p5b
  qwen2p5_coder_1p5b         = qwen2p5_1p5b
  qwen2p5_coder_3b           = qwen2p5_3b
  qwen2p5_coder_7b           = qwen2p5_7b
  qwen2p5_coder_14b          = qwen2p5_14b
  qwen2p5_coder_14b_instruct = qwen2p5_14b_instruct
  qwen2p5_coder_32b          = qwen2p5_32b
  qwen2p5_coder_32b_instruct = qwen2p5_32b_instruct
  qwen2p5_math_1p5b          = _preset(28, 151936, 1536, 8960,  12, 128, 2, 1e4, 1e-6, tied=True)
  qwen2p5_math_7b            = _preset(28, 152064, 3584, 18944, 28, 128, 4, 1e4, 1e-6)
  qwen2p5_math_72b           = _preset(80, 152064, 8192, 29568, 64, 128, 8, 1e4, 1e-5)
  qwen2p5_math_72b_instruct  = _preset(80, 152064, 8192, 29568, 64, 128, 8, 1e4, 1e-6)
  qwq_32b                    = qwen2p5_32b
  deepseek_r1_distill_qwen_1p5b = _preset(28, 151936, 1536, 8960, 12, 128, 2, 1e4, 1e-6)
  deepseek_r1_distill_qwen_7b   = qwen2p5_math_7b
  deepseek_r1_distill_qwen_14b  = qwen2p5_14b
  deepseek_r1_distill_qwen_32b  = qwen2p5_32b
  # fmt: on


class Attention(nnx.Module):
  """Grouped-query self-attention; q, k and v have biases, the output has none."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "n h d"), shd.spec("kv_weight_dnh", "k h d")
    q_bias, kv_bias = shd.spec("q_bias_nh", "n h"), shd.spec("kv_bias_nh", "k h")
    self.config = config
    self.q_proj = BiasedProjection("btd,nhd->btnh", (N, H, D), q, q_bias, rngs=rngs)
    self.k_proj = BiasedProjection("btd,khd->btkh", (K, H, D), kv, kv_bias, rngs=rngs)
    self.v_proj = BiasedProjection("btd,khd->btkh", (K, H, D), kv, kv_bias, rngs=rngs)
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


class Qwen2(CausalLM):
  """Qwen 2.5 and R1-Distill-Qwen. Peculiar to it: biases on q, k and v, and windows from some layer on."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.vocab_size, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
    self.final_norm = RMSNorm(D, config.norm_eps, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    if not config.use_tied_embedding:
      self.lm_head = Head(config.vocab_size, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def _hidden(self, tokens, positions, cache, attention_mask, segment_ids):
    config = self.config
    rope = rotary(config.head_dim, config.rope_theta, config.rope_scaling)
    keys = (positions, cache and cache["layer_0"], attention_mask, segment_ids)
    everything, window = visible_keys(*keys), visible_keys(*keys, window=config.sliding_window)
    layer_call = config.remat_config.layer(DecoderLayer.__call__)
    x = shard(self.embedder.encode(tokens), config.shd_config.spec("act_btd", "b t d"))
    new_cache: Cache = {}
    for i, layer in enumerate(self.layers):
      name, mask = f"layer_{i}", window if i >= config.max_window_layers else everything
      x, new_cache[name] = layer_call(layer, x, positions, rope, cache and cache[name], mask)
    return self.final_norm(x), new_cache if cache is not None else None

  def _logits(self, hidden):
    return self.embedder.decode(hidden) if self.config.use_tied_embedding else self.lm_head(hidden)
