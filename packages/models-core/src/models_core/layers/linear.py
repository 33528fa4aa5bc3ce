"""Projections, the embedding, and the head."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from models_core.dtypes import common_dtype
from models_core.layers.mesh import platform_of
from models_core.layers.parameters import along_last, parameter, value_of
from models_core.quantised import Quantised


class Projection(nnx.Module):
  """A linear map without bias, with the parameter `w` [out, in], as Hugging Face's files have it.

  The result has the input's dtype; if the weight's dtype differs from it, the product is computed in the
  `common_dtype` of both.
  """

  def __init__(
    self,
    out_dim: int,
    in_dim: int,
    spec: PartitionSpec,
    *,
    rngs: nnx.Rngs,
    heads: Sequence[int | None] = (),
  ):
    """Makes the parameter.

    Args:
      out_dim: size of the result.
      in_dim: size of the input.
      spec: mesh axes of `w`.
      rngs: source of random keys.
      heads: number of heads that the result and the input consist of, or None for each.
    """
    self.w = parameter((out_dim, in_dim), spec, heads=heads, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., out] in the dtype of x."""
    w = self.w[...]
    dtype = common_dtype(w.dtype, x.dtype)
    return product(x.astype(dtype), w, dtype).astype(x.dtype)


class BiasedProjection(Projection):
  """A linear map with a bias: a `Projection` with a parameter `b` [out] as well.

  Product and bias are added in float32, and the sum is rounded once.
  """

  def __init__(
    self,
    out_dim: int,
    in_dim: int,
    spec: PartitionSpec,
    bias_spec: PartitionSpec,
    *,
    rngs: nnx.Rngs,
    heads: Sequence[int | None] = (),
  ):
    """Makes the parameters: `bias_spec` are the mesh axes of `b`, all else is as for `Projection`."""
    super().__init__(out_dim, in_dim, spec, heads=heads, rngs=rngs)
    self.b = parameter((out_dim,), bias_spec, heads=heads[:1], rngs=rngs, init="zeros")

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., out] in the dtype of x."""
    w = self.w[...]
    dtype = common_dtype(w.dtype, x.dtype)
    y = product(x.astype(dtype), w, jnp.float32)
    return (y + along_last(self.b[...].astype(jnp.float32), y.ndim)).astype(x.dtype)


def projection(
  out_dim: int,
  in_dim: int,
  spec: PartitionSpec,
  bias_spec: PartitionSpec | None,
  *,
  rngs: nnx.Rngs,
  heads: Sequence[int | None] = (),
) -> Projection:
  """Makes a `BiasedProjection`, or a `Projection` if `bias_spec` is None; all else is as for these."""
  if bias_spec is None:
    return Projection(out_dim, in_dim, spec, heads=heads, rngs=rngs)
  return BiasedProjection(out_dim, in_dim, spec, bias_spec, heads=heads, rngs=rngs)


def products_are_replaced() -> bool:
  """Whether a library replaces JAX's products at the moment, as qwix does while it quantises, trains or calls a model."""
  return _identity(jax.lax.dot_general) != _DOT_GENERAL


def _identity(function: Any) -> tuple[Any, Any]:
  return function, getattr(function, "__code__", None)


# Libraries put another function into jax.lax, or other code into the function.
_DOT_GENERAL = _identity(jax.lax.dot_general)


