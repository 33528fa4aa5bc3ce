"""The same model code for both kinds of mesh axes.

`jax.make_mesh` makes Explicit axes: an operation whose result could be sharded in several ways needs a stated one.
`jax.sharding.Mesh` makes Auto axes: the compiler decides. Models are written for Auto axes. On a mesh with Explicit
axes the whole call runs in a region where these axes are Auto, and the results of the call get stated shardings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from models_core.sharding import axis_names, fit


def find_mesh(*trees: Any) -> Mesh | AbstractMesh | None:
  """The mesh in context; without one, the mesh of the first array that has one, or None."""
  if not (context := jax.sharding.get_abstract_mesh()).empty:
    return context
  for leaf in jax.tree.leaves(trees):
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    sharding = leaf.sharding if concrete else getattr(jax.typeof(leaf), "sharding", None)
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
      return sharding.mesh
  return None


def explicit_axes(mesh: Mesh | AbstractMesh | None) -> tuple[str, ...]:
  """Names of the Explicit axes of a mesh; none without a mesh."""
  if mesh is None:
    return ()
  return (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).explicit_axes


def call_auto(function: Callable, out_specs: Any, *trees: Any) -> Any:
  """Calls `function(*trees)` in a context where every mesh axis is Auto.

  Args:
    function: takes all arrays as arguments; it must not close over an array that lies on an Explicit mesh.
    out_specs: tree of PartitionSpecs, the sharding of the result on Explicit axes; unused for Auto axes.
    *trees: arguments of the function.

  Returns:
    The function's result.
  """
  mesh = find_mesh(trees)
  if mesh is None:
    return function(*trees)
  abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
  if axes := explicit_axes(mesh):
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs, is_leaf=is_spec)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*trees)
  if jax.sharding.get_abstract_mesh().empty:
    # Sharding constraints that name mesh axes need a mesh in context.
    with jax.sharding.use_abstract_mesh(abstract):
      return function(*trees)
  return function(*trees)


def fit_auto(shape: Sequence[int], spec: PartitionSpec) -> PartitionSpec:
  """The part of a spec that the Auto axes of the mesh in context can hold; an empty spec if there are none."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.auto_axes:
    return PartitionSpec()
  auto = set(mesh.auto_axes)
  own = [entry if auto.issuperset(axis_names(entry)) else None for entry in spec]
  return fit(shape, tuple(own), mesh)[0]


def shard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """Constrains the sharding of an activation inside `call_auto` to the part of a spec that the mesh can hold.

  Without a mesh, x is returned unchanged.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.auto_axes:
    return x
  return jax.lax.with_sharding_constraint(x, fit_auto(x.shape, spec))


def spec_of(x: jax.Array) -> PartitionSpec:
  """The spec in the type of an array, with an entry for each axis: all None unless its mesh has Explicit axes."""
  sharding = jax.typeof(x).sharding
  entries = tuple(sharding.spec) if sharding.mesh.explicit_axes else ()
  return PartitionSpec(*entries, *(None,) * (x.ndim - len(entries)))
