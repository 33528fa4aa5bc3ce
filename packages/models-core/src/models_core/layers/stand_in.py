"""A stand-in of a module: a copy that runs instead of the module, and whose changes go back to the module.

On a mesh with Explicit axes a model runs as a stand-in whose arrays lie on Auto axes. Whatever the run changes belongs
to the model: the count of a dropout, a value that is sown, LoRA factors, a weight that becomes a quantised one. Nothing
else is written. So a run that changes nothing works in several threads, and inside a transformation of a function that
closes over the model; and a run that fails leaves the model as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx

# A leaf of a variable's value, and the variable's metadata -> the leaf to take in its place.
Cast = Callable[[Any, Mapping[str, Any]], Any]
# The module's variable that one replaces, or None for a new one, and the metadata in the copy -> the metadata to take.
Describe = Callable[[nnx.Variable | None, dict[str, Any]], dict[str, Any]]


class Leaf(NamedTuple):
  """One array that a run changed or made.

  Attributes:
    value: the array.
    metadata: of its variable.
    replaces: the module's array that it replaces; None if it is new.
  """

  value: Any
  metadata: Mapping[str, Any]
  replaces: Any


@dataclasses.dataclass(frozen=True)
class Arguments:
  """The arguments of a call without their arrays.

  Attributes:
    structure: the tree of the arguments.
    others: the leaves that are no arrays, such as the frequencies of RoPE; None in the place of each array.
  """

  structure: Any
  others: tuple[Any, ...]

  @classmethod
  def split(cls, arguments: Any) -> tuple[Arguments, dict[int, Any]]:
    """Takes arguments apart: all but the arrays, and the arrays by their place among the leaves."""
    leaves, structure = jax.tree.flatten(arguments)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
    return cls(structure, tuple(None if i in arrays else leaf for i, leaf in enumerate(leaves))), arrays

  def join(self, arrays: Mapping[int, Any]) -> Any:
    """The arguments with these arrays."""
    leaves = [arrays.get(i, other) for i, other in enumerate(self.others)]
    return jax.tree.unflatten(self.structure, leaves)


class StandIn:
  """A copy of a module for one run.

  Attributes:
    module: the copy.
  """

  def __init__(self, module: nnx.Module, graphdef: Any, state: Any):
    """Makes the copy.

    Args:
      module: the module; it is not changed.
      graphdef: of the module, as `nnx.split` returns it.
      state: of the module, perhaps with other arrays. The copy takes its variables.
    """
    self.module = nnx.merge(graphdef, state)
    parts = zip(_parts(module), _parts(self.module), strict=True)
    self._parts = [(original, copy, _contents(copy)) for original, copy in parts]

  def is_changed(self) -> bool:
    """Whether the run changed the copy or added something to it."""
    return not all(_same(_contents(copy), before) for _, copy, before in self._parts)

  def changes(self) -> list[Leaf]:
    """The arrays of everything that the run changed in the copy or added to it. Call it once, after the run."""
    changed = [
      (original, copy, before) for original, copy, before in self._parts if not _same(_contents(copy), before)
    ]
    originals = {id(copy): original for original, copy, _ in self._parts}
    self._variables = [(original, copy) for original, copy, _ in changed if isinstance(copy, nnx.Variable)]
    self._attributes: list[tuple[Any, str, Any]] = []
    self._removed: list[tuple[Any, str]] = []
    added: list[Any] = []
    for original, copy, before in changed:
      if isinstance(copy, nnx.Variable):
        continue
      now = _contents(copy)
      self._removed += [(original, name) for name in before if name not in now]
      for name, value in now.items():
        if name in before and before[name] is value:
          continue
        if id(value) in originals:
          self._attributes.append((original, name, originals[id(value)]))
        elif nnx.is_data(value):
          self._attributes.append((original, name, _Added(len(added))))
          added.append(value)
        else:
          self._attributes.append((original, name, value))
    self._graphdef, self._state = nnx.split(added)
    leaves: list[Leaf] = []
    for original, copy in self._variables:
      old, new = (jax.tree.leaves(variable.get_raw_value()) for variable in (original, copy))
      replaced = old if len(old) == len(new) else [None] * len(new)
      leaves += [Leaf(x, copy.get_metadata(), y) for x, y in zip(new, replaced, strict=True)]
    for _, leaf in nnx.to_flat_state(self._state):
      leaves += [Leaf(x, _metadata(leaf), None) for x in jax.tree.leaves(_raw(leaf))]
    return leaves

  def hand_back(self, values: Sequence[Any], describe: Describe | None = None) -> None:
    """Writes the changes to the module.

    Args:
      values: the arrays of `changes`, in its order, as the module shall have them.
      describe: the metadata that variables shall have in the module; None is that of the copy.

    Raises:
      flax.errors.TraceContextError: if there are changes, and the module belongs to an outer transformation.
    """
    rest = iter(values)
    take = lambda leaf, _: next(rest)
    for original, copy in self._variables:
      original.copy_from(cast(nnx.Variable, _described(_mapped(copy, take), original, describe)))
    state = [
      (path, _described(_mapped(leaf, take), None, describe)) for path, leaf in nnx.to_flat_state(self._state)
    ]
    added = nnx.merge(self._graphdef, nnx.from_flat_state(state))
    for original, name in self._removed:
      delattr(original, name)
    for original, name, value in self._attributes:
      setattr(original, name, added[value.number] if isinstance(value, _Added) else value)


class _Added(NamedTuple):
  """Stands for a new value of an attribute: its number among all new values."""

  number: int


def _parts(module: nnx.Module) -> list[Any]:
  """All variables and modules of a module, itself included, in an order that follows from its structure."""
  return [value for _, value in nnx.iter_graph(module) if isinstance(value, (nnx.Variable, nnx.Pytree))]


def _contents(part: Any) -> Any:
  """What a run may change: leaves, structure and metadata of a variable; attributes of a module."""
  if isinstance(part, nnx.Variable):
    return (*jax.tree.flatten(part.get_raw_value()), dict(part.get_metadata()))
  # Attributes of Flax itself: what kind each attribute has, and the trace that the module belongs to.
  return {name: value for name, value in vars(part).items() if not name.startswith("_pytree__")}


def _same(now: Any, before: Any) -> bool:
  if isinstance(now, dict):
    return now.keys() == before.keys() and all(value is before[name] for name, value in now.items())
  (new, structure, metadata), (old, *rest) = now, before
  return [structure, metadata] == rest and all(x is y for x, y in zip(new, old, strict=True))


def _raw(leaf: Any) -> Any:
  return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _metadata(leaf: Any) -> Mapping[str, Any]:
  return leaf.get_metadata() if isinstance(leaf, nnx.Variable) else {}


def map_state(state: Any, cast_leaf: Cast) -> Any:
  """A copy of a module's state with other arrays."""
  return nnx.from_flat_state([(path, _mapped(leaf, cast_leaf)) for path, leaf in nnx.to_flat_state(state)])


def _described(leaf: Any, original: nnx.Variable | None, describe: Describe | None) -> Any:
  """A variable with the metadata that it shall have in the module; bare arrays have none."""
  if describe is not None and isinstance(leaf, nnx.Variable):
    leaf.set_metadata(describe(original, leaf.get_metadata()))
  return leaf


def _mapped(leaf: Any, cast_leaf: Cast) -> Any:
  """A variable or a bare array with other arrays."""
  metadata = _metadata(leaf)
  value = jax.tree.map(lambda x: cast_leaf(x, metadata), _raw(leaf))
  return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value
