"""Projections, the embedding, and the head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from models_core.dtypes import common_dtype
from models_core.layers.parameters import parameter


class Projection(nnx.Module):
  """A linear map without bias. An einsum equation such as "btd,nhd->btnh" names the axes of input, weight and result.

  The weight `w` keeps the axis order of Hugging Face's files, output axes first. The result has the input's dtype; if
  the weight's dtype differs from it, the product is computed in the `common_dtype` of both.
  """

  def __init__(self, equation: str, shape: Sequence[int], spec: PartitionSpec, *, rngs: nnx.Rngs):
    self.equation = equation
    self.w = parameter(shape, spec, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Multiplies x, with the equation's input axes -> the equation's output axes, in the dtype of x."""
    w = self.w[...]
    if w.dtype == x.dtype:
      # The parameter itself is the operand, without a cast: libraries for quantisation and LoRA intercept this call.
      return jnp.einsum(self.equation, x, w)
    dtype = common_dtype(w.dtype, x.dtype)
    return jnp.einsum(self.equation, x.astype(dtype), w.astype(dtype)).astype(x.dtype)


class BiasedProjection(nnx.Module):
  """A linear map with a bias: a `Projection` with a parameter `b` over its output axes.

  Product and bias are added in float32, and the sum is rounded once.
  """

  def __init__(
    self,
    equation: str,
    shape: Sequence[int],
    spec: PartitionSpec,
    bias_spec: PartitionSpec,
    *,
    rngs: nnx.Rngs,
  ):
    self.equation = equation
    self.w = parameter(shape, spec, rngs=rngs)
    self.b = parameter(shape[: len(bias_spec)], bias_spec, rngs=rngs, init="zeros")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Multiplies x, with the equation's input axes -> the equation's output axes, in the dtype of x."""
    w = self.w[...]
    if w.dtype == x.dtype:
      # The parameter itself is the operand, without a cast: libraries for quantisation and LoRA intercept this call.
      y = jnp.einsum(self.equation, x, w, preferred_element_type=jnp.float32)
    else:
      dtype = common_dtype(w.dtype, x.dtype)
      y = jnp.einsum(self.equation, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
    return (y + self.b[...].astype(jnp.float32)).astype(x.dtype)


class Embedder(nnx.Module):
  """Token embeddings [V, D]."""

  def __init__(self, vocab_size: int, embed_dim: int, spec: PartitionSpec, *, rngs: nnx.Rngs):
    self.input_embedding = parameter((vocab_size, embed_dim), spec, rngs=rngs)

  def encode(self, tokens: jax.Array) -> jax.Array:
    """Looks up tokens [B, T] -> [B, T, D]. A token outside the vocabulary gets NaN, not another token's embedding."""
    return (
      self.input_embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )

  def decode(self, x: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] -> float32 logits [B, T, V], with the embedding as a tied head."""
    return head_logits(x, self.input_embedding[...])


class Head(nnx.Module):
  """An untied head, with the parameter `w` [V, D]."""

  def __init__(self, vocab_size: int, embed_dim: int, spec: PartitionSpec, *, rngs: nnx.Rngs):
    self.w = parameter((vocab_size, embed_dim), spec, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] -> float32 logits [B, T, V]."""
    return head_logits(x, self.w[...])


def head_logits(x: jax.Array, w: jax.Array) -> jax.Array:
  """Hidden states x [B, T, D] times w [V, D] -> float32 logits [B, T, V]."""
  dtype = common_dtype(x.dtype, w.dtype)
  return jnp.einsum("btd,vd->btv", x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
