"""cuDNN's flash attention, a kernel for NVIDIA's GPUs."""

from __future__ import annotations

import functools

import jax

from models_core.layers.attention_case import AttentionCase, joined, why_no_fixed_mask
from models_core.layers.visibility import VisibleKeys


def why_not_cudnn(case: AttentionCase) -> str | None:
  """Why the kernel cannot take a case, in one sentence; None if it can."""
  has_gpu = case.platform in ("gpu", "cuda")
  reasons = joined(
    None if has_gpu else f"it runs on NVIDIA's GPUs only, and this is a {case.platform}",
    why_no_fixed_mask(case),
    "its rows hold several sequences" if case.packed else None,
    None if case.soft_cap is None else "it has a soft cap",
    None if case.dtype in ("bfloat16", "float16") else f"it takes bfloat16 and float16, not {case.dtype}",
  )
  return reasons or _refusal(case.queries, case.heads, case.kv_heads, case.head_dim, case.dtype)


@functools.cache
def _refusal(T: int, N: int, K: int, H: int, dtype: str) -> str | None:
  """What JAX says of sizes and dtype, and where cuDNN is missing; None if it accepts them, also for gradients."""
  q, k = (jax.ShapeDtypeStruct((1, T, heads, H), dtype) for heads in (N, K))

  def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _attend(q, k, v, 1.0, None).astype("float32").sum()

  try:
    jax.eval_shape(jax.grad(loss), q, k, k)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    return f"JAX says: {str(error).splitlines()[0]}"
  return None


def attend_cudnn(
  q: jax.Array, k: jax.Array, v: jax.Array, visible: VisibleKeys, scale: float, soft_cap: float | None
) -> jax.Array:
  """Causal attention of q [B, T, N, H] to k and v [B, T, K, H] -> [B, T, N, H]; `visible` is counted."""
  return _attend(q, k, v, scale, visible["counted"].window)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None) -> jax.Array:
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=scale,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )
