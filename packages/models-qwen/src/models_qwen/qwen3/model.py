"""Qwen 3 (arXiv:2505.09388), dense or with experts: norms on q and k before RoPE, SwiGLU, pre-norms."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from models_core.config import check_decoder, preset_rows
from models_core.errors import ConfigError
from models_core.layers import (
  CausalLM,
  Embedder,
  Experts,
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
  sow_router_logits,
  split_heads,
  top_k,
)
from models_core.rope_scaling import RopeScaling, YarnScaling
from models_core.sharding import ShardingConfig
from models_qwen.windows import layer_windows

__all__ = ["ModelConfig", "Qwen3", "RematConfig", "ShardingConfig", "make_causal_attn_mask"]


_SIZES = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "num_kv_heads")
_SHARED = {"vocab_size": 151936, "head_dim": 128, "norm_eps": 1e-6}
_EXPERTS = ("num_experts", "moe_hidden_dim")

_dense = preset_rows(*_SIZES, "rope_theta", "use_tied_embedding", "rope_scaling", **_SHARED)
_sparse = preset_rows(*_SIZES, "rope_theta", *_EXPERTS, **_SHARED, num_experts_per_tok=8, norm_topk_prob=True)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Configuration of a Qwen 3 model. In a dense model, all fields of experts keep their defaults.

  Attributes:
    num_layers: number of decoder layers.
    vocab_size: V, rows of the embedding.
    embed_dim: D, width of the model.
    hidden_dim: F, width of dense feed-forward blocks.
    num_heads: N, query heads.
    head_dim: H, dimension of a head.
    num_kv_heads: K, key and value heads.
    rope_theta: base of the RoPE frequencies.
    norm_eps: added to the mean square in each norm.
    rope_scaling: scaling of the RoPE frequencies, such as YarnScaling, or None.
    use_tied_embedding: whether the head is the embedding.
    sliding_window: tokens that a query sees in sliding layers, its own included; None if no layer slides.
    max_window_layers: index of the first sliding layer; layers before it see all tokens. 0 for models with experts,
      where config.json can state only that all layers slide or none.
    num_experts: E, experts of a sparse layer; None in a dense model.
    num_experts_per_tok: experts chosen for each token; None in a dense model.
    moe_hidden_dim: F, width of an expert; None in a dense model.
    norm_topk_prob: whether the weights of a token's experts are scaled to sum to one; None in a dense model.
    decoder_sparse_step: the last layer of each group of as many layers is sparse: with 2, layers 1, 3, 5 and so on.
    mlp_only_layers: indices of layers that are dense in any case.
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
  num_experts: int | None = None
  num_experts_per_tok: int | None = None
  moe_hidden_dim: int | None = None
  norm_topk_prob: bool | None = None
  decoder_sparse_step: int = 1
  mlp_only_layers: tuple[int, ...] = ()
  shd_config: ShardingConfig = ShardingConfig.get_default_sharding()
  remat_config: RematConfig = RematConfig.NONE
  attn_implementation: str = "auto"
  scan_layers: bool = False

  def __post_init__(self) -> None:
    check_decoder(self)
    experts = {
      k: getattr(self, k) for k in ("num_experts", "num_experts_per_tok", "moe_hidden_dim", "norm_topk_prob")
    }
    if len({value is None for value in experts.values()}) > 1:
      raise ConfigError(
        f"{', '.join(f'{k}={v}' for k, v in experts.items())}: give a value for each, or None for each in a dense model"
      )
    if (self.num_experts_per_tok or 0) > (self.num_experts or 0):
      raise ConfigError(
        f"num_experts_per_tok={self.num_experts_per_tok} is greater than num_experts={self.num_experts}: lower it"
      )

  def is_sparse(self, layer: int) -> bool:
    """Whether the layer with this index has experts."""
    return (
      self.num_experts is not None
      and layer not in self.mlp_only_layers
      and (layer + 1) % self.decoder_sparse_step == 0
    )

  # fmt: off
  # One preset for each repository, since theta differs within a size. Variants not listed equal their size.
  #                                                                  L   D     F      N   K  theta  tied   scaling
  qwen3_0p6b                = _dense("Qwen 3 0.6B.",                 28, 1024, 3072,  16, 8, 1e6,   True,  None)
  qwen3_1p7b                = _dense("Qwen 3 1.7B.",                 28, 2048, 6144,  16, 8, 1e6,   True,  None)
  qwen3_4b                  = _dense("Qwen 3 4B.",                   36, 2560, 9728,  32, 8, 1e6,   True,  None)
  qwen3_4b_instruct_2507    = _dense("Qwen 3 4B of July 2025.",      36, 2560, 9728,  32, 8, 5e6,   True,  None)
  qwen3_8b                  = _dense("Qwen 3 8B.",                   36, 4096, 12288, 32, 8, 1e6,   False, None)
  deepseek_r1_0528_qwen3_8b = _dense("DeepSeek-R1-0528-Qwen3-8B.",   36, 4096, 12288, 32, 8, 1e6,   False, YarnScaling(4.0, 32768))
  qwen3_14b                 = _dense("Qwen 3 14B.",                  40, 5120, 17408, 40, 8, 1e6,   False, None)
  qwen3_32b                 = _dense("Qwen 3 32B.",                  64, 5120, 25600, 64, 8, 1e6,   False, None)
  #                                                                           L   D     F      N   K  theta  E    F of one
  qwen3_30b_a3b                  = _sparse("Qwen 3 30B-A3B.",                 48, 2048, 6144,  32, 4, 1e6,   128, 768)
  qwen3_30b_a3b_instruct_2507    = _sparse("Qwen 3 30B-A3B of July 2025.",    48, 2048, 6144,  32, 4, 1e7,   128, 768)
  qwen3_235b_a22b                = _sparse("Qwen 3 235B-A22B.",               94, 4096, 12288, 64, 4, 1e6,   128, 1536)
  qwen3_235b_a22b_instruct_2507  = _sparse("Qwen 3 235B-A22B of July 2025.",  94, 4096, 12288, 64, 4, 5e6,   128, 1536)
  qwen3_coder_480b_a35b_instruct = _sparse("Qwen3-Coder 480B-A35B.",          62, 6144, 8192,  96, 8, 1e7,   160, 2560)
  # fmt: on
  # Models with the same configuration under other names.
  qwen3_4b_thinking_2507 = qwen3_4b_instruct_2507
  qwen3_30b_a3b_thinking_2507 = qwen3_coder_30b_a3b_instruct = qwen3_30b_a3b_instruct_2507
  qwen3_235b_a22b_thinking_2507 = qwen3_235b_a22b_instruct_2507


class Attention(nnx.Module):
  """Grouped-query self-attention; each head of q and k is normalised before RoPE rotates it."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shd = config.shd_config
    q, kv = shd.spec("q_weight_dnh", "(n h) d"), shd.spec("kv_weight_dnh", "(k h) d")
    o = shd.spec("o_weight_nhd", "d (n h)")
    norm = shd.spec("qk_norm_weight", "h")
    self.config = config
    self.num_heads, self.num_kv_heads, self.head_dim = N, K, H
    self.q_proj = Projection(N * H, D, q, heads=(N, None), rngs=rngs)
    self.k_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.v_proj = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.o_proj = Projection(D, N * H, o, heads=(None, N), rngs=rngs)
    self.q_norm = RMSNorm(H, config.norm_eps, norm, rngs=rngs)
    self.k_norm = RMSNorm(H, config.norm_eps, norm, rngs=rngs)

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
    out = attend(q, k, v, visible, scale=self.config.head_dim**-0.5, implementation=kind, spec=act_btnh)
    return self.o_proj(join_heads(shard(out, act_btnh))), cache


