"""Gemma 3 checkpoints as Google publishes them: Orbax trees."""

from models_core.weights import WeightTable
from models_gemma.gemma3.model import Gemma3, ModelConfig
from models_gemma.orbax import checkpoint_creator
from models_gemma.orbax_rows import ATTN, COMMON, IGNORED, L, T, rows

__all__ = ["ORBAX", "create_model_from_checkpoint"]

ORBAX = WeightTable(
  *rows([
    *COMMON,
    (f"{L}.attn.q_norm.w",     [(f"{ATTN}/_query_norm.scale", "h")]),
    (f"{L}.attn.k_norm.w",     [(f"{ATTN}/_key_norm.scale", "h")]),
    (f"{L}.post_attn_norm.w",  [(f"{T}/post_attention_norm.scale", "d")]),
    (f"{L}.pre_ffw_norm.w",    [(f"{T}/pre_ffw_norm.scale", "d")]),
    (f"{L}.post_ffw_norm.w",   [(f"{T}/post_ffw_norm.scale", "d")]),
  ]),
  ignored=IGNORED,
)  # fmt: skip

create_model_from_checkpoint = checkpoint_creator(Gemma3, ModelConfig, ORBAX)
