"""Attention, by the implementation that suits a call."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from models_core.errors import ConfigError
from models_core.layers.attention_case import AttentionCase
from models_core.layers.attention_shards import Attend, on_shards, shards_of
from models_core.layers.blockwise import attend_blockwise, why_not_blockwise
from models_core.layers.cudnn import attend_cudnn, why_not_cudnn
from models_core.layers.linear import products_are_replaced
from models_core.layers.mesh import call_auto, platform_of, spec_of
from models_core.layers.splash import attend_splash, why_not_splash
from models_core.layers.visibility import (
  KEYS,
  QUERIES,
  VisibleKeys,
  dense_mask,
  is_causal,
  keys_of_mask,
)


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute attention.

  Attributes:
    attend: called with q [B, T, N, H], k and v [B, S, K, H] of one dtype, `VisibleKeys`, scale and soft cap.
    why_not: why it cannot take a case, in one sentence; None if it can.
    why_rather_not: why "auto" leaves a case that it can take to another one; None if it does not.
    on_shards: whether each device of a mesh computes its part by itself: the compiler cannot divide kernels, and would
      put collectives into loops.
    typed: whether JAX can type what differs between devices in it; not in kernels.
  """

  attend: Callable[..., jax.Array]
  why_not: Callable[[AttentionCase], str | None]
  why_rather_not: Callable[[AttentionCase], str | None] = lambda case: None
  on_shards: bool = False
  typed: bool = True


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: VisibleKeys | jax.Array,
  *,
  scale: float,
  soft_cap: float | None = None,
  implementation: str = "auto",
  spec: PartitionSpec | None = None,
) -> jax.Array:
  """Grouped-query attention with float32 logits and softmax.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H]; N is a multiple of K.
    v: [B, S, K, H].
    visible: which keys a query sees: of `visible_keys`, or a mask bool [B, T, S]. A query that sees no key gets the mean
      of v, as in transformers.
    scale: factor of the logits, commonly H ** -0.5.
    soft_cap: bounds the logits to (-soft_cap, soft_cap) before the mask applies; None does not bound them.
    implementation: one of `ATTENTION_IMPLEMENTATIONS`. A name holds for calls of at least 64 queries; fewer, as in a step
      of decoding, are computed at once.
    spec: mesh axes of q. Each device computes its own rows, queries and heads; if T is divided, keys and values are
      gathered once. With None, the compiler decides.

  Returns:
    [B, T, N, H] in the dtype of q.

  Raises:
    ConfigError: if the named implementation cannot take this call.
  """
  if not isinstance(visible, dict):
    visible = keys_of_mask(visible)
  k, v = k.astype(q.dtype), v.astype(q.dtype)
  axes, parts = shards_of(q, spec or PartitionSpec())
  explanation = explain_case(_case(q, k, visible, soft_cap, parts), implementation)
  if (heard := _heard.get()) is not None and explanation not in heard:
    heard.append(explanation)
  taken = IMPLEMENTATIONS[explanation.taken]

  run: Attend = functools.partial(taken.attend, scale=scale, soft_cap=soft_cap)
  if not taken.on_shards:
    return run(q, k, v, visible)
  if max(parts) > 1:
    run = on_shards(run, axes, typed=taken.typed)
  return call_auto(run, spec_of(q), q, k, v, visible)


@dataclasses.dataclass(frozen=True)
class AttentionExplanation:
  """Which implementation a call of attention takes.

  Attributes:
    case: what the call needs.
    taken: name of the implementation.
    why_not: for each other name, why it is not taken, in one sentence.
  """

  case: AttentionCase
  taken: str
  why_not: Mapping[str, str]

  def __str__(self) -> str:
    others = (f"\n  not {name}: {reason}" for name, reason in self.why_not.items())
    return f"{self.case}: {self.taken}{''.join(others)}"