class SparseMLP(nnx.Module):
  """A feed-forward block of experts: the router's softmax over all experts chooses and weights a few for each token."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    # Only sparse layers get here, and ModelConfig demands all fields of experts if one is set.
    E, F, n = cast(
      tuple[int, int, int], (config.num_experts, config.moe_hidden_dim, config.num_experts_per_tok)
    )
    self.num_experts_per_tok, self.norm_topk_prob = n, config.norm_topk_prob
    self.act_bt = shd.spec("act_btd", "b t")
    # A Head, since the router computes the same product, with float32 results.
    self.router = Head(E, D, shd.spec("router_weight_ed", "e d"), rngs=rngs)
    self.experts = Experts(E, D, F, silu, shd, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    logits = self.router(x)
    sow_router_logits(self, logits)
    # The compiler would gather the tokens of all devices for a plain top_k.
    weights, experts = top_k(jax.nn.softmax(logits), self.num_experts_per_tok, self.act_bt)
    if self.norm_topk_prob:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return self.experts(x, experts, weights)


class Qwen3(CausalLM):
  """Qwen 3, dense or with experts in some layers or all: q and k are normalised."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shd, D = config.shd_config, config.embed_dim
    self.config = config
    self.embedder = Embedder(config.vocab_size, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    attention, sparse = functools.partial(Attention, config), functools.partial(SparseMLP, config)
    dense = functools.partial(GatedMLP, D, config.hidden_dim, silu, shd)
    mlps = [sparse if config.is_sparse(i) else dense for i in range(config.num_layers)]
    make = lambda i: PreNormLayer(config, attention, mlps[i], rngs=rngs)
    self.layers = decoder_layers(config, list(zip(self.windows(), mlps, strict=True)), make)
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