def product(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Multiplies x [..., in] by the matrix w [out, in] -> [..., out] in a dtype, computed in the dtype of x.

  Products are summed in float32 at least, and rounded once. On CPUs, forward-mode differentiation cannot pass through
  products of bfloat16 and float16, nor through those of 64 rows and more.
  """
  if w.dtype != x.dtype:
    w = w.astype(x.dtype)
  if x.ndim > 2 and x.shape[-2] == 1:
    # For one row of three axes, XLA's CPU backend of jaxlib 0.9 copies the weight.
    return jnp.expand_dims(product(jnp.squeeze(x, -2), w, dtype), -2)
  rows = math.prod(x.shape[:-1])
  on_cpu = not products_are_replaced() and platform_of(x, w) == "cpu"
  if on_cpu and (x.dtype.itemsize == 2 or (isinstance(rows, int) and rows >= _MANY)):
    return _cpu_product(x, w).astype(dtype)
  if on_cpu and isinstance(rows, int) and rows > 1:
    # With the weight as the first factor, XLA's CPU backend reads it up to 2.5 times as fast for few rows. Without the
    # barrier it exchanges the factors again.
    y = jax.lax.dot_general(w, x, (((1,), (x.ndim - 1,)), ((), ())), preferred_element_type=dtype)
    return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)
  # The parameter itself is the operand: libraries for quantisation and LoRA find it by its identity.
  return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


# Rows for which the gradient has an order of its own; attention of as many queries has a backward pass of its own, too.
_MANY = 64


@jax.custom_vjp
def _cpu_product(x: jax.Array, w: jax.Array) -> jax.Array:
  """`product` in float32 at least, as XLA's CPU backend takes it without copies.

  It converts a weight to float32 before each product whose result is bfloat16, or whose factors differ in dtype, as those
  of JAX's own gradient do. And it transposes the first of two factors that are summed over their rows: JAX's own gradient
  puts the larger one first, such as that of the hidden values of a feed-forward block.
  """
  return _wide(x, w, 1)


def _wide(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
  """Products over the last axis of x [..., .] and an axis of w: float32 at least, [..., .]."""
  # For one row, too, the backend would convert the weight.
  is_row = x.dtype.itemsize == 2 and math.prod(x.shape[:-1]) == 1
  rows = jnp.tile(x.reshape(1, -1), (2, 1)) if is_row else x
  numbers = (((rows.ndim - 1,), (axis,)), ((), ()))
  y = jax.lax.dot_general(rows, w, numbers, preferred_element_type=_wide_dtype(x))
  return y[0].reshape(*x.shape[:-1], -1) if is_row else y


def _wide_dtype(x: jax.Array) -> DTypeLike:
  return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _cpu_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _wide(x, w, 1), (x, w)


def _cpu_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = kept
  dy = dy.astype(x.dtype)
  rows = tuple(range(x.ndim - 1))
  sum_over_rows = functools.partial(
    jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())), preferred_element_type=_wide_dtype(x)
  )
  # The backend cannot run the other order for bfloat16.
  is_swapped = x.dtype.itemsize >= 4 and dy.shape[-1] > x.shape[-1]
  dw = sum_over_rows(x, dy).T if is_swapped else sum_over_rows(dy, x)
  return _wide(dy, w, 0).astype(x.dtype), dw.astype(w.dtype)


_cpu_product.defvjp(_cpu_forward, _cpu_backward)


class Embedder(nnx.Module):
  """Token embeddings [V, D]."""

  def __init__(self, vocab_size: int, embed_dim: int, spec: PartitionSpec, *, rngs: nnx.Rngs):
    self.input_embedding = parameter((vocab_size, embed_dim), spec, rngs=rngs)

  def encode(self, tokens: jax.Array) -> jax.Array:
    """Looks up tokens [B, T] -> [B, T, D]. A token outside the vocabulary gets NaN, not another token's embedding."""
    table = self.input_embedding[...]
    if (quantised := Quantised.of(table)) is not None:
      rows = quantised.rows(tokens.reshape(-1)).numbers(table.dtype)
      return rows.reshape(*tokens.shape, -1)
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

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

  @property
  def in_features(self) -> int:
    """D, by the name that `nnx.Linear` has for it: trainers ask for it to put another head in place of this one."""
    return value_of(self.w).shape[1]


def head_logits(x: jax.Array, w: jax.Array) -> jax.Array:
  """Hidden states x [B, T, D] times w [V, D] -> float32 logits [B, T, V]."""
  return product(x.astype(common_dtype(x.dtype, w.dtype)), w, jnp.float32)
