"""Attention on a mesh: each device computes rows, queries and heads of its own, and gathers keys at most once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from models_core.layers.mesh import find_mesh
from models_core.layers.visibility import VisibleKeys, with_extremes
from models_core.sharding import axis_names, fit

Attend = Callable[[jax.Array, jax.Array, jax.Array, VisibleKeys], jax.Array]


def shards_of(q: jax.Array, spec: PartitionSpec) -> tuple[PartitionSpec, tuple[int, int, int]]:
  """How a mesh divides rows, queries and heads.

  Args:
    q: [B, T, N, H].
    spec: wanted mesh axes of q.

  Returns:
    The mesh axes that divide B, T and N, and into how many parts; (None, None, None) and (1, 1, 1) without a mesh.
  """
  mesh = find_mesh(q)
  if mesh is None:
    return PartitionSpec(None, None, None), (1, 1, 1)
  abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
  ways = lambda entry: math.prod(abstract.shape[name] for name in axis_names(entry))
  free = {*abstract.auto_axes, *abstract.explicit_axes}
  wanted = [*spec, None, None, None][:3]
  wanted = [e if free.issuperset(axis_names(e)) and ways(e) > 1 else None for e in wanted]
  found, _ = fit(q.shape[:3], tuple(wanted), abstract)
  rows, queries, heads = (ways(entry) for entry in found)
  return found, (rows, queries, heads)


def on_shards(attend: Attend, axes: PartitionSpec, *, typed: bool) -> Attend:
  """Attention of which each device computes a part.

  Keys and values are gathered along the sequence if queries are divided along it. If a device has fewer than one key head,
  several devices get the same one.

  Args:
    attend: attention of q [B, T, N, H] to k and v [B, S, K, H].
    axes: mesh axes that divide B, T and N, of `shards_of`.
    typed: whether JAX can type what differs between devices inside `attend`; not inside of kernels.

  Returns:
    The function of the same arguments, for arrays of all devices, to be called where no mesh axis is Explicit.
  """
  rows, queries, heads = axes

  def run(q: jax.Array, k: jax.Array, v: jax.Array, visible: VisibleKeys) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    copies = math.lcm(k.shape[2], math.prod(mesh.shape[name] for name in axis_names(heads))) // k.shape[2]
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
    # Without a cache, keys lie where their queries do.
    gathered = queries if q.shape[1] == k.shape[1] else None
    kv = PartitionSpec(rows, gathered, heads)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, visible: VisibleKeys) -> jax.Array:
      if gathered is not None:
        k, v = (lax.all_gather(x, gathered, axis=1, tiled=True) for x in (k, v))
      elif queries is not None and typed:
        k, v = (lax.pcast(x, queries, to="varying") for x in (k, v))
      return attend(q, k, v, with_extremes(visible))

    specs = (axes, kv, kv, _specs(visible, rows, queries))
    free = set(mesh.auto_axes)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=axes, axis_names=free, check_vma=typed)
    return mapped(q, k, v, visible)

  return run


def _specs(visible: VisibleKeys, rows: Any, queries: Any) -> dict[str, Any]:
  """Mesh axes of each array that describes which keys a query sees."""

  def spec(name: str, x: jax.Array) -> PartitionSpec:
    if name == "window":
      return PartitionSpec()
    along_rows = rows if x.shape[0] > 1 else None
    if name.startswith("key_"):
      return PartitionSpec(along_rows)
    return PartitionSpec(along_rows, queries if x.shape[1] > 1 else None)

  arrays: dict[str, Any] = {name: x for name, x in visible.items() if name not in ("extremes", "counted")}
  specs: dict[str, Any] = {name: spec(name, x) for name, x in arrays.items()}
  # Extremes are those of all devices' blocks; each device makes its own.
  return specs | {
    name: jax.tree.map(lambda _: PartitionSpec(), x) for name, x in visible.items() if name not in specs
  }
