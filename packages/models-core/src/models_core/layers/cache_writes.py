"""Writing new tokens into the arrays of a KV cache, whose last axis are its slots.

A donated array is written in place: a scatter does so on GPUs, while TPUs make a copy of the array for it; on TPUs and
CPUs one slice of each row is replaced in turn. On CPUs a token is written to a bfloat16 array by a pass over it, in place,
and several tokens through a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from models_core.layers.mesh import fit_auto, platform_of

Arrays = dict[str, jax.Array]


def write_slots(
  arrays: Arrays,
  new: Mapping[str, jax.Array],
  index: jax.Array,
  spec: PartitionSpec | None,
  *,
  consecutive: bool,
) -> Arrays:
  """Writes new tokens to their slots.

  Args:
    arrays: each [B, ..., S], of the cache.
    new: for each array, [B, ..., T].
    index: int [B, T], the slot of each token; a token at S or beyond is not written.
    spec: mesh axes of the axes of the arrays; None if it is unknown, for which a scatter works on any sharding.
    consecutive: whether the slots of each row follow one another.

  Returns:
    The arrays, with the new tokens converted to their dtypes.
  """
  if not arrays:
    return {}
  platform, mesh = platform_of(arrays), jax.sharding.get_abstract_mesh()
  is_sharded = not mesh.empty and bool(mesh.auto_axes) and mesh.size > 1
  is_symbolic = not all(isinstance(n, int) for n in (*index.shape, *(x.shape[-1] for x in arrays.values())))
  new = {name: new[name].astype(array.dtype) for name, array in arrays.items()}
  if not consecutive or is_symbolic or platform == "gpu" or (is_sharded and spec is None):
    return _by_scatter(arrays, new, index)
  specs = {name: fit_auto(x.shape, PartitionSpec(*(spec or ())[: x.ndim - 1])) for name, x in arrays.items()}
  return _by_slices(arrays, new, index, tuple(specs.items()) if is_sharded else None, platform == "cpu")


@jax.jit
def _by_scatter(arrays: Arrays, new: Arrays, index: jax.Array) -> Arrays:
  # Row by row: written with an index for the rows, too, the new tokens of all devices would be gathered.
  write = jax.vmap(lambda old, index, new: old.at[..., index].set(new, mode="drop"))
  return {name: write(array, index, new[name]) for name, array in arrays.items()}


# Compiled for eager callers, too: a loop would be compiled anew at each of their calls.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _by_slices(arrays: Arrays, new: Arrays, index: jax.Array, specs: Any, on_cpu: bool) -> Arrays:
  write = functools.partial(_write, on_cpu=on_cpu)
  if specs is None:
    return write(arrays, new, index)
  own = dict(specs)
  rows = PartitionSpec(*next(iter(own.values()))[:1])
  axes = set(jax.sharding.get_abstract_mesh().auto_axes)
  return jax.shard_map(write, in_specs=(own, own, rows), out_specs=own, axis_names=axes)(arrays, new, index)


def _write(arrays: Arrays, new: Arrays, index: jax.Array, on_cpu: bool) -> Arrays:
  """Writes new tokens to consecutive slots of arrays that lie on one device."""
  # XLA's CPU backend computes with bfloat16 in float32, even where it only moves numbers.
  promoted = {name for name, array in arrays.items() if on_cpu and array.dtype == jnp.bfloat16}
  if index.shape[1] == 1:
    # Written once: XLA would fuse the pass into each reader as well.
    written = lax.optimization_barrier(
      {name: _replace_slot(arrays[name], new[name], index) for name in promoted}
    )
    rest = {name: array for name, array in arrays.items() if name not in promoted}
    return written | _replace_slices(rest, new, index)
  cast = lambda tree, to: {
    n: lax.bitcast_convert_type(x, to) if n in promoted else x for n, x in tree.items()
  }
  bits = _replace_slices(cast(arrays, jnp.uint16), cast(new, jnp.uint16), index)
  return cast(bits, jnp.bfloat16)


def _replace_slot(array: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
  """Replaces one slot of each row in one pass over the array, which needs no memory of its own."""
  slots = index.reshape(-1, *(1,) * (array.ndim - 1))
  return jnp.where(jnp.arange(array.shape[-1]) == slots, new, array)


def _replace_slices(arrays: Arrays, new: Arrays, index: jax.Array) -> Arrays:
  """Replaces one slice of each row, in a loop over the rows."""
  B, T = index.shape
  T = min([T, *(array.shape[-1] for array in arrays.values())])
  if T == 0 or not arrays:
    return arrays

  def row(i: jax.Array, arrays: Arrays) -> Arrays:
    b = jnp.minimum(i, B - 1)
    return {name: _replaced(array, new[name][..., :T], index, b) for name, array in arrays.items()}

  # XLA unrolls a loop of one turn, and its CPU backend fuses the slice into the reader of the array as well, which takes
  # copies of the array: a single row is written twice instead.
  return lax.fori_loop(0, max(B, 2), row, arrays)


def _replaced(array: jax.Array, new: jax.Array, index: jax.Array, b: jax.Array) -> jax.Array:
  """Writes the tokens of row b to an array [B, ..., S].

  Where the last tokens find no slot, the slice ends with the last slot and so begins before the first token's: with five
  slots, tokens at the slots [3, 4, 5] are written as [old 2, new 3, new 4].
  """
  T = new.shape[-1]
  first = index[b, 0]
  start = jnp.minimum(first, array.shape[-1] - T)
  missing = first - start
  at: tuple[Any, ...] = (b, *(0,) * (array.ndim - 2), start)
  tokens = lax.dynamic_slice_in_dim(new, b, 1, 0)
  if T > 1:
    tokens = jnp.roll(tokens, missing, axis=-1)
  held = lax.dynamic_slice(array, at, tokens.shape)
  return lax.dynamic_update_slice(array, jnp.where(jnp.arange(T) >= missing, tokens, held), at)
