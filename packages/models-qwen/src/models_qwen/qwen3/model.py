"""Qwen 3 (arXiv:2505.09388), dense or with experts: norms on q and k before RoPE, SwiGLU, pre-norms."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from models_core.config import check_decoder
from models_core.errors import ConfigError
from models_core.layers import (
  Cache,
  CausalLM,
  Embedder,
  Experts,
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
from models_core.rope_scaling import RopeScaling, YarnScaling
from models_core.sharding import ShardingConfig

__all__ = ["ModelConfig", "Qwen3", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


def _preset(
  *fields: Any, tied: bool = False, experts: tuple[int, int, int] | None = None, **more: Any
) -> Any:
  """A published model, by its configuration's fields in their order; experts: how many, per token, their F."""
  if experts is not None:
    more |= dict(
      zip(("num_experts", "num_experts_per_tok", "moe_hidden_dim"), experts, strict=True), norm_topk_prob=True
    )
  return classmethod(lambda cls: cls(*fields, use_tied_embedding=tied, **more))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Numbers of a Qwen 3 model. The fields of experts are None in a dense one.

  Attributes:
    num_layers: decoder layers.
    vocab_size: V, rows of the embedding.
    embed_dim: D.
    hidden_dim: F, of dense feed-forward blocks.
    num_heads: N, query heads.
    head_dim: H.
    num_kv_heads: K, key and value heads.
    rope_theta: base of the RoPE frequencies.
    norm_eps: added to the mean square in each norm.
    rope_scaling: of the RoPE frequencies, such as YarnScaling.
    use_tied_embedding: the head is the embedding.
    sliding_window: tokens that a query sees, its own among them, in layers that slide; None where none does.
    max_window_layers: the first layer that slides; those below see all. With experts, all slide or none.
    num_experts: E, of a sparse layer; None in a dense model.
    num_experts_per_tok: experts that a token goes through.
    moe_hidden_dim: F of an expert.
    norm_topk_prob: the weights of a token's experts sum to one.
    decoder_sparse_step: every so many layers one is sparse; the last of each group.
    mlp_only_layers: numbers of layers that are dense nevertheless.
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
  num_experts: int | None = None
  num_experts_per_tok: int | None = None
  moe_hidden_dim: int | None = None
  norm_topk_prob: bool | None = None
  decoder_sparse_step: int = 1
  mlp_only_layers: tuple[int, ...] = ()
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE

  def __post_init__(self):
    check_decoder(self)
    experts = {
      k: getattr(self, k) for k in ("num_experts", "num_experts_per_tok", "moe_hidden_dim", "norm_topk_prob")
    }
    if len({value is None for value in experts.values()}) > 1:
      raise ConfigError(
        f"{', '.join(f'{k}={v}' for k, v in experts.items())}: give all of them, or None for a dense model"
      )
    if (self.num_experts_per_tok or 0) > (self.num_experts or 0):
      raise ConfigError(
        f"num_experts_per_tok={self.num_experts_per_tok} of num_experts={self.num_experts}: too many"
      )

  def is_sparse(self, layer: int) -> bool:
    """Whether a layer has experts."""
    return (
      self.num_experts is not None
      and layer not in self.mlp_only_layers
      and (layer + 1) % self.decoder_sparse_step == 0
    )

  # fmt: off
  # Keyed by repository, for theta differs within a size. Variants that are not here are as their size.
  #                                  L   V       D     F      N   H    K  theta eps
  qwen3_0p6b                = _preset(28, 151936, 1024, 3072,  16, 128, 8, 1e6, 1e-6, tied=True)
  qwen3_1p7b                = _preset(28, 151936, 2048, 6144,  16, 128, 8, 1e6, 1e-6, tied=True)
  qwen3_4b                  = _preset(36, 151936, 2560, 9728,  32, 128, 8, 1e6, 1e-6, tied=True)
  qwen3_4b_instruct_2507    = _preset(36, 151936, 2560, 9728,  32, 128, 8, 5e6, 1e-6, tied=True)
  qwen3_4b_thinking_2507    = qwen3_4b_instruct_2507
  qwen3_8b                  = _preset(36, 151936, 4096, 12288, 32, 128, 8, 1e6, 1e-6)
  deepseek_r1_0528_qwen3_8b = _preset(36, 151936, 4096, 12288, 32, 128, 8, 1e6, 1e-6, YarnScaling(4.0, 32768))
  qwen3_14b                 = _preset(40, 151936, 5120, 17408, 40, 128, 8, 1e6, 1e-6)
  qwen3_32b                 = _preset(64, 151936, 5120, 25600, 64, 128, 8, 1e6, 1e-6)
  qwen3_30b_a3b                   = _preset(48, 151936, 2048, 6144,  32, 128, 4, 1e6, 1e-6, experts=(128, 8, 768))
  qwen3_30b_a3b_instruct_2507     = _preset(48, 151936, 2048, 6144,  32, 128, 4, 1e7, 1e-6, experts=(128, 8, 768))
  qwen3_30b_a3b_thinking_2507     = qwen3_30b_a3b_instruct_2507
  qwen3_coder_30b_a3b_instruct    = qwen3_30b_a3b_instruct_2507
  qwen3_235b_a22b                 = _preset(94, 151936, 4096, 12288, 64, 128, 4, 1e6, 1e-6, experts=(128, 8, 1536))
  qwen3_235b_a22b_instruct_2507   = _preset(94, 151936, 4096, 12288, 64, 128, 4, 5e6, 1e-6, experts=(128, 8, 1536))
  qwen3_235b_a22b_thinking_2507   = qwen3_235b_a22b_instruct_2507
  qwen3_coder_480b_a35b_instruct  = _preset(62, 151936, 6144, 8192,  96, 128, 8, 1e7, 1e-6, experts=(160, 8, 2560))
  # fmt: on


