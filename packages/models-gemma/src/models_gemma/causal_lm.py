"""What surrounds the layers of all Gemmas."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models_core.layers import CausalLM, bound, shard
from models_gemma.attention_types import AttentionType


class GemmaLM(CausalLM):
  """Embeddings scaled by sqrt(D), sliding windows by attention types, and the embedding as a soft-capped head."""

  def _embed(self, tokens: jax.Array) -> jax.Array:
    x = self.embedder.encode(tokens)
    # The factor is rounded to the embedding's dtype first: in bfloat16, 55.5 for 3072.
    scale = jnp.asarray(self.config.embed_dim**0.5, x.dtype)
    return shard(x * scale, self.config.shd_config.spec("act_btd", "b t d"))

  def _logits(self, hidden: jax.Array) -> jax.Array:
    return bound(self.embedder.decode(hidden), self.config.final_logit_softcap)

  def windows(self) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None for a layer that sees all."""
    window = self.config.sliding_window_size
    return tuple(
      window if kind is AttentionType.LOCAL_SLIDING else None for kind in self.config.attention_types
    )
