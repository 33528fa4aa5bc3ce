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
from models_core.layers import CausalLM


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
    """Takes a model apart. Later changes of the model do not count.

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
    return cls(Structure(graph, tree), leaves, mesh, model.num_embed)

  def run(self, program: Callable[..., Any], *args: Any) -> Any:
    """Calls `program(leaves, *args)` with the mesh in context."""
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      return program(self.leaves, *args)


def _mesh_of(leaf: Any) -> Mesh | None:
  sharding = getattr(leaf, "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def _on(mesh: Mesh, leaf: Any) -> Any:
  if _mesh_of(leaf) is None:
    return leaf
  return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))
