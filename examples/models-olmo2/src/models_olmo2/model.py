"""OLMo 2 (arXiv:2501.00656): norms behind the blocks, and norms on q and k over all heads at once, before RoPE."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from models_core.config import check_decoder
from models_core.layers import (
  CausalLM,
  Embedder,
  GatedMLP,
  Head,
  LayerCache,
  Projection,
  RematConfig,
  RMSNorm,
  Rotary,
  VisibleKeys,
  attend,
  decoder_layers,
  extend_cache,
  join_heads,
  rotary,
  rotate,
  shard,
  silu,
  split_heads,
)
from models_core.rope_scaling import RopeScaling
from models_core.sharding import ShardingConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Configuration of an OLMo 2 model.

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
    rope_scaling: scaling of the RoPE frequencies, or None.
    weight_tying: whether the head is the embedding.
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
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE
  attn_implementation: str = "auto"
  scan_layers: bool = False

  def __post_init__(self) -> None:
    check_decoder(self)


class Attention(nnx.Module):
  """Grouped-query self-attention; all heads of q, and all of k, are normalised together before RoPE rotates each."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "(n h) d"), shd.spec("kv_weight_dnh", "(k h) d")
    # Each device keeps the whole vector: no mesh may split a head, and the number of heads need not fit the mesh.
    norm = shd.spec("qk_norm_weight", "h")
    self.config = config
    self.num_heads, self.num_kv_heads = N, K
    self.q_proj = Projection(N * H, D, q, heads=(N, None), rngs=rngs)
    self.k_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.v_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.o_proj = Projection(D, N * H, shd.spec("o_weight_nhd", "d (n h)"), heads=(None, N), rngs=rngs)
    self.q_norm = RMSNorm(N * H, config.norm_eps, norm, rngs=rngs)
    self.k_norm = RMSNorm(K * H, config.norm_eps, norm, rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    act_btnh = self.config.shd_config.spec("act_btnh", "b t n h")
    q, k = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
    q = shard(rotate(split_heads(q, self.num_heads), positions, rotary), act_btnh)
    k = shard(rotate(split_heads(k, self.num_kv_heads), positions, rotary), act_btnh)
    v = shard(split_heads(self.v_proj(x), self.num_kv_heads), act_btnh)
    cache, k, v = extend_cache(cache, k, v, positions, act_btnh)
    kind = self.config.attn_implementation
    out = attend(q, k, v, visible, scale=self.config.head_dim**-0.5, implementation=kind, spec=act_btnh)
    return self.o_proj(join_heads(shard(out, act_btnh))), cache


class DecoderLayer(nnx.Module):
  """x + norm(attention(x)), then x + norm(mlp(x))."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, spec = config.embed_dim, config.shd_config.spec("rms_norm_weight", "d")
    self.config = config
    self.attn = Attention(config, rngs=rngs)
    self.post_attn_norm = RMSNorm(D, config.norm_eps, spec, rngs=rngs)
    self.mlp = GatedMLP(D, config.hidden_dim, silu, config.shd_config, rngs=rngs)
    self.post_ffw_norm = RMSNorm(D, config.norm_eps, spec, rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, visible: VisibleKeys
  ) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] at positions [B, T] -> [B, T, D], and the cache with T more slots in use."""
    attention = self.config.remat_config.block(self.attn)
    act_btd = self.config.shd_config.spec("act_btd", "b t d")
    out, cache = attention(x, positions, rotary, cache, visible)
    x = shard(x + self.post_attn_norm(out), act_btd)
    return shard(x + self.post_ffw_norm(self.mlp(x)), act_btd), cache


class Olmo2(CausalLM):
  """OLMo 2 of all sizes."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.vocab_size, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    make = functools.partial(DecoderLayer, config, rngs=rngs)
    self.layers = decoder_layers(config, self.windows(), lambda _: make())
    self.final_norm = RMSNorm(D, config.norm_eps, shd.spec("rms_norm_weight", "d"), rngs=rngs)
    if not config.weight_tying:
      self.lm_head = Head(config.vocab_size, D, shd.spec("lm_head_vd", "v d"), rngs=rngs)

  def _rotary(self, window: int | None) -> Rotary:
    return rotary(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

  def _logits(self, hidden: jax.Array) -> jax.Array:
    return self.embedder.decode(hidden) if self.config.weight_tying else self.lm_head(hidden)
