"""The base class of all Gemma models: embedding, sliding windows and head."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models_core.layers import CausalLM, Head, bound
from models_gemma.attention_types import AttentionType


class GemmaLM(CausalLM):
  """Scales embeddings by sqrt(D), gives sliding layers their window, and soft-caps logits.

  With a head of its own, a model keeps it as `lm_head`.
  """

  lm_head: Head

  def _embed(self, tokens: jax.Array) -> jax.Array:
    x = self.embedder.encode(tokens)
    # The factor is rounded to the embedding's dtype first: for D = 3072 it is 55.5 in bfloat16.
    scale = jnp.asarray(self.config.embed_dim**0.5, x.dtype)
    return x * scale

  def _logits(self, hidden: jax.Array) -> jax.Array:
    head = self.embedder.decode if self.config.weight_tying else self.lm_head
    return bound(head(hidden), self.config.final_logit_softcap)

  def windows(self) -> tuple[int | None, ...]:
    """Sliding window of each layer in tokens; None for a layer that sees all tokens."""
    window = self.config.sliding_window_size
    return tuple(
      window if kind is AttentionType.LOCAL_SLIDING else None for kind in self.config.attention_types
    )
