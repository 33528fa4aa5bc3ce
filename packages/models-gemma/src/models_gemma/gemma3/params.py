"""Gemma 3 checkpoints as Google publishes them: Orbax trees."""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh

from models_core.abstract import abstract_model
from models_core.checkpoint import as_files
from models_core.loader import load
from models_core.orbax_checkpoint import read_orbax
from models_core.plan import plan_load
from models_core.weights import WeightTable
from models_gemma.gemma3.model import Gemma3, ModelConfig
from models_gemma.orbax_rows import ATTN, COMMON, IGNORED, L, T, fit_rows, rows

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
  """Loads an Orbax tree with Google's names.

  Args:
    checkpoint_path: its directory, or one that holds it.
    model_config: of the model that it holds. The rows of the embedding are the tree's: 262144 where Hugging Face's have 262208.
    mesh: of either kind; None is one device.
    dtype: of the parameters; None keeps each as it is stored.

  Raises:
    CheckpointError: with all that is missing, unexpected, doubled or mis-shaped.
  """
  checkpoint = read_orbax(as_files(checkpoint_path))
  model = abstract_model(Gemma3, fit_rows(model_config, checkpoint.tensors), mesh)
  return cast(
    Gemma3, load(plan_load(checkpoint, model, ORBAX, dtype=None if dtype is None else np.dtype(dtype)))
  )
