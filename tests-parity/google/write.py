"""Writes what Google's own package computes: `write.py DIRECTORY`, with `gemma` installed.

The directory gets `tree`, random parameters as `gm.ckpts.save_params` writes them, and `logits.npz`, with `tokens`.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm

directory = pathlib.Path(sys.argv[1]).resolve()
published = next(f.default for f in dataclasses.fields(gm.nn.Gemma3_270M) if f.name == "config")
config = dataclasses.replace(
  published, num_embed=96, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=16, num_kv_heads=2,
  # Seven layers: each kind of attention is there, in more than one cycle.
  attention_types=tuple(published.attention_types)[:7], sliding_window_size=5,
)  # fmt: skip
model = gm.nn.Gemma3_270M(config=config, dtype=jnp.float32)
rng = np.random.default_rng(0)
tokens = jnp.asarray(rng.integers(3, config.num_embed, (2, 16)), jnp.int32)
shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.2), jnp.float32), shapes)
with jax.default_matmul_precision("highest"):
  logits = model.apply({"params": params}, tokens).logits
gm.ckpts.save_params(params, directory / "tree", wait_until_finished=True)
np.savez(directory / "logits.npz", tokens=tokens, logits=logits)
