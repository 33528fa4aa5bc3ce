"""What every language model offers its callers, whatever its layers are."""

from __future__ import annotations

import abc
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from models_core.layers import cache as cache_lib
from models_core.layers.attention import visible_keys
from models_core.layers.cache import Cache, LayerCache
from models_core.layers.mesh import call_auto, explicit_axes, find_mesh, shard, spec_of
from models_core.layers.rope import Rotary


class CausalLM(nnx.Module):
  """The calling convention of all models, and the way of tokens through their layers.

  A model makes the attributes below and adds `_rotary` and `_logits`; `windows` if layers slide, `_embed` if
  embeddings are more than looked up.

  Attributes:
    config: has num_layers, embed_dim, num_kv_heads, head_dim, shd_config and remat_config.
    embedder: has the parameter `input_embedding` [V, D] and the method `encode`.
    layers: each is called as `layer(x, positions, rotary, cache, mask)` and returns x [B, T, D] and its cache.
    final_norm: of the last layer's x.
  """

  config: Any
  embedder: Any
  layers: Any
  final_norm: Any

  def _embed(self, tokens: jax.Array) -> jax.Array:
    """[B, T] -> what the first layer gets, [B, T, D]."""
    return shard(self.embedder.encode(tokens), self.config.shd_config.spec("act_btd", "b t d"))

  @abc.abstractmethod
  def _rotary(self, window: int | None) -> Rotary:
    """RoPE of the layers that have this sliding window."""

  @abc.abstractmethod
  def _logits(self, hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> float32 [B, T, V]."""

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache | None = None,
    attention_mask: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    output_hidden_states: bool = False,
    skip_lm_head: bool = False,
  ) -> tuple[jax.Array, Cache | None]:
    """Logits of the next token at each place.

    Args:
      tokens: int [B, T].
      positions: int [B, T], of each token in its sequence; negative for padding.
      cache: of `init_cache`, whose next T slots take these tokens' keys and values.
      attention_mask: [B, T or 1, S], True where a query sees a key, S up to the cache's slots (or T without
        a cache). None is causal attention.
      segment_ids: int [B, T] of packed sequences, which don't see each other. Only without a cache.
      output_hidden_states: keep the last hidden states as the `nnx.Intermediate` "all_hidden_states", a
        tuple of one array [B, T, D], for `nnx.capture` or `nnx.pop`.
      skip_lm_head: return the hidden states [B, T, D] instead of logits, for `compute_final_logits`.

    Returns:
      float32 logits [B, T, V] and the new cache, or None without one. A token that found no room in the cache
      under jit, where that is no error yet, gets NaN.

    Raises:
      CacheError: if the cache has too few slots left.
      TypeError: if tokens are no integers.
      ValueError: if shapes do not fit.
    """
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions, jnp.int32)
    if tokens.ndim != 2 or positions.shape != tokens.shape:
      raise ValueError(f"tokens {tokens.shape} and positions {positions.shape} must both be [B, T]")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise TypeError(f"tokens are {tokens.dtype}, expected integers")
    if segment_ids is not None and jnp.shape(segment_ids) != tokens.shape:
      raise ValueError(f"segment_ids {jnp.shape(segment_ids)} must be [B, T], as tokens {tokens.shape} are")
    if cache is not None:
      cache_lib.check_rows(cache, tokens.shape[0])
      cache_lib.check_room(cache, tokens.shape[1])
    batch = PartitionSpec(*spec_of(tokens)[:1])
    out_specs = (batch, jax.tree.map(spec_of, cache), batch if output_hidden_states else None)

    def run(
      model: CausalLM,
      tokens: jax.Array,
      positions: jax.Array,
      cache: Cache | None,
      attention_mask: jax.Array | None,
      segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
      hidden, new_cache = model._hidden(tokens, positions, cache, attention_mask, segment_ids)
      if cache is not None and (name := cache_lib.limiting_layer(cache)) is not None:
        overflow = cache_lib.slots(cache[name], tokens.shape[1]) >= cache[name]["k"].shape[1]
        hidden = jnp.where(overflow[:, :, None], jnp.nan, hidden)
      out = hidden if skip_lm_head else model._logits(hidden)
      return out, new_cache, hidden if output_hidden_states else None

    out, cache, hidden = self._call(run, out_specs, tokens, positions, cache, attention_mask, segment_ids)
    if output_hidden_states:
      if hasattr(self, "__captures__"):  # inside nnx.capture
        self.sow(nnx.Intermediate, "all_hidden_states", hidden)
      else:
        self.all_hidden_states = nnx.Intermediate((hidden,))
    return out, cache

  def compute_final_logits(self, hidden: jax.Array) -> jax.Array:
    """The head alone: [B, T, D] -> float32 [B, T, V]. For losses that take the vocabulary in chunks."""
    return self._call(
      lambda model, hidden: model._logits(hidden), PartitionSpec(*spec_of(hidden)[:1]), hidden
    )

  def _hidden(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
  ) -> tuple[jax.Array, Cache | None]:
    """Normalised hidden states [B, T, D] and the cache, T slots further."""
    masks, windows = self._masks(positions, cache, attention_mask, segment_ids), self.windows()
    by_window = {window: (self._rotary(window), mask) for window, mask in masks.items()}
    names = [f"layer_{i}" for i in range(len(windows))]
    caches = [None if cache is None else cache[name] for name in names]
    layers = list(zip(self.layers, windows, caches, strict=True))
    new_caches: list[Any] = []
    x, size = self._embed(tokens), _period(windows)
    for start in range(0, len(layers), size):
      x, extended = self._run_unit(layers[start : start + size], x, positions, by_window)
      new_caches += extended
    return self.final_norm(x), None if cache is None else dict(zip(names, new_caches, strict=True))

  def _run_unit(
    self,
    layers: Sequence[tuple[Callable[..., Any], int | None, LayerCache | None]],
    x: jax.Array,
    positions: jax.Array,
    by_window: Mapping[int | None, tuple[Rotary, jax.Array]],
  ) -> tuple[jax.Array, list[LayerCache | None]]:
    """Runs the layers after which the windows repeat.

    Args:
      layers: of the unit, each with its window and its cache.
      x: [B, T, D].
      positions: [B, T].
      by_window: RoPE and mask [B, T, S].

    Returns:
      x [B, T, D] and the layers' caches, T slots further.
    """
    extended = []
    for layer, window, cache in layers:
      rotary, mask = by_window[window]
      x, cache = self.config.remat_config.layer(layer)(x, positions, rotary, cache, mask)
      extended.append(cache)
    return x, extended

  def _call(self, run: Callable[..., Any], out_specs: Any, *args: Any) -> Any:
    """`run(self, *args)` on a mesh of either kind."""
    if explicit_axes(self._mesh()):
      # Explicit arrays must be arguments of the region, so the parameters are, too.
      graphdef, state = nnx.split(self)
      return call_auto(lambda state, *args: run(nnx.merge(graphdef, state), *args), out_specs, state, *args)
    # The weight goes along for its mesh.
    return call_auto(lambda weight, *args: run(self, *args), out_specs, self._weight(), *args)

  def _weight(self) -> jax.Array:
    return self.embedder.input_embedding[...]

  def _mesh(self) -> Mesh | AbstractMesh | None:
    return find_mesh(self._weight())

  def windows(self) -> Sequence[int | None]:
    """The sliding window of each layer in tokens, None for a layer that sees all."""
    return (None,) * self.config.num_layers

  def _masks(
    self,
    positions: jax.Array,
    cache: Cache | None,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
  ) -> dict[int | None, jax.Array]:
    """The keys that are visible [B, T, S], for each of the `windows`. Layers with the same one share a mask."""
    first: dict[int | None, int] = {}
    for i, window in enumerate(self.windows()):
      first.setdefault(window, i)
    return {
      window: visible_keys(
        positions, cache[f"layer_{i}"] if cache else None, attention_mask, segment_ids, window
      )
      for window, i in first.items()
    }

  def init_cache(self, batch_size: int, cache_size: int, dtype: Any = None, *, ring: bool = False) -> Cache:
    """An empty KV cache, placed on the mesh of the parameters.

    Args:
      batch_size: B, rows.
      cache_size: S, the tokens that a row has room for.
      dtype: of keys and values; None is the embedding's.
      ring: layers with a sliding window keep no more tokens than it has, which changes no logit. Padding must
        have negative positions, and other positions must ascend.

    Raises:
      ValueError: if a size is no positive whole number.
    """
    for name, size in (("batch_size", batch_size), ("cache_size", cache_size)):
      if not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(f"{name} is {size!r}, expected a positive whole number")
    config, mesh = self.config, self._mesh()
    return {
      f"layer_{i}": cache_lib.init_layer(
        batch_size,
        cache_size,
        config.num_kv_heads,
        config.head_dim,
        dtype or self._weight().dtype,
        mesh=mesh,
        spec=config.shd_config.spec("act_btnh", "b s k h"),
        window=window if ring else None,
      )
      for i, window in enumerate(self.windows())
    }

  @property
  def num_embed(self) -> int:
    """Rows of the embedding."""
    return self._weight().shape[0]

  def get_model_input(self) -> dict[str, Any]:
    """Arguments of a smallest call, for tools that trace a model."""
    tokens = jnp.ones((2, 1), jnp.int32)
    return {
      "tokens": tokens,
      "positions": jnp.zeros_like(tokens),
      "cache": None,
      "attention_mask": jnp.ones((2, 1, 1), bool),
    }


def _period(windows: Sequence[int | None]) -> int:
  """The number of layers after which their windows repeat; the last repetition may be cut short."""
  repeats = lambda size: all(window == windows[i % size] for i, window in enumerate(windows))
  return next(size for size in range(1, len(windows) + 1) if repeats(size))
