"""The way of tokens through the layers of a model: one by one, or stacked layers by one scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models_core.layers.cache import LayerCache, extended, pick, recorded, recording
from models_core.layers.remat import RematConfig
from models_core.layers.rope import Rotary
from models_core.layers.scan import scan, units
from models_core.layers.traces import layer_function
from models_core.layers.visibility import VisibleKeys

# A layer, its window, and its cache.
_Member = tuple[Callable[..., Any], int | None, LayerCache | None]


class LayerInputs(NamedTuple):
  """What all layers of a model are called with.

  Attributes:
    positions: int [B, T].
    windows: sliding window of each layer in tokens, or None.
    by_window: RoPE and visible keys of each window.
    remat: what the backward pass recomputes.
    spec: mesh axes of keys and values [B, T, K, H].
  """

  positions: jax.Array
  windows: Sequence[int | None]
  by_window: Mapping[int | None, tuple[Rotary, VisibleKeys]]
  remat: RematConfig
  spec: PartitionSpec


def run_layers(
  layers: Any, x: jax.Array, caches: Sequence[LayerCache | None], inputs: LayerInputs
) -> tuple[jax.Array, list[Any]]:
  """Runs all layers.

  Args:
    layers: of `decoder_layers`: a list of layers, or a dictionary of stacks and single layers.
    x: [B, T, D], input of the first layer.
    caches: of each layer.
    inputs: what all layers are called with.

  Returns:
    Output of the last layer [B, T, D], and the layers' caches with T more slots in use.
  """
  if isinstance(layers, Mapping):
    return _run_stacks(layers, x, caches, inputs)
  return _run_each(zip(layers, inputs.windows, caches, strict=True), x, inputs)


def _run_each(
  members: Iterable[_Member], x: jax.Array, inputs: LayerInputs
) -> tuple[jax.Array, list[LayerCache | None]]:
  """Runs some layers, one after another."""
  extended_caches = []
  function_of = layer_function() or inputs.remat.layer
  for layer, window, cache in members:
    rotary, visible = inputs.by_window[window]
    x, cache = function_of(layer)(x, inputs.positions, rotary, cache, visible)
    extended_caches.append(cache)
  return x, extended_caches


def _run_stacks(
  layers: Mapping[str, Any], x: jax.Array, caches: Sequence[LayerCache | None], inputs: LayerInputs
) -> tuple[jax.Array, list[Any]]:
  """Runs stacked layers, each unit by one scan.

  In the scan each layer sees a copy of its cache. What it appends is appended to the cache itself afterwards.
  """
  new_caches: list[Any] = list(caches)
  for unit in units(layers):
    held = [(inputs.windows[own.start], [caches[i] for i in own]) for own in unit.layers]
    if not unit.is_scanned:
      members = [(layer, window, one) for layer, (window, (one,)) in zip(unit.modules, held, strict=True)]
      x, (new_caches[unit.layers[0].start],) = _run_each(members, x, inputs)
      continue

    def run(modules: Sequence[Any], x: jax.Array, at: Any, held: Any = held) -> tuple[jax.Array, Any]:
      own = [None if several[0] is None else recording(pick(several, at)) for _, several in held]
      members = [(layer, window, cache) for layer, (window, _), cache in zip(modules, held, own, strict=True)]
      x, after = _run_each(members, x, inputs)
      return x, [None if cache is None else recorded(cache) for cache in after]

    x, new = scan(run, unit.modules, x, jnp.arange(len(unit.layers[0]), dtype=jnp.int32))
    for own, appended in zip(unit.layers, new, strict=True):
      for at, i in enumerate(own):
        if (cache := caches[i]) is not None:
          part = jax.tree.map(lambda array, at=at: array[at], appended)
          new_caches[i] = extended(cache, part, inputs.positions, inputs.spec)
  return x, new_caches
