"""The language model of Gemma 3 (arXiv:2503.19786).

It is Gemma 2 without soft caps and with norms on queries and keys. Five layers have a sliding window, the sixth is
global and sees all tokens. Sliding layers have a RoPE base of their own; only global layers scale their RoPE
frequencies for the long context.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
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
from models_core.rope_scaling import LinearScaling, RopeScaling
from models_core.sharding import ShardingConfig
from models_gemma.attention_types import AttentionType, checked, every
from models_gemma.causal_lm import GemmaLM

__all__ = ["AttentionType", "Gemma3", "ModelConfig", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


_SIZES = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")
_gemma3 = preset_rows(
  *_SIZES,
  "query_pre_attn_scalar",
  "num_embed",
  "sliding_window_size",
  "rope_scaling",
  attention_types=every(6, 62),  # for the largest size; smaller sizes drop the rest
  rope_theta=1_000_000.0,
  local_rope_theta=10_000.0,
  norm_eps=1e-6,
)
# For the sizes with a context of 131072 tokens.
_SCALING = LinearScaling(8.0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Configuration of a Gemma 3 language model.

  Attributes:
    num_layers: number of decoder layers.
    num_embed: V, rows of the embedding.
    embed_dim: D, width of the model.
    hidden_dim: F, width of the feed-forward block.
    num_heads: N, query heads.
    head_dim: H, dimension of a head; N * H may differ from D.
    num_kv_heads: K, key and value heads.
    attention_types: type of each layer; entries beyond the last layer are dropped.
    rope_theta: base of the RoPE frequencies of global layers.
    local_rope_theta: base of the RoPE frequencies of sliding layers, which have no scaling.
    norm_eps: added to the mean square in each norm.
    query_pre_attn_scalar: attention logits are multiplied by query_pre_attn_scalar ** -0.5.
    sliding_window_size: tokens that a query sees in sliding layers, its own included; None if no layer slides.
    rope_scaling: scaling of the RoPE frequencies of global layers; None for 270M and 1B.
    final_logit_softcap: bounds the logits; None in all published models.
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
  attention_types: tuple[AttentionType, ...]
  rope_theta: float
  local_rope_theta: float
  norm_eps: float
  query_pre_attn_scalar: int
  sliding_window_size: int | None
  rope_scaling: RopeScaling | None = None
  final_logit_softcap: float | None = None
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
  # Sizes that also take images have more rows of the embedding.
  #                                                     L   D     F      N   H    K   scalar V     window scaling
  gemma3_270m       = _gemma3("Gemma 3 270M.",          18, 640,  2048,  4,  256, 1,  256, 262144, 512,  None)
  gemma3_1b         = _gemma3("Gemma 3 1B.",            26, 1152, 6912,  4,  256, 1,  256, 262144, 512,  None)
  gemma3_4b         = _gemma3("Gemma 3 4B.",            34, 2560, 10240, 8,  256, 4,  256, 262208, 1024, _SCALING)
  gemma3_12b        = _gemma3("Gemma 3 12B.",           48, 3840, 15360, 16, 256, 8,  256, 262208, 1024, _SCALING)
  gemma3_27b        = _gemma3("Gemma 3 27B.",           62, 5376, 21504, 32, 128, 16, 168, 262208, 1024, _SCALING)
  medgemma_27b_text = _gemma3("MedGemma 27B for text.", 62, 5376, 21504, 32, 128, 16, 168, 262144, 1024, _SCALING)
  # fmt: on
  # A model with the same configuration under another name.
  functiongemma_270m = gemma3_270m


class Attention(nnx.Module):
  """Grouped-query self-attention; each head of q and k is normalised before RoPE rotates it."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "(n h) d"), shd.spec("kv_weight_dnh", "(k h) d")
    o, norm = shd.spec("o_weight_nhd", "d (n h)"), shd.spec("qk_norm_weight", "h")
    self.config = config
    self.num_heads, self.num_kv_heads, self.head_dim = N, K, H
    self.q_proj = Projection(N * H, D, q, heads=(N, None), rngs=rngs)
    self.k_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.v_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.o_proj = Projection(D, N * H, o, heads=(None, N), rngs=rngs)
    self.q_norm = OffsetRMSNorm(H, config.norm_eps, norm, rngs=rngs)
    self.k_norm = OffsetRMSNorm(H, config.norm_eps, norm, rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    act_btnh = self.config.shd_config.spec("act_btnh", "b t n h")
    q = shard(rotate(self.q_norm(split_heads(self.q_proj(x), self.num_heads)), positions, rotary), act_btnh)
    k = shard(
      rotate(self.k_norm(split_heads(self.k_proj(x), self.num_kv_heads)), positions, rotary), act_btnh
    )
    v = shard(split_heads(self.v_proj(x), self.num_kv_heads), act_btnh)
    cache, k, v = extend_cache(cache, k, v, positions, act_btnh)
    kind = self.config.attn_implementation
    out = attend(
      q, k, v, visible, scale=self.config.query_pre_attn_scalar**-0.5, implementation=kind, spec=act_btnh
    )
    return self.o_proj(join_heads(shard(out, act_btnh))), cache


class DecoderLayer(nnx.Module):
  """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, spec = config.embed_dim, config.shd_config.spec("rms_norm_weight", "d")
    norm = functools.partial(OffsetRMSNorm, D, config.norm_eps, spec, rngs=rngs)
    self.config = config
    self.input_layernorm = norm()
    self.attn = Attention(config, rngs=rngs)
    self.post_attn_norm = norm()
    self.pre_ffw_norm = norm()
    self.mlp = GatedMLP(D, config.hidden_dim, gelu_tanh, config.shd_config, rngs=rngs)
    self.post_ffw_norm = norm()

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    attention = self.config.remat_config.block(self.attn)
    act_btd = self.config.shd_config.spec("act_btd", "b t d")
    out, cache = attention(self.input_layernorm(x), positions, rotary, cache, visible)
    x = shard(self.post_attn_norm.add_to(x, out), act_btd)
    out = self.mlp(self.pre_ffw_norm(x))
    return shard(self.post_ffw_norm.add_to(x, out), act_btd), cache


class Gemma3(GemmaLM):
  """Gemma 3, FunctionGemma, and MedGemma for text."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.num_embed, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    self.layers = decoder_layers(config, self.windows(), lambda _: DecoderLayer(config, rngs=rngs))
    self.final_norm = OffsetRMSNorm(D, config.norm_eps, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    if not config.weight_tying:
      self.lm_head = Head(config.num_embed, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def _rotary(self, window: int | None) -> Rotary:
    config = self.config
    if window is None:
      return rotary(config.head_dim, config.rope_theta, config.rope_scaling)
    return rotary(config.head_dim, config.local_rope_theta)

  def get_attention_mask(self, tokens: jax.Array, *, inputs_mask: jax.Array | None = None) -> jax.Array:
    """Makes the causal mask of a batch, for trainers that ask the model for one.

    The mask ignores sliding windows: the model adds them when it is called with this mask.

    Args:
      tokens: int [B, T].
      inputs_mask: bool [B, T], False for padding; None if there is no padding.

    Returns:
      bool [B, T, T].
    """
    return make_causal_attn_mask(jnp.ones(tokens.shape, bool) if inputs_mask is None else inputs_mask)
