"""Gemma 3 checkpoints as Google publishes them: the weight table of their Orbax trees."""

from __future__ import annotations

import os
from typing import Any

from jax.sharding import Mesh

from models_core.weights import WeightTable
from models_gemma.gemma3.model import Gemma3, ModelConfig
from models_gemma.orbax import create_model_from_orbax
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


def create_model_from_checkpoint(
  checkpoint_path: str | os.PathLike, model_config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> Gemma3:
  """Loads an Orbax tree with Google's names, by `create_model_from_orbax`."""
  return create_model_from_orbax(checkpoint_path, Gemma3, model_config, ORBAX, mesh, dtype)
