"""Qwen 2.5 (arXiv:2412.15115): grouped-query attention with biases on q, k and v, RoPE, SwiGLU, pre-norms."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from models_core.config import check_decoder, preset_rows
from models_core.layers import (
  BiasedProjection,
  CausalLM,
  Embedder,
  GatedMLP,
  Head,
  LayerCache,
  PreNormLayer,
  Projection,
  RematConfig,
  RMSNorm,
  Rotary,
  VisibleKeys,
  attend,
  decoder_layers,
  extend_cache,
  join_heads,
  make_causal_attn_mask,
  rotary,
  rotate,
  shard,
  silu,
  split_heads,
)
from models_core.rope_scaling import RopeScaling
from models_core.sharding import ShardingConfig
from models_qwen.windows import layer_windows

__all__ = ["ModelConfig", "Qwen2", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


_SIZES = ("num_layers", "vocab_size", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")
_qwen2p5 = preset_rows(*_SIZES, "rope_theta", "norm_eps", "use_tied_embedding")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Configuration of a Qwen 2.5 model.

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
    rope_scaling: scaling of the RoPE frequencies, such as YarnScaling, or None.
    use_tied_embedding: whether the head is the embedding.
    sliding_window: tokens that a query sees in sliding layers, its own included; None if no layer slides.
    max_window_layers: index of the first sliding layer; layers before it see all tokens.
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
  use_tied_embedding: bool = False
  sliding_window: int | None = None
  max_window_layers: int = 0
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE
  attn_implementation: str = "auto"
  scan_layers: bool = False

  def __post_init__(self) -> None:
    check_decoder(self)

  # fmt: off
  # One preset for each repository, since theta and eps differ within a size. Variants not listed equal their size.
  #                                                                     L   V       D     F      N   H    K  theta eps   tied
  qwen2p5_0p5b              = _qwen2p5("Qwen 2.5 0.5B.",                 24, 151936, 896,  4864,  14, 64,  2, 1e6, 1e-6, True)
  qwen2p5_1p5b              = _qwen2p5("Qwen 2.5 1.5B.",                 28, 151936, 1536, 8960,  12, 128, 2, 1e6, 1e-6, True)
  qwen2p5_3b                = _qwen2p5("Qwen 2.5 3B.",                   36, 151936, 2048, 11008, 16, 128, 2, 1e6, 1e-6, True)
  qwen2p5_7b                = _qwen2p5("Qwen 2.5 7B.",                   28, 152064, 3584, 18944, 28, 128, 4, 1e6, 1e-6, False)
  qwen2p5_14b               = _qwen2p5("Qwen 2.5 14B.",                  48, 152064, 5120, 13824, 40, 128, 8, 1e6, 1e-5, False)
  qwen2p5_14b_instruct      = _qwen2p5("Qwen 2.5 14B Instruct.",         48, 152064, 5120, 13824, 40, 128, 8, 1e6, 1e-6, False)
  qwen2p5_32b               = _qwen2p5("Qwen 2.5 32B.",                  64, 152064, 5120, 27648, 40, 128, 8, 1e6, 1e-5, False)
  qwen2p5_32b_instruct      = _qwen2p5("Qwen 2.5 32B Instruct.",         64, 152064, 5120, 27648, 40, 128, 8, 1e6, 1e-6, False)
  qwen2p5_72b               = _qwen2p5("Qwen 2.5 72B.",                  80, 152064, 8192, 29568, 64, 128, 8, 1e6, 1e-5, False)
  qwen2p5_72b_instruct      = _qwen2p5("Qwen 2.5 72B Instruct.",         80, 152064, 8192, 29568, 64, 128, 8, 1e6, 1e-6, False)
  qwen2p5_7b_instruct_1m    = _qwen2p5("Qwen 2.5 7B Instruct 1M.",       28, 152064, 3584, 18944, 28, 128, 4, 1e7, 1e-5, False)
  qwen2p5_14b_instruct_1m   = _qwen2p5("Qwen 2.5 14B Instruct 1M.",      48, 152064, 5120, 13824, 40, 128, 8, 1e7, 1e-5, False)
  qwen2p5_math_1p5b         = _qwen2p5("Qwen 2.5-Math 1.5B.",            28, 151936, 1536, 8960,  12, 128, 2, 1e4, 1e-6, True)
  qwen2p5_math_7b           = _qwen2p5("Qwen 2.5-Math 7B.",              28, 152064, 3584, 18944, 28, 128, 4, 1e4, 1e-6, False)
  qwen2p5_math_72b          = _qwen2p5("Qwen 2.5-Math 72B.",             80, 152064, 8192, 29568, 64, 128, 8, 1e4, 1e-5, False)
  qwen2p5_math_72b_instruct = _qwen2p5("Qwen 2.5-Math 72B Instruct.",    80, 152064, 8192, 29568, 64, 128, 8, 1e4, 1e-6, False)
  deepseek_r1_distill_qwen_1p5b = _qwen2p5("DeepSeek-R1-Distill-Qwen 1.5B.", 28, 151936, 1536, 8960,  12, 128, 2, 1e4, 1e-6, False)
  # fmt: on
  # Models with the same configuration under other names.
  qwen2p5_coder_0p5b = qwen2p5_0p5b
  qwen2p5_coder_1p5b = qwen2p5_1p5b
  qwen2p5_coder_3b = qwen2p5_3b
  qwen2p5_coder_7b = qwen2p5_7b
  qwen2p5_coder_14b = deepseek_r1_distill_qwen_14b = qwen2p5_14b
  qwen2p5_coder_14b_instruct = qwen2p5_14b_instruct
  qwen2p5_coder_32b = qwq_32b = deepseek_r1_distill_qwen_32b = qwen2p5_32b
  qwen2p5_coder_32b_instruct = qwen2p5_32b_instruct
  deepseek_r1_distill_qwen_7b = qwen2p5_math_7b


class Attention(nnx.Module):
  """Grouped-query self-attention; q, k and v have biases, the output projection has none."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "(n h) d"), shd.spec("kv_weight_dnh", "(k h) d")
    o = shd.spec("o_weight_nhd", "d (n h)")
    q_bias, kv_bias = shd.spec("q_bias_nh", "(n h)"), shd.spec("kv_bias_nh", "(k h)")
    self.config = config
    self.num_heads, self.num_kv_heads, self.head_dim = N, K, H
    self.q_proj = BiasedProjection(N * H, D, q, q_bias, heads=(N, None), rngs=rngs)
    self.k_proj = BiasedProjection(K * H, D, kv, kv_bias, heads=(K, None), rngs=rngs)
    self.v_proj = BiasedProjection(K * H, D, kv, kv_bias, heads=(K, None), rngs=rngs)
    self.o_proj = Projection(D, N * H, o, heads=(None, N), rngs=rngs)

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


class Qwen2(CausalLM):
  """Qwen 2.5 and R1-Distill-Qwen: q, k and v have biases, and the last layers may have a sliding window."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.vocab_size, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    attention = functools.partial(Attention, config)
    mlp = functools.partial(GatedMLP, D, config.hidden_dim, silu, shd)
    make = lambda _: PreNormLayer(config, attention, mlp, rngs=rngs)
    self.layers = decoder_layers(config, self.windows(), make)
    self.final_norm = RMSNorm(D, config.norm_eps, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    if not config.use_tied_embedding:
      self.lm_head = Head(config.vocab_size, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def windows(self) -> tuple[int | None, ...]:
    """Sliding window of each layer in tokens; None for a layer that sees all tokens."""
    config = self.config
    return layer_windows(config.sliding_window, config.max_window_layers, config.num_layers)

  def _rotary(self, window: int | None) -> Rotary:
    return rotary(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

  def _logits(self, hidden: jax.Array) -> jax.Array:
    return self.embedder.decode(hidden) if self.config.use_tied_embedding else self.lm_head(hidden)
