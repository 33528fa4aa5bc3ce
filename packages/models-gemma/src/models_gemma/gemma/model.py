"""Gemma 1 (arXiv:2403.08295) and 2 (arXiv:2408.00118).

Norms multiply by 1 + w, embeddings are scaled by sqrt(D), the head is the embedding unless it was untied, and GELU is
its tanh approximation. Gemma 2 adds norms after attention and after the feed-forward block, soft caps on logits, and a sliding
window in every other layer.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from models_core.config import check_decoder, preset_rows
from models_core.layers import (
  Embedder,
  GatedMLP,
  Head,
  LayerCache,
  OffsetRMSNorm,
  Projection,
  RematConfig,
  Rotary,
  VisibleKeys,
  attend,
  decoder_layers,
  extend_cache,
  gelu_tanh,
  join_heads,
  make_causal_attn_mask,
  rotary,
  rotate,
  shard,
  split_heads,
)
from models_core.sharding import ShardingConfig
from models_gemma.attention_types import AttentionType, checked, every
from models_gemma.causal_lm import GemmaLM

__all__ = ["AttentionType", "Gemma", "ModelConfig", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


_SIZES = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")
_SHARED = {"num_embed": 256000, "rope_theta": 10_000.0, "norm_eps": 1e-6}

# attention_types has an entry for each layer of the largest size; smaller sizes drop the rest.
_gemma1 = preset_rows(
  *_SIZES,
  "query_pre_attn_scalar",
  **_SHARED,
  final_logit_softcap=None,
  use_post_attn_norm=False,
  use_post_ffw_norm=False,
  attention_types=every(1, 28),
)
_gemma2 = preset_rows(
  *_SIZES,
  "query_pre_attn_scalar",
  **_SHARED,
  final_logit_softcap=30.0,
  use_post_attn_norm=True,
  use_post_ffw_norm=True,
  attention_types=every(2, 46),
  attn_logits_soft_cap=50.0,
  sliding_window_size=4096,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Configuration of a Gemma 1 or 2 model.

  Attributes:
    num_layers: number of decoder layers.
    num_embed: V, rows of the embedding.
    embed_dim: D, width of the model.
    hidden_dim: F, width of the feed-forward block.
    num_heads: N, query heads.
    head_dim: H, dimension of a head; N * H may differ from D.
    num_kv_heads: K, key and value heads.
    final_logit_softcap: bounds the logits; None in Gemma 1.
    use_post_attn_norm: whether a norm follows attention, as in Gemma 2.
    use_post_ffw_norm: whether a norm follows the feed-forward block, as in Gemma 2.
    attention_types: type of each layer; entries beyond the last layer are dropped.
    rope_theta: base of the RoPE frequencies.
    norm_eps: added to the mean square in each norm.
    query_pre_attn_scalar: attention logits are multiplied by query_pre_attn_scalar ** -0.5; equals head_dim in Gemma 1.
    attn_logits_soft_cap: bounds the attention logits; None in Gemma 1.
    sliding_window_size: tokens that a query sees in sliding layers, its own included; None if no layer slides.
    weight_tying: whether the head is the embedding, as in all published models.
    shd_config: mesh axes of parameters and activations.
    remat_config: activations that the backward pass recomputes.
    attn_implementation: how attention is computed, one of `models_core.layers.ATTENTION_IMPLEMENTATIONS`.
    scan_layers: whether each parameter of the layers is one array of them all, and one scan runs them.
  """

  num_layers: int
  num_embed: int
  embed_dim: int
  hidden_dim: int
  num_heads: int
  head_dim: int
  num_kv_heads: int
  final_logit_softcap: float | None
  use_post_attn_norm: bool
  use_post_ffw_norm: bool
  attention_types: tuple[AttentionType, ...]
  rope_theta: float
  norm_eps: float
  query_pre_attn_scalar: int
  attn_logits_soft_cap: float | None = None
  sliding_window_size: int | None = None
  weight_tying: bool = True
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE
  attn_implementation: str = "auto"
  scan_layers: bool = False

  def __post_init__(self) -> None:
    check_decoder(self)
    types = checked(self.attention_types, self.num_layers, self.sliding_window_size)
    object.__setattr__(self, "attention_types", types)

  # fmt: off
  #                                     L   D     F      N   H    K   query scalar
  gemma_2b    = _gemma1("Gemma 2B.",    18, 2048, 16384, 8,  256, 1,  256)
  gemma_7b    = _gemma1("Gemma 7B.",    28, 3072, 24576, 16, 256, 16, 256)
  gemma2_2b   = _gemma2("Gemma 2 2B.",  26, 2304, 9216,  8,  256, 4,  256)
  gemma2_9b   = _gemma2("Gemma 2 9B.",  42, 3584, 14336, 16, 256, 8,  256)
  gemma2_27b  = _gemma2("Gemma 2 27B.", 46, 4608, 36864, 32, 128, 16, 144)
  # fmt: on
  # Models with the same configuration under other names.
  gemma1p1_2b = codegemma_2b = codegemma1p1_2b = gemma_2b
  gemma1p1_7b = codegemma_7b = codegemma1p1_7b = gemma_7b
  shieldgemma_2b, shieldgemma_9b, shieldgemma_27b = gemma2_2b, gemma2_9b, gemma2_27b