def explain_attention(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[AttentionExplanation]:
  """Tells which implementation the attention of a call takes, and why not the others.

  Nothing is computed: the call is only traced, for the devices of the mesh of its arrays, or JAX's default ones.

  Args:
    function: a model, a function that calls models, or their gradient.
    *args: its arguments; arrays may be `jax.ShapeDtypeStruct`.
    **kwargs: its keyword arguments.

  Returns:
    An explanation for each kind of call, in the order of the layers.
  """
  heard: list[AttentionExplanation] = []
  token = _heard.set(heard)
  try:
    # A function of its own: JAX does not trace the same one twice.
    jax.eval_shape(lambda *args, **kwargs: function(*args, **kwargs), *args, **kwargs)
  finally:
    _heard.reset(token)
  return heard


_heard: contextvars.ContextVar[list[AttentionExplanation] | None] = contextvars.ContextVar(
  "explanations", default=None
)


def explain_case(case: AttentionCase, asked: str = "auto") -> AttentionExplanation:
  """Chooses an implementation.

  Args:
    case: what the call needs.
    asked: one of `ATTENTION_IMPLEMENTATIONS`.

  Raises:
    ConfigError: if there is no such implementation, or it cannot take the case.
  """
  check_attention_implementation(asked)
  reasons = {name: one.why_not(case) for name, one in IMPLEMENTATIONS.items()}
  few = not case.is_symbolic and case.queries < QUERIES * case.sequence_shards
  if asked != "auto" and not few:
    if (reason := reasons[asked]) is not None:
      raise ConfigError(
        f"attn_implementation={asked!r} cannot take this attention, {case}: {reason}; "
        "attn_implementation='auto' takes one that can"
      )
    taken = asked
  else:
    for name, one in IMPLEMENTATIONS.items():
      reasons[name] = reasons[name] or one.why_rather_not(case)
    taken = next(name for name, reason in reasons.items() if reason is None)
  asked_for = f"{taken} is asked for" if asked == taken else f"{taken} comes before it"
  others = {name: reason or asked_for for name, reason in reasons.items() if name != taken}
  return AttentionExplanation(case, taken, others)


def check_attention_implementation(name: Any) -> None:
  """Checks the name of an implementation.

  Raises:
    ConfigError: if there is no such implementation.
  """
  if name not in ATTENTION_IMPLEMENTATIONS:
    choices = ", ".join(ATTENTION_IMPLEMENTATIONS)
    raise ConfigError(f"attn_implementation is {name!r}, expected one of {choices}")


def _case(
  q: jax.Array, k: jax.Array, visible: VisibleKeys, soft_cap: float | None, parts: tuple[int, int, int]
) -> AttentionCase:
  B, T, N, H = q.shape
  return AttentionCase(
    rows=B,
    queries=T,
    keys=k.shape[1],
    heads=N,
    kv_heads=k.shape[2],
    head_dim=H,
    dtype=q.dtype.name,
    platform=platform_of(q),
    soft_cap=soft_cap,
    window="window" in visible,
    mask=not is_causal(visible),
    packed="query_segments" in visible,
    counted="counted" in visible,
    sequence_shards=parts[1],
    products_replaced=products_are_replaced(),
  )


def attend_dense(
  q: jax.Array, k: jax.Array, v: jax.Array, visible: VisibleKeys, scale: float, soft_cap: float | None
) -> jax.Array:
  """Attention of all queries to all keys at once, q [B, T, N, H] to k and v [B, S, K, H] -> [B, T, N, H]."""
  B, T, N, H = q.shape
  # For the backward pass only q, k and v are kept: products and weights are larger by a factor of S / H. A library
  # that replaces products may keep statistics of them, which must not come from inside of a transformation.
  run = _attend if products_are_replaced() else jax.checkpoint(_attend, static_argnums=(4, 5))
  q = q.reshape(B, T, k.shape[2], N // k.shape[2], H)
  return run(q, k, v, dense_mask(visible), scale, soft_cap).reshape(B, T, N, H)


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, soft_cap: float | None
) -> jax.Array:
  """Attention of q [B, T, K, N // K, H] to k and v [B, S, K, H], all of one dtype -> [B, T, K, N // K, H]."""
  B, T, K, G, H = q.shape
  # A KV cache lies as [B, K, H, S], which these products read as it lies: keys as the second factor, values as the first.
  k, v = (x.transpose(0, 2, 3, 1) for x in (k, v))
  rows = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  products = _read(rows, k, (3, 2)).reshape(B, K, G, T, -1)
  weights = _softmax(products, mask[:, None, None], scale, soft_cap, v.dtype).reshape(B, K, G * T, -1)
  out = _read(v, weights, (3, 3)).astype(q.dtype)
  return out.reshape(B, K, H, G, T).transpose(0, 4, 1, 3, 2)


def _read(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
  """The products of matrices x and y, both [B, K, ., .], over an axis of each: float32 [B, K, ., .]."""
  numbers = (((axes[0],), (axes[1],)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


# Where the products are kept, what lies between them and the weights is not: it is cheap to recompute.
@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def _softmax(
  products: jax.Array, mask: jax.Array, scale: float, soft_cap: float | None, dtype: DTypeLike
) -> jax.Array:
  """Attention weights from the products of queries and keys, both [B, K, N // K, T, S]."""
  logits = bound(products * scale, soft_cap)
  return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(dtype)


def _is_one_block(case: AttentionCase) -> str | None:
  return "all its queries and keys are one block" if case.queries * case.keys <= QUERIES * KEYS else None


# In the order in which "auto" tries them.
IMPLEMENTATIONS = {
  "cudnn": Implementation(attend_cudnn, why_not_cudnn, _is_one_block),
  "splash": Implementation(attend_splash, why_not_splash, _is_one_block, on_shards=True, typed=False),
  "blockwise": Implementation(attend_blockwise, why_not_blockwise, _is_one_block, on_shards=True),
  "dense": Implementation(attend_dense, lambda case: None),
}
ATTENTION_IMPLEMENTATIONS = ("auto", *IMPLEMENTATIONS)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
  """Splits the result of a projection into heads: [B, T, N * H] -> [B, T, N, H]."""
  return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def join_heads(x: jax.Array) -> jax.Array:
  """Joins heads for a projection: [B, T, N, H] -> [B, T, N * H]."""
  return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def bound(x: jax.Array, soft_cap: float | None) -> jax.Array:
  """Bounds x to (-soft_cap, soft_cap) by tanh (arXiv:2408.00118). With None, x is returned unchanged."""
  return x if soft_cap is None else jnp.tanh(x / soft_cap) * soft_cap
