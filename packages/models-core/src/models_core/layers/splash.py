"""JAX's splash attention, a kernel for TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models_core.layers.attention_case import AttentionCase, joined, why_no_fixed_mask
from models_core.layers.visibility import VisibleKeys

# Sizes of a block of queries and of keys; the largest that pads the sequence by a quarter at most is taken.
_BLOCKS = (128, 256, 512)


def why_not_splash(case: AttentionCase) -> str | None:
  """Why the kernel cannot take a case, in one sentence; None if it can."""
  elsewhere = None if case.platform == "tpu" else f"it runs on TPUs only, and this is a {case.platform}"
  return joined(elsewhere, why_no_fixed_mask(case))


def attend_splash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: VisibleKeys,
  scale: float,
  soft_cap: float | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention of q [B, T, N, H] to k and v [B, T, K, H] -> [B, T, N, H]; `visible` is counted.

  `interpret` runs the kernel as plain operations, on any device.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  T, N = q.shape[1:3]
  block = max(size for size in _BLOCKS if size <= max(T // 4, _BLOCKS[0]))
  # No query sees the keys that fill the last block, since they come after it.
  pad = lambda x: jnp.pad(x, [(0, -T % block if axis == 1 else 0) for axis in range(x.ndim)])
  # The kernel has no scale of its own.
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  q, k, v = (pad(x).transpose(0, 2, 1, 3) for x in (q, k, v))
  shape, window = (q.shape[2],) * 2, visible["counted"].window
  mask = lib.CausalMask(shape) if window is None else lib.LocalMask(shape, (window - 1, 0), 0)
  sizes = lib.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  kernel = lib.make_splash_mha(
    mask=lib.MultiHeadMask([mask] * N),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=soft_cap,
    interpret=interpret,
  )
  segments = None
  if "query_segments" in visible:
    segments = lib.SegmentIds(*[pad(visible["query_segments"].astype(jnp.int32))] * 2)
  out = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segment_ids=segments))(q, k, v, segments)
  return out.transpose(0, 2, 1, 3)[:, :T]