class Attention(nnx.Module):
  """Grouped-query self-attention; Gemma 2 soft-caps its logits."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "(n h) d"), shd.spec("kv_weight_dnh", "(k h) d")
    o = shd.spec("o_weight_nhd", "d (n h)")
    self.config = config
    self.num_heads, self.num_kv_heads, self.head_dim = N, K, H
    self.q_proj = Projection(N * H, D, q, heads=(N, None), rngs=rngs)
    self.k_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.v_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.o_proj = Projection(D, N * H, o, heads=(None, N), rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    config = self.config
    act_btnh = config.shd_config.spec("act_btnh", "b t n h")
    q = shard(rotate(split_heads(self.q_proj(x), self.num_heads), positions, rotary), act_btnh)
    k = shard(rotate(split_heads(self.k_proj(x), self.num_kv_heads), positions, rotary), act_btnh)
    v = shard(split_heads(self.v_proj(x), self.num_kv_heads), act_btnh)
    cache, k, v = extend_cache(cache, k, v, positions, act_btnh)
    out = attend(
      q,
      k,
      v,
      visible,
      scale=config.query_pre_attn_scalar**-0.5,
      soft_cap=config.attn_logits_soft_cap,
      implementation=config.attn_implementation,
      spec=act_btnh,
    )
    return self.o_proj(join_heads(shard(out, act_btnh))), cache


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)). Gemma 2 also normalises the results of attention and mlp."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, spec = config.embed_dim, config.shd_config.spec("rms_norm_weight", "d")
    norm = functools.partial(OffsetRMSNorm, D, config.norm_eps, spec, rngs=rngs)
    self.config = config
    self.input_layernorm = norm()
    self.attn = Attention(config, rngs=rngs)
    # Gemma 1 calls its norm before the feed-forward block "post_attention_layernorm".
    if config.use_post_attn_norm:
      self.post_attn_norm = norm()
      self.pre_ffw_norm = norm()
    else:
      self.post_attention_layernorm = norm()
    self.mlp = GatedMLP(D, config.hidden_dim, gelu_tanh, config.shd_config, rngs=rngs)
    if config.use_post_ffw_norm:
      self.post_ffw_norm = norm()

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    config = self.config
    attention = config.remat_config.block(self.attn)
    act_btd = config.shd_config.spec("act_btd", "b t d")
    out, cache = attention(self.input_layernorm(x), positions, rotary, cache, visible)
    if config.use_post_attn_norm:
      x = shard(self.post_attn_norm.add_to(x, out), act_btd)
      out = self.mlp(self.pre_ffw_norm(x))
    else:
      x = shard(x + out, act_btd)
      out = self.mlp(self.post_attention_layernorm(x))
    x = self.post_ffw_norm.add_to(x, out) if config.use_post_ffw_norm else x + out
    return shard(x, act_btd), cache


class Gemma(GemmaLM):
  """Gemma 1, 1.1 and 2, CodeGemma, ShieldGemma."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.num_embed, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    self.layers = decoder_layers(config, self.windows(), lambda _: DecoderLayer(config, rngs=rngs))
    self.final_norm = OffsetRMSNorm(D, config.norm_eps, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    if not config.weight_tying:
      self.lm_head = Head(config.num_embed, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def _rotary(self, window: int | None) -> Rotary:
    return rotary(self.config.head_dim, self.config.rope_theta)
