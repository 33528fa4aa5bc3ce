"""Trees that Google's own package wrote, loaded as they are: the logits are those that it computed."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models_gemma import gemma, gemma3
from models_gemma.gemma.params import create_model_from_checkpoint as create_gemma
from models_gemma.gemma3.params import create_model_from_checkpoint as create_gemma3

WRITTEN = pathlib.Path(os.environ["GOOGLE_TREES"])

SIZES = {
  "num_embed": 96,
  "embed_dim": 32,
  "hidden_dim": 48,
  "num_heads": 4,
  "head_dim": 16,
  "num_kv_heads": 2,
}
GEMMA2 = {"final_logit_softcap": 3.0, "attn_logits_soft_cap": 2.0}
# Preset -> its family, what reads its trees, and what differs.
MODELS = {
  "gemma2_2b": (gemma.FAMILY, create_gemma, GEMMA2 | {"query_pre_attn_scalar": 16}),
  "gemma2_9b": (gemma.FAMILY, create_gemma, GEMMA2 | {"query_pre_attn_scalar": 16}),
  # The embedding's width over the number of heads.
  "gemma2_27b": (gemma.FAMILY, create_gemma, GEMMA2 | {"query_pre_attn_scalar": 8}),
  "gemma3_270m": (gemma3.FAMILY, create_gemma3, {"query_pre_attn_scalar": 16}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
  family, create, fields = MODELS[name]
  published = getattr(family.config_class, name)()
  config = dataclasses.replace(published, num_layers=7, sliding_window_size=5, **SIZES, **fields)
  model = create(WRITTEN / name / "tree", config)
  with np.load(WRITTEN / name / "logits.npz") as file:
    tokens, expected = jnp.asarray(file["tokens"]), file["logits"]
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  with jax.default_matmul_precision("highest"):
    logits, _ = model(tokens, positions)
  error = np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()
  print(f"{name}: {error:.1e} of the largest logit")
  assert error <= 2e-5
