from .attention import attend, bound, make_causal_attn_mask, visible_keys
from .cache import Cache, LayerCache, append, update
from .causal_lm import CausalLM
from .linear import BiasedProjection, Embedder, Head, Projection
from .mesh import explicit_axes, shard
from .mlp import GatedMLP, gelu_tanh
from .moe import Experts
from .norm import OffsetRMSNorm, RMSNorm
from .parameters import INITIALIZERS, SCALE, dotted, parameter, shapes_only
from .remat import RematConfig
from .rope import Rotary, inverse_frequencies, rotary, rotate

__all__ = [
  "INITIALIZERS",
  "SCALE",
  "BiasedProjection",
  "Cache",
  "CausalLM",
  "Embedder",
  "Experts",
  "GatedMLP",
  "Head",
  "LayerCache",
  "OffsetRMSNorm",
  "Projection",
  "RMSNorm",
  "RematConfig",
  "Rotary",
  "append",
  "attend",
  "bound",
  "dotted",
  "explicit_axes",
  "gelu_tanh",
  "inverse_frequencies",
  "make_causal_attn_mask",
  "parameter",
  "rotary",
  "rotate",
  "shapes_only",
  "shard",
  "update",
  "visible_keys",
]
