"""Writes what Google's own package computes: `write.py DIRECTORY`, with `gemma` installed.

The directory gets a folder for each model: `tree`, random parameters as `gm.ckpts.save_params` writes them, and
`logits.npz`, with `tokens`.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm

SIZES = {
  "num_embed": 96,
  "embed_dim": 32,
  "hidden_dim": 48,
  "num_heads": 4,
  "head_dim": 16,
  "num_kv_heads": 2,
}
# Small enough to matter.
CAPS = {"final_logit_softcap": 3.0, "attn_logits_soft_cap": 2.0}
MODELS = {
  "gemma2_2b": (gm.nn.Gemma2_2B, CAPS),
  "gemma2_9b": (gm.nn.Gemma2_9B, CAPS),
  "gemma2_27b": (gm.nn.Gemma2_27B, CAPS),
  "gemma3_270m": (gm.nn.Gemma3_270M, {}),
}


def write(directory: pathlib.Path, name: str) -> None:
  """Writes one model's folder."""
  model_class, fields = MODELS[name]
  published = next(f.default for f in dataclasses.fields(model_class) if f.name == "config")
  # Seven layers: each kind of attention is there, in more than one cycle.
  types = tuple(published.attention_types)[:7]
  config = dataclasses.replace(published, attention_types=types, sliding_window_size=5, **SIZES, **fields)
  model = model_class(config=config, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(3, config.num_embed, (2, 16)), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.2), jnp.float32), shapes)
  with jax.default_matmul_precision("highest"):
    logits = model.apply({"params": params}, tokens).logits
  (directory / name).mkdir()
  gm.ckpts.save_params(params, directory / name / "tree", wait_until_finished=True)
  np.savez(directory / name / "logits.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
  for name in MODELS:
    write(pathlib.Path(sys.argv[1]).resolve(), name)
