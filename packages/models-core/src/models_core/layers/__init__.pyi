from .attention import (
  ATTENTION_IMPLEMENTATIONS,
  AttentionExplanation,
  attend,
  bound,
  check_attention_implementation,
  explain_attention,
  explain_case,
  join_heads,
  split_heads,
)
from .attention_case import AttentionCase
from .cache import Cache, LayerCache, extend_cache
from .causal_lm import CausalLM
from .decoder_layer import PreNormLayer
from .linear import BiasedProjection, Embedder, Head, Projection, projection
from .logits import cross_entropy, log_probs, mean_cross_entropy, top_k
from .mesh import explicit_axes, find_mesh, on_auto_axes, shard
from .mlp import GatedMLP, gelu_tanh, silu
from .moe import Experts
from .norm import OffsetRMSNorm, RMSNorm
from .parameters import INITIALIZERS, SCALE, abstract_state, dotted, parameter, shapes_only, value_of
from .remat import RematConfig
from .rope import Rotary, rotary, rotate
from .router import load_balancing_loss, sow_router_logits
from .scan import decoder_layers
from .stacked import by_layer, places, stack_layers, take_layer
from .traces import one_trace
from .visibility import VisibleKeys, make_causal_attn_mask, visible_keys

__all__ = [
  "ATTENTION_IMPLEMENTATIONS",
  "INITIALIZERS",
  "SCALE",
  "AttentionCase",
  "AttentionExplanation",
  "BiasedProjection",
  "Cache",
  "CausalLM",
  "Embedder",
  "Experts",
  "GatedMLP",
  "Head",
  "LayerCache",
  "OffsetRMSNorm",
  "PreNormLayer",
  "Projection",
  "RMSNorm",
  "RematConfig",
  "Rotary",
  "VisibleKeys",
  "abstract_state",
  "attend",
  "bound",
  "by_layer",
  "check_attention_implementation",
  "cross_entropy",
  "decoder_layers",
  "dotted",
  "explain_attention",
  "explain_case",
  "explicit_axes",
  "extend_cache",
  "find_mesh",
  "gelu_tanh",
  "join_heads",
  "load_balancing_loss",
  "log_probs",
  "make_causal_attn_mask",
  "mean_cross_entropy",
  "on_auto_axes",
  "one_trace",
  "parameter",
  "places",
  "projection",
  "rotary",
  "rotate",
  "shapes_only",
  "shard",
  "silu",
  "sow_router_logits",
  "split_heads",
  "stack_layers",
  "take_layer",
  "top_k",
  "value_of",
  "visible_keys",
]
