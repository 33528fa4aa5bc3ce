"""Products of groups of rows, each group with a matrix of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

Names = tuple[str, ...]

# Most rows that are multiplied at a time. Fewer keep a CPU's caches, more keep an accelerator's units busy.
_CPU_BLOCK, _BLOCK = 128, 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, mesh_axes: Names = ()) -> jax.Array:
  """Multiplies each of E groups of rows by a matrix of its own.

  With sizes [2, 1], rows 0 and 1 are multiplied by w[0], row 2 by w[1], and all further rows of the result are 0.

  Args:
    x: [M, D], the rows of the first group first.
    w: [E, F, D].
    sizes: int32 [E], number of rows of each group.
    mesh_axes: the mesh axes along which the arrays differ, inside shard_map.

  Returns:
    [M, F] in the dtype of x, summed in float32 and rounded once; rows that belong to no group are 0.
  """
  return _dot(x, w, sizes, 2, mesh_axes)


def _dot(x: jax.Array, w: jax.Array, sizes: jax.Array, axis: int, mesh_axes: Names) -> jax.Array:
  """Contracts the last axis of x with an axis of w [E, F, D]: 1 or 2."""
  # A ragged dot is a kernel on TPUs alone. On CPUs and GPUs XLA multiplies all rows with all matrices.
  in_blocks = functools.partial(_dot_in_blocks, axis=axis, mesh_axes=mesh_axes)
  out = lax.platform_dependent(
    x,
    w,
    sizes,
    tpu=functools.partial(_ragged_dot, axis=axis),
    cpu=functools.partial(in_blocks, largest=_CPU_BLOCK),
    default=functools.partial(in_blocks, largest=_BLOCK),
  )
  return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), out, 0)


def _ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, axis: int) -> jax.Array:
  numbers = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (axis,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
  )
  return lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=x.dtype)


def _dot_in_blocks(
  x: jax.Array, w: jax.Array, sizes: jax.Array, axis: int, mesh_axes: Names, largest: int
) -> jax.Array:
  """The same in blocks of rows; rows that belong to no group may hold anything."""
  M, block = x.shape[0], _block(x, sizes, largest)
  padded = jnp.pad(x, ((0, block), (0, 0)))
  blocks = -(-sizes // block)
  ends, starts = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes

  def multiply(i: jax.Array, out: jax.Array) -> jax.Array:
    group = jnp.sum((i >= ends).astype(jnp.int32))
    start = starts[group] + (i - ends[group] + blocks[group]) * block
    rows = lax.dynamic_slice_in_dim(padded, start, block)
    matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)
    product = lax.dot_general(
      rows, matrix, (((1,), (axis - 1,)), ((), ())), preferred_element_type=jnp.float32
    )
    # Rows that a block writes past the end of its group are overwritten by the first block of the next group.
    return lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), start, 0)

  out = varying(jnp.zeros((M + block, w.shape[3 - axis]), x.dtype), mesh_axes)
  return lax.fori_loop(0, ends[-1], multiply, out)[:M]


def _weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array, mesh_axes: Names) -> jax.Array:
  """Sums the outer products of each group's rows: x [M, D], dy [M, F] -> [E, F, D]."""
  # A ragged dot over rows multiplies, on every platform, all rows for each group.
  in_blocks = functools.partial(_outer_in_blocks, mesh_axes=mesh_axes)
  return lax.platform_dependent(
    x,
    dy,
    sizes,
    # A cast inside the loop costs a CPU several times the products.
    cpu=functools.partial(in_blocks, largest=_CPU_BLOCK, kept=jnp.float32),
    default=functools.partial(in_blocks, largest=_BLOCK, kept=x.dtype),
  )


def _outer_in_blocks(
  x: jax.Array, dy: jax.Array, sizes: jax.Array, mesh_axes: Names, largest: int, kept: DTypeLike
) -> jax.Array:
  """The gradient in blocks of rows, each group's summed in float32 and kept in a dtype until all are there."""
  block = _block(x, sizes, largest)
  padded, padded_dy = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, dy))

  def outer(group: tuple[jax.Array, jax.Array]) -> jax.Array:
    first, size = group

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
      rows, dy = (lax.dynamic_slice_in_dim(array, first + i * block, block) for array in (padded, padded_dy))
      dy = jnp.where(jnp.arange(block)[:, None] < size - i * block, dy, 0)
      return total + jnp.einsum("mf,md->fd", dy, rows, preferred_element_type=jnp.float32)

    total = varying(jnp.zeros((dy.shape[1], x.shape[1]), jnp.float32), mesh_axes)
    return lax.fori_loop(0, -(-size // block), add, total).astype(kept)

  return lax.map(outer, (jnp.cumsum(sizes) - sizes, sizes)).astype(x.dtype)


def _block(x: jax.Array, sizes: jax.Array, largest: int) -> int:
  """Number of rows multiplied at a time: about twice the average size of a group."""
  rows, groups = x.shape[0], sizes.shape[0]
  return 1 if rows <= groups else min(largest, 1 << (2 * rows // groups - 1).bit_length())


def varying(array: jax.Array, axes: Names) -> jax.Array:
  """Marks an array that shard_map's types hold to be equal along mesh axes as one that may differ along them."""
  return lax.pcast(array, axes, to="varying") if axes else array


def _forward(
  x: jax.Array, w: jax.Array, sizes: jax.Array, mesh_axes: Names
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  return _dot(x, w, sizes, 2, mesh_axes), (x, w, sizes)


def _backward(
  mesh_axes: Names, kept: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x, w, sizes = kept
  return _dot(dy, w, sizes, 1, mesh_axes), _weight_gradient(x, dy, sizes, mesh_axes), None


grouped_dot.defvjp(_forward, _backward)