class Attention(nnx.Module):
  """Grouped-query self-attention; each head of q and k is normalised before RoPE."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "n h d"), shd.spec("kv_weight_dnh", "k h d")
    norm = shd.spec("qk_norm_weight", "h")
    self.config = config
    self.q_proj = Projection("btd,nhd->btnh", (N, H, D), q, rngs=rngs)
    self.k_proj = Projection("btd,khd->btkh", (K, H, D), kv, rngs=rngs)
    self.v_proj = Projection("btd,khd->btkh", (K, H, D), kv, rngs=rngs)
    self.o_proj = Projection("btnh,dnh->btd", (D, N, H), shd.spec("o_weight_nhd", "d n h"), rngs=rngs)
    self.q_norm = RMSNorm(H, config.norm_eps, norm, rngs=rngs)
    self.k_norm = RMSNorm(H, config.norm_eps, norm, rngs=rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, rotary: Rotary, cache: LayerCache | None, mask: jax.Array
  ) -> tuple[jax.Array, LayerCache | None]:
    act_btnh = self.config.shd_config.spec("act_btnh", "b t n h")
    q = shard(rotate(self.q_norm(self.q_proj(x)), positions, *rotary), act_btnh)
    k = shard(rotate(self.k_norm(self.k_proj(x)), positions, *rotary), act_btnh)
    v = shard(self.v_proj(x), act_btnh)
    if cache is not None:
      cache = update(cache, k, v, positions)
      k, v = cache["k"], cache["v"]
    out = attend(q, k, v, mask, scale=self.config.head_dim**-0.5)
    return self.o_proj(shard(out, act_btnh)), cache


class SparseMLP(nnx.Module):
  """The few experts of each token, weighted by a softmax over all of them."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    # A dense model has no such layer, and one number for experts makes all of them numbers.
    E, F, n = cast(
      tuple[int, int, int], (config.num_experts, config.moe_hidden_dim, config.num_experts_per_tok)
    )
    self.num_experts_per_tok, self.norm_topk_prob = n, config.norm_topk_prob
    # The same product as a head's, with float32 results.
    self.router = Head(E, D, shd.spec("router_weight_ed", "e d"), rngs=rngs)
    self.experts = Experts(E, D, F, jax.nn.silu, shd, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    weights, experts = jax.lax.top_k(jax.nn.softmax(self.router(x)), self.num_experts_per_tok)
    if self.norm_topk_prob:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return self.experts(x, experts, weights)


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
    norm = config.shd_config.spec("rms_norm_weight", "d")
    self.config = config
    self.input_layernorm = RMSNorm(config.embed_dim, config.norm_eps, norm, rngs=rngs)
    self.attn = Attention(config, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(config.embed_dim, config.norm_eps, norm, rngs=rngs)
    self.mlp: SparseMLP | GatedMLP
    if config.is_sparse(layer):
      self.mlp = SparseMLP(config, rngs=rngs)
    else:
      self.mlp = GatedMLP(config.embed_dim, config.hidden_dim, jax.nn.silu, config.shd_config, rngs=rngs)

  def __call__(self, x, positions, rotary, cache, mask):
    attention = self.config.remat_config.block(Attention.__call__)
    act_btd = self.config.shd_config.spec("act_btd", "b t d")
    out, cache = attention(self.attn, self.input_layernorm(x), positions, rotary, cache, mask)
    x = shard(x + out, act_btd)
    return shard(x + self.mlp(self.post_attention_layernorm(x)), act_btd), cache


class Qwen3(CausalLM):
  """Qwen 3. Peculiar to it: norms on q and k, and experts in some layers or all."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.vocab_size, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    self.layers = nnx.List([DecoderLayer(config, i, rngs=rngs) for i in range(config.num_layers)])
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
