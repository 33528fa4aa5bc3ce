"""A model as the arguments of compiled programs, on axes that are Auto.

Generation shards nothing itself: the model and its cache say how they are sharded. On a mesh with Explicit axes the same
arrays are seen through a mesh of the same devices with Auto axes, which copies nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from models_core.errors import ConfigError
from models_core.layers import CausalLM, one_trace


@dataclasses.dataclass(frozen=True)
class Structure:
  """A model without its arrays. It is equal for models of the same configuration, so that they share programs.

  Attributes:
    graph: of the module.
    tree: of its state.
  """

  graph: nnx.GraphDef
  tree: Any

  def model(self, leaves: list[jax.Array]) -> Any:
    """The model with these arrays."""
    return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))

  def call(self, leaves: list[jax.Array], *args: Any, **options: Any) -> Any:
    """Calls the model with these arrays, inside a program, as `CausalLM.__call__`."""
    with one_trace():
      return self.model(leaves)(*args, **options)


@dataclasses.dataclass(frozen=True)
class Placed:
  """A model on its mesh.

  Attributes:
    structure: of the model.
    leaves: its arrays.
    mesh: with Auto axes alone; None without a mesh.
    num_embed: V, the size of the vocabulary.
  """

  structure: Structure
  leaves: list[jax.Array]
  mesh: Mesh | None
  num_embed: int

  @classmethod
  def of(cls, model: Any) -> Placed:
    """Takes a model apart. Later changes of the model do not count. One without arrays yet is a `Planned`.

    Raises:
      ConfigError: if it is no language model.
    """
    if not isinstance(model, CausalLM):
      raise ConfigError(
        f"a {type(model).__name__} gives no logits: take a language model to generate or to score text"
      )
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    mesh = next((mesh for leaf in leaves if (mesh := _mesh_of(leaf)) is not None), None)
    if mesh is not None and mesh.axis_types != (auto := (AxisType.Auto,) * len(mesh.axis_names)):
      mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
      leaves = [_on(mesh, leaf) for leaf in leaves]
    kind = Planned if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves) else cls
    return kind(Structure(graph, tree), leaves, mesh, model.num_embed)

  def run(self, program: Callable[..., Any], *args: Any) -> Any:
    """Calls `program(leaves, *args)` with the mesh in context."""
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      return program(self.leaves, *args)

  def commit(self, tree: Any) -> Any:
    """The same arrays, bound to the devices that hold them, as those that come from programs of the model are.

    An array that nothing binds to a device would compile the programs that take it a second time.
    """
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding, tree))


class Planned(Placed):
  """A model that has a `jax.ShapeDtypeStruct` in the place of each array: what would run is compiled.

  JAX finds what was compiled when the same programs are called with arrays of these shapes and shardings.
  """

  def run(self, program: Any, *args: Any) -> Any:
    """Compiles `program(leaves, *args)`, and returns what it would, with a shape in the place of each array."""
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      lowered = program.lower(self.leaves, *args)
      compiled = lowered.compile()
    return jax.tree.map(
      lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
      lowered.out_info,
      compiled.output_shardings,
    )

  def commit(self, tree: Any) -> Any:
    """The same shapes."""
    return tree


def _mesh_of(leaf: Any) -> Mesh | None:
  sharding = getattr(leaf, "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def _on(mesh: Mesh, leaf: Any) -> Any:
  if _mesh_of(leaf) is None:
    return leaf
  sharding = NamedSharding(mesh, leaf.sharding.spec)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.device_put(leaf, sharding)
