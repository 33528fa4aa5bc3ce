"""One model code for both kinds of mesh.

`jax.make_mesh` gives Explicit axes, whose operations want a sharding where it is ambiguous;
`jax.sharding.Mesh` gives Auto ones, where the compiler decides. Models are written for Auto: on an Explicit
mesh the whole call runs in a region in which the axes are Auto, and its results get stated shardings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from models_core.sharding import axis_names, fit


def find_mesh(*trees: Any) -> Mesh | AbstractMesh | None:
  """The mesh in context, else the one that the arrays lie on."""
  if not (context := jax.sharding.get_abstract_mesh()).empty:
    return context
  for leaf in jax.tree.leaves(trees):
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    sharding = leaf.sharding if concrete else getattr(jax.typeof(leaf), "sharding", None)
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
      return sharding.mesh
  return None


def explicit_axes(mesh: Mesh | AbstractMesh | None) -> tuple[str, ...]:
  """Names of the mesh's Explicit axes."""
  if mesh is None:
    return ()
  return (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).explicit_axes


def call_auto(function: Callable, out_specs: Any, *trees: Any) -> Any:
  """Calls `function(*trees)` where every mesh axis is Auto.

  Args:
    function: must get all of its arrays as arguments, for it may close over none that lies on an Explicit mesh.
    out_specs: PartitionSpecs of its result, a tree. They hold for Explicit axes.
    *trees: its arguments.

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
    # Constraints that name mesh axes need a mesh in context.
    with jax.sharding.use_abstract_mesh(abstract):
      return function(*trees)
  return function(*trees)


def fit_auto(shape: Sequence[int], spec: PartitionSpec) -> PartitionSpec:
  """The part of a spec that the Auto axes in context can hold; of no entries where there are none."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.auto_axes:
    return PartitionSpec()
  auto = set(mesh.auto_axes)
  own = [entry if auto.issuperset(axis_names(entry)) else None for entry in spec]
  return fit(shape, tuple(own), mesh)[0]


def shard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """Constrains an activation inside `call_auto`, as far as the mesh can hold it; nothing without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.auto_axes:
    return x
  return jax.lax.with_sharding_constraint(x, fit_auto(x.shape, spec))


def spec_of(x: jax.Array) -> PartitionSpec:
  """The spec that an array's type states: replicated unless its mesh is Explicit."""
  sharding = jax.typeof(x).sharding
  entries = tuple(sharding.spec) if sharding.mesh.explicit_axes else ()
  return PartitionSpec(*entries, *(None,) * (x.ndim - len(entries)))
