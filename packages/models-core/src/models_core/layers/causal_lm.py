"""The base class of all language models: calling convention, masks, the KV cache, and the run through the layers."""

from __future__ import annotations

import abc
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from numpy.typing import ArrayLike

from models_core.layers import cache as cache_lib
from models_core.layers.cache import Cache
from models_core.layers.chunked_loss import chunk_length, mean_loss_in_chunks
from models_core.layers.layer_runs import LayerInputs, run_layers
from models_core.layers.mesh import call_module, find_mesh, fit_explicit, shard, spec_of
from models_core.layers.parameters import value_of
from models_core.layers.rope import Rotary
from models_core.layers.router import keep_router_logits, take_router_logits
from models_core.layers.sampler_mappings import SamplerMappings
from models_core.layers.visibility import VisibleKeys, checked_segments, visible_keys
from models_core.sharding import axis_names


class CallOptions(TypedDict, total=False):
  """The keyword arguments of a call, as types; the docstring of `CausalLM.__call__` says what each is for."""

  inputs_embeds: ArrayLike | None
  segment_ids: ArrayLike | None
  output_hidden_states: bool
  output_router_logits: bool
  skip_lm_head: bool
  decode_only_last_token: bool


class CausalLM(SamplerMappings, nnx.Module):
  """The calling convention of all models, and the run of tokens through their layers.

  A subclass sets the attributes below and implements `_rotary` and `_logits`. It overrides `windows` if layers have a
  sliding window, and `_embed` if embeddings are not only looked up, but also scaled, for example.

  Attributes:
    config: has num_layers, embed_dim, num_kv_heads, head_dim, shd_config and remat_config.
    embedder: has the parameter `input_embedding` [V, D] and the method `encode`.
    layers: each is called as `layer(x, positions, rotary, cache, mask)` and returns x [B, T, D] and its cache.
    final_norm: applied to the output of the last layer.
  """

  config: Any
  embedder: Any
  layers: Any
  final_norm: Any

  def _embed(self, tokens: jax.Array) -> jax.Array:
    """Embeds tokens [B, T] -> the input of the first layer [B, T, D]."""
    return self.embedder.encode(tokens)

  @abc.abstractmethod
  def _rotary(self, window: int | None) -> Rotary:
    """RoPE of the layers with this sliding window in tokens; None stands for layers that see all tokens."""

  @abc.abstractmethod
  def _logits(self, hidden: jax.Array) -> jax.Array:
    """Hidden states after the final norm [B, T, D] -> float32 logits [B, T, V]."""

  # A call with a cache returns one, for type checkers.
  @overload
  def __call__(
    self,
    tokens: ArrayLike | None,
    positions: ArrayLike | None,
    cache: Cache,
    attention_mask: ArrayLike | None = None,
    **options: Unpack[CallOptions],
  ) -> tuple[jax.Array, Cache]: ...
  @overload
  def __call__(
    self,
    tokens: ArrayLike | None,
    positions: ArrayLike | None = None,
    *,
    cache: Cache,
    attention_mask: ArrayLike | None = None,
    **options: Unpack[CallOptions],
  ) -> tuple[jax.Array, Cache]: ...
  @overload
  def __call__(
    self,
    tokens: ArrayLike | None,
    positions: ArrayLike | None = None,
    cache: None = None,
    attention_mask: ArrayLike | None = None,
    **options: Unpack[CallOptions],
  ) -> tuple[jax.Array, None]: ...
  @overload
  def __call__(
    self,
    tokens: ArrayLike | None,
    positions: ArrayLike | None = None,
    cache: Cache | None = None,
    attention_mask: ArrayLike | None = None,
    **options: Unpack[CallOptions],
  ) -> tuple[jax.Array, Cache | None]: ...
  def __call__(
    self,
    tokens: ArrayLike | None,
    positions: ArrayLike | None = None,
    cache: Cache | None = None,
    attention_mask: ArrayLike | None = None,
    *,
    inputs_embeds: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    output_hidden_states: bool = False,
    output_router_logits: bool = False,
    skip_lm_head: bool = False,
    decode_only_last_token: bool = False,
  ) -> tuple[jax.Array, Cache | None]:
    """Computes, for each token, the logits of the token that follows it.

    On a mesh with Explicit axes the result is sharded along B and T as the tokens are; without a cache, tokens that have
    no sharding take that of B in `act_btd`. Logits are sharded along V only if the ShardingConfig has an `act_btv`: of
    plain operations, top_k, slices and take_along_axis refuse such logits, while `cross_entropy`, `log_probs` and
    `top_k` of this package take them.

    All arrays may be nested lists, too.

    Args:
      tokens: int [B, T]; None if there are inputs_embeds.
      positions: int [B, T], position of each token in its sequence; negative for padding. None counts from 0, or, with
        a cache, goes on from the number of its slots in use, which is right for rows without padding.
      cache: from `init_cache`; its next T slots take the keys and values of these tokens.
      attention_mask: bool [B, T or 1, S], True where a query sees a key; S is at most the number of slots of the
        cache (T without a cache). None is causal attention.
      inputs_embeds: [B, T, D], input of the first layer, in place of tokens. `embed` makes it from tokens.
      segment_ids: int [B, T], number of the packed sequence that each token belongs to; tokens of different sequences
        do not see each other. Only without a cache.
      output_hidden_states: keep the hidden states after the final norm as the `nnx.Intermediate`
        "all_hidden_states", a tuple of one array [B, T, D], for `nnx.capture` or `nnx.pop`.
      output_router_logits: keep the logits of routers in the same way, as "all_router_logits": a float32 array [B, T, E]
        for each layer with experts, for `load_balancing_loss`.
      skip_lm_head: return these hidden states [B, T, D] instead of logits, for `compute_final_logits`.
      decode_only_last_token: return logits, or hidden states, of the last of the T tokens alone [B, 1, V].

    Returns:
      float32 logits [B, T, V] and the cache with T more slots in use, or None without a cache. Under jit, where a full
      cache raises no error, tokens without a free slot get logits of NaN.

    Raises:
      CacheError: if the cache has too few free slots or another number of rows.
      TypeError: if tokens are not integers, or segment_ids neither integers nor booleans.
      ValueError: if shapes do not fit, if both tokens and inputs_embeds are given or neither, if attention_mask holds
        floats, if segment_ids come with a cache, or if logits of routers are asked of a model without experts.
    """
    inputs, positions, segment_ids = _checked_inputs(tokens, inputs_embeds, positions, segment_ids)
    attention_mask = None if attention_mask is None else jnp.asarray(attention_mask)
    if cache is not None:
      config = self.config
      cache_lib.check_shapes(cache, inputs.shape[0], config.num_kv_heads, config.head_dim)
      cache_lib.check_room(cache, inputs.shape[1])
    batch = self._batch_spec(inputs, cache)
    result = batch if skip_lm_head else self._logits_spec(inputs, cache)
    if decode_only_last_token:  # one token cannot be divided
      result = PartitionSpec(*result[:1], *(None,) * len(result[1:2]), *result[2:])
    kept = batch if output_hidden_states else None
    out_specs = (result, jax.tree.map(spec_of, cache), kept, batch)

    def run(
      model: CausalLM,
      inputs: jax.Array,
      positions: jax.Array | None,
      cache: Cache | None,
      attention_mask: jax.Array | None,
      segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None, jax.Array | None, tuple[jax.Array, ...]]:
      with keep_router_logits(output_router_logits):
        hidden, new_cache = model._hidden(inputs, positions, cache, attention_mask, segment_ids)
      routers = take_router_logits(model.layers) if output_router_logits else ()
      returned = hidden[:, -1:] if decode_only_last_token else hidden
      out = returned if skip_lm_head else model._sharded_logits(returned)
      return out, new_cache, hidden if output_hidden_states else None, routers

    out, cache, hidden, routers = self._call(
      run, out_specs, inputs, positions, cache, attention_mask, segment_ids
    )
    if output_hidden_states:
      self._keep("all_hidden_states", (hidden,))
    if output_router_logits:
      if not routers:
        raise ValueError("output_router_logits=True, but this model has no experts: leave it out")
      self._keep("all_router_logits", routers)
    return out, cache

  def _keep(self, name: str, values: tuple[jax.Array, ...]) -> None:
    """Keeps values of a call for `nnx.capture` or `nnx.pop`."""
    if hasattr(self, "__captures__"):  # inside nnx.capture
      for value in values:
        self.sow(nnx.Intermediate, name, value)
    else:
      setattr(self, name, nnx.Intermediate(values))

  def embed(self, tokens: ArrayLike) -> jax.Array:
    """Embeds tokens int [B, T] -> the input of the first layer [B, T, D], which a call takes as `inputs_embeds`."""
    tokens = jnp.asarray(tokens)
    return self._call(lambda model, tokens: model._embed(tokens), self._batch_spec(tokens), tokens)

  def compute_final_logits(self, hidden: jax.Array) -> jax.Array:
    """Computes only the head: hidden states [B, T, D] -> float32 logits [B, T, V].

    For losses that compute the logits of a few tokens at a time.
    """
    return self._call(lambda model, hidden: model._sharded_logits(hidden), self._logits_spec(hidden), hidden)

  def mean_cross_entropy(
    self,
    hidden: jax.Array,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    chunk: int | None = None,
  ) -> jax.Array:
    """`models_core.layers.mean_cross_entropy` of the logits of hidden states, a few tokens at a time.

    The logits [B, T, V] of a long sequence take more memory than the model: those of 8,192 tokens and a vocabulary of
    128,256 take 4.2 GB, and their gradient as much again. A chunk's logits are computed twice, for the loss and for its
    gradient. The gradient of the head's weight is summed over the chunks in the weight's dtype.

        hidden, _ = model(tokens, skip_lm_head=True)
        loss = model.mean_cross_entropy(hidden[:, :-1], tokens[:, 1:])

    Where Explicit axes of a mesh divide T, JAX refuses these slices, because T - 1 tokens cannot be divided: pass all hidden
    states, targets that are rolled by one before they are placed on the mesh, and the weight 0 for the last ones.

    Args:
      hidden: [B, T, D], of a call with `skip_lm_head=True`.
      targets: int [B, T], from 0 to V - 1; where the weight is 0, any integer.
      weights: bool or numbers [B, T]. None weights all tokens equally.
      chunk: tokens of each row whose logits are there at once. None takes as many as have about 128 MiB of logits.

    Returns:
      float32 scalar.

    Raises:
      TypeError: if targets are not integers.
      ValueError: if targets or weights are not [B, T], or chunk is less than 1.
    """
    targets = jnp.asarray(targets)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    for name, x in (("targets", targets), ("weights", weights)):
      if x.shape != hidden.shape[:2]:
        raise ValueError(
          f"{name} have shape {x.shape}, expected {hidden.shape[:2]}, [B, T] of the hidden states"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
      raise TypeError(f"targets are {targets.dtype}, expected integers")
    if chunk is None:
      chunk = chunk_length(hidden.shape[0], self.num_embed)
    elif chunk < 1:
      raise ValueError(f"chunk is {chunk}, expected at least 1 token")

    def run(model: CausalLM, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
      return mean_loss_in_chunks(model._sharded_logits, hidden, targets, weights, chunk)

    return self._call(run, PartitionSpec(), hidden, targets, weights)

  def _sharded_logits(self, hidden: jax.Array) -> jax.Array:
    logits, shd = self._logits(hidden), self.config.shd_config
    return logits if shd.act_btv is None else shard(logits, shd.spec("act_btv", "b t v"))

  def _batch_spec(self, inputs: jax.Array, cache: Cache | None = None) -> PartitionSpec:
    """Sharding of a result [B, T, ...] on Explicit axes: that of the inputs [B, T, ...], or else of B in `act_btd`.

    With a cache it is that of the inputs alone, since samplers write the results to buffers beside these.
    """
    batch, time = spec_of(inputs)[:2]
    if time is not None:
      return PartitionSpec(batch, time)
    if batch is not None or cache is not None:
      return PartitionSpec(batch)
    return fit_explicit(inputs.shape[:1], self.config.shd_config.spec("act_btd", "b"), self._mesh())

  def _logits_spec(self, inputs: jax.Array, cache: Cache | None = None) -> PartitionSpec:
    """Sharding of logits [B, T, V] on Explicit axes."""
    batch = self._batch_spec(inputs, cache)
    if self.config.shd_config.act_btv is None:
      return batch
    (vocab,) = fit_explicit((self.num_embed,), self.config.shd_config.spec("act_btv", "v"), self._mesh())
    rows, time = (*batch, None)[:2]
    shared = {*axis_names(rows), *axis_names(time)} & set(axis_names(vocab))
    return PartitionSpec(rows, time, None if shared else vocab)

  def _hidden(
    self,
    inputs: jax.Array,
    positions: jax.Array | None,
    cache: Cache | None,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
  ) -> tuple[jax.Array, Cache | None]:
    """Runs tokens [B, T] or embeddings [B, T, D] through the layers.

    Returns:
      Hidden states after the final norm [B, T, D], NaN for tokens without a free slot, and the cache with T more slots in
      use.
    """
    if counted := positions is None:
      positions = cache_lib.next_positions(cache, *inputs.shape[:2])
    seen = self._visible(positions, cache, attention_mask, segment_ids, counted)
    windows = self.windows()
    by_window = {window: (self._rotary(window), visible) for window, visible in seen.items()}
    names = [f"layer_{i}" for i in range(len(windows))]
    caches = [None if cache is None else cache[name] for name in names]
    x = self._embed(inputs) if inputs.ndim == 2 else inputs
    shd = self.config.shd_config
    x = shard(x, shd.spec("act_btd", "b t d"))
    spec = shd.spec("act_btnh", "b t k h")
    inputs_of_layers = LayerInputs(positions, windows, by_window, self.config.remat_config, spec)
    x, new_caches = run_layers(self.layers, x, caches, inputs_of_layers)
    x = self.final_norm(x)
    if cache is None:
      return x, None
    if (name := cache_lib.limiting_layer(cache)) is not None:
      overflow = cache_lib.slots(cache[name], x.shape[1]) >= cache_lib.num_slots(cache[name])
      x = jnp.where(overflow[:, :, None], jnp.nan, x)
    return x, dict(zip(names, new_caches, strict=True))

  def _call(self, run: Callable[..., Any], out_specs: Any, *args: Any) -> Any:
    """Calls `run(self, *args)` on a mesh with Auto or Explicit axes, or without a mesh."""
    return call_module(run, out_specs, self, self._weight(), *args)

  def _weight(self) -> jax.Array:
    return value_of(self.embedder.input_embedding)

  def _mesh(self) -> Mesh | AbstractMesh | None:
    return find_mesh(self._weight())

  def windows(self) -> Sequence[int | None]:
    """Sliding window of each layer in tokens; None for a layer that sees all tokens."""
    return (None,) * self.config.num_layers

  def _visible(
    self,
    positions: jax.Array,
    cache: Cache | None,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    counted: bool,
  ) -> dict[int | None, VisibleKeys]:
    """Visible keys for each of the `windows`. Layers with the same window share them."""
    first: dict[int | None, int] = {}
    for i, window in enumerate(self.windows()):
      first.setdefault(window, i)
    return {
      window: visible_keys(
        positions,
        cache[f"layer_{i}"] if cache else None,
        attention_mask,
        segment_ids,
        window,
        counted=counted,
      )
      for window, i in first.items()
    }

  def init_cache(self, batch_size: int, cache_size: int, dtype: Any = None, *, ring: bool = False) -> Cache:
    """Makes an empty KV cache, sharded over the mesh of the parameters.

    Args:
      batch_size: B, rows.
      cache_size: S, slots of a row: one for each token, padding included.
      dtype: of keys and values; None takes the dtype of the embedding.
      ring: layers with a sliding window keep only as many tokens as their window has, which changes no logit. Padding
        must then have negative positions, and the positions of all other tokens of a row must ascend.

    Raises:
      ValueError: if batch_size or cache_size is not a positive whole number.
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
        spec=config.shd_config.spec("act_btnh", "b k h s"),
        window=window if ring else None,
      )
      for i, window in enumerate(self.windows())
    }

  @property
  def num_embed(self) -> int:
    """V, the number of rows of the embedding."""
    return self._weight().shape[0]

  def get_model_input(self) -> dict[str, Any]:
    """Arguments of a minimal call, for tools that trace a model."""
    tokens = jnp.ones((2, 1), jnp.int32)
    return {
      "tokens": tokens,
      "positions": jnp.zeros_like(tokens),
      "cache": None,
      "attention_mask": jnp.ones((2, 1, 1), bool),
    }


def _checked_inputs(
  tokens: ArrayLike | None,
  embeds: ArrayLike | None,
  positions: ArrayLike | None,
  segment_ids: ArrayLike | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """Tokens [B, T] or embeddings [B, T, D], positions and segments, as arrays of the right shapes and types."""
  if (tokens is None) == (embeds is None):
    raise ValueError("give either tokens or inputs_embeds, and None for the other")
  inputs = jnp.asarray(tokens if embeds is None else embeds)
  name, axes, expected = ("tokens", 2, "[B, T]")
  if embeds is not None:
    name, axes, expected = ("inputs_embeds", 3, "[B, T, D]")
  if positions is not None:
    positions = jnp.asarray(positions, jnp.int32)
    expected = "the same [B, T] for both" if embeds is None else f"{expected} and [B, T]"
  if inputs.ndim != axes or (positions is not None and positions.shape != inputs.shape[:2]):
    given = "" if positions is None else f" and positions {positions.shape}"
    raise ValueError(f"{name} have shape {inputs.shape}{given}, expected {expected}")
  if embeds is None and not jnp.issubdtype(inputs.dtype, jnp.integer):
    raise TypeError(f"tokens are {inputs.dtype}, expected integers")
  if segment_ids is not None:
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != inputs.shape[:2]:
      raise ValueError(
        f"segment_ids have shape {segment_ids.shape}, expected [B, T], the shape {inputs.shape[:2]} of {name}"
        f"{'' if embeds is None else ' without D'}"
      )
    segment_ids = checked_segments(segment_ids, *segment_ids.shape)
  return inputs, positions, segment_ids
