"""Logits of routers, kept on request, and the loss that spreads tokens over experts."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from models_core.layers.mesh import call_auto
from models_core.layers.scan import members

_kept: contextvars.ContextVar[bool] = contextvars.ContextVar("kept", default=False)


@contextlib.contextmanager
def keep_router_logits(keep: bool) -> Iterator[None]:
  """Context in which routers keep their logits for `take_router_logits`, or do not."""
  token = _kept.set(keep)
  try:
    yield
  finally:
    _kept.reset(token)


def sow_router_logits(module: Any, logits: jax.Array) -> None:
  """Called by the block that has the router: keeps float32 logits [B, T, E] if they are wanted."""
  if _kept.get():
    # As a variable of the module: rematerialisation and meshes hand such changes on.
    module.router_logits = nnx.Intermediate(logits)


def take_router_logits(layers: Any) -> tuple[jax.Array, ...]:
  """Removes the logits that the layers' routers kept, and returns them: [B, T, E] of each layer that has experts."""
  taken: dict[int, jax.Array] = {}
  for layer, numbers in members(layers):
    for part in [part for _, part in nnx.iter_graph(layer) if isinstance(part, nnx.Module)]:
      if isinstance(kept := vars(part).get("router_logits"), nnx.Intermediate):
        value = kept.get_value()
        taken |= {number: value[at] if len(numbers) > 1 else value for at, number in enumerate(numbers)}
        delattr(part, "router_logits")
  return tuple(taken[number] for number in sorted(taken))


def load_balancing_loss(
  router_logits: Sequence[jax.Array], top_k: int, mask: ArrayLike | None = None
) -> jax.Array:
  """The auxiliary loss of training with experts: least if all experts get equally many tokens (arXiv:2101.03961).

  It is E * sum(f * p) over E experts: f is the number of times that a token chose an expert, divided by the number of
  tokens, and p the mean of the probabilities that the router gave it. All layers count as one. With equal logits it is
  top_k; gradients flow through p alone. transformers' `load_balancing_loss_func` gives the same numbers.

  Args:
    router_logits: [B, T, E] of each layer with experts, the "all_router_logits" of a call.
    top_k: number of experts that each token chooses.
    mask: bool or numbers [B, T], weight of each token: 0 for padding. None weights all tokens equally.

  Returns:
    float32 scalar, computed in float32; 0 if all weights are 0. Training adds it to the loss, times a coefficient such
    as 0.001.

  Raises:
    ValueError: if there are no logits, if they have other shapes, if top_k is not between 1 and E, or if the mask is
      not [B, T].
  """
  logits = tuple(map(jnp.asarray, router_logits))
  shapes = {layer.shape for layer in logits}
  if len(shapes) != 1 or len(shape := shapes.pop()) != 3:
    raise ValueError(
      f"router_logits have shapes {[layer.shape for layer in logits]}, expected [B, T, E] for each layer with experts: "
      'give the "all_router_logits" of a call'
    )
  if not 1 <= top_k <= shape[2]:
    raise ValueError(f"top_k is {top_k}, expected the number of experts of a token, between 1 and {shape[2]}")
  mask = jnp.ones(shape[:2], jnp.float32) if mask is None else jnp.asarray(mask).astype(jnp.float32)
  if mask.shape != shape[:2]:
    raise ValueError(f"mask has shape {mask.shape}, expected [B, T], here {shape[:2]}")
  return _loss(logits, mask, top_k)


# Compiled for eager callers, too: for them the choices would take B * T * top_k * E numbers.
@functools.partial(jax.jit, static_argnums=2)
def _loss(logits: tuple[jax.Array, ...], mask: jax.Array, top_k: int) -> jax.Array:
  def compute(logits: tuple[jax.Array, ...], mask: jax.Array) -> jax.Array:
    chosen, given = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    weights = mask[:, :, None]
    for layer in logits:
      probabilities = jax.nn.softmax(layer.astype(jnp.float32))
      _, experts = jax.lax.top_k(probabilities, top_k)
      choices = jnp.sum(jax.nn.one_hot(experts, layer.shape[-1], dtype=jnp.float32), axis=2)
      # Where the weight is 0, logits may be anything, NaN too.
      chosen = chosen + jnp.sum(jnp.where(weights == 0, 0, choices) * weights, axis=(0, 1))
      given = given + jnp.sum(jnp.where(weights == 0, 0, probabilities) * weights, axis=(0, 1))
    total = jnp.sum(mask) * len(logits)
    total = jnp.where(total == 0, 1, total)
    return jnp.sum(chosen / total * (given / total)) * logits[0].shape[-1]

  return call_auto(compute, PartitionSpec(), logits, mask)
