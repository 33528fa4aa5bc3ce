"""Trees that Google's own package wrote, loaded as they are: the logits are those that it computed."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from models_gemma.gemma3 import params
from models_gemma.gemma3.model import ModelConfig

WRITTEN = pathlib.Path(os.environ["GOOGLE_TREES"])


def test_gemma3():
  config = dataclasses.replace(
    ModelConfig.gemma3_270m(), num_layers=7, num_embed=96, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=16,
    num_kv_heads=2, query_pre_attn_scalar=16, sliding_window_size=5,
  )  # fmt: skip
  model = params.create_model_from_checkpoint(WRITTEN / "tree", config)
  with np.load(WRITTEN / "logits.npz") as file:
    tokens, expected = jnp.asarray(file["tokens"]), file["logits"]
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  with jax.default_matmul_precision("highest"):
    logits, _ = model(tokens, positions)
  assert np.abs(np.asarray(logits) - expected).max() <= 2e-5 * np.abs(expected).max()
