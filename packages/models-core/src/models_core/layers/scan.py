"""Stacked layers: each parameter of theirs is one array with an axis of layers in front, and one scan runs them.

A model with `scan_layers=True` keeps its layers as a dictionary, `{"0:24:6": ..., "24": ...}`: the key "0:24:6" holds
the layers that `layers[0:24:6]` would be, and "24" is a layer of its own. A scan is traced and compiled once for all
layers, and its backward pass keeps one array for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from models_core.layers.mesh import declared, shard
from models_core.layers.parameters import only_shapes
from models_core.layers.remat import in_scan
from models_core.layers.stand_in import Leaf, StandIn
from models_core.stacks import find_stacks, layers_of, stack_name

# The key in the metadata of variables that stack layers: mesh axes of the axis of layers, in a tuple.
_STACKED = "stacked"


def decoder_layers(config: Any, kinds: Sequence[Any], make: Callable[[int], nnx.Module]) -> Any:
  """Makes the layers of a model, for its attribute `layers`.

  Args:
    config: has `shd_config`; if its `scan_layers` is true, layers are stacked where their kinds repeat.
    kinds: of each layer, such as its window and whether it has experts. Layers of one kind have the same structure.
    make: makes the layer with a number, with its own random values.

  Returns:
    A list of all layers, or a dictionary of stacks and single layers.
  """
  if not getattr(config, "scan_layers", False):
    return nnx.List(_without_values(kinds, make) if only_shapes() else [make(i) for i in range(len(kinds))])
  (entry,) = config.shd_config.spec("stack_l", "l")
  stacks = find_stacks(kinds)
  shapes = only_shapes()
  # In the order of the layers, which decides the random numbers that each one draws.
  made = {i: make(i) for i in range(len(kinds)) if not shapes or any(i == stack.start for stack in stacks)}
  layers: nnx.Dict = nnx.Dict()
  for stack in stacks:
    if len(stack) == 1:
      layers[str(stack.start)] = made[stack.start]
    else:
      members = [made[stack.start]] if shapes else [made[i] for i in stack]
      layers[stack_name(stack)] = _stack(members, len(stack), entry)
  return layers


def _without_values(kinds: Sequence[Any], make: Callable[[int], nnx.Module]) -> list[nnx.Module]:
  """Makes layers that have shapes instead of values.

  A copy takes a fifth of the time to make a layer: where the first and the last one of a kind are alike, those between
  them are copies.
  """
  numbers: dict[str, list[int]] = {}
  for i, kind in enumerate(kinds):
    # By what kinds look like, as find_stacks compares those that have no hash, too.
    numbers.setdefault(repr(kind), []).append(i)
  made: dict[int, nnx.Module] = {}
  for own in numbers.values():
    made |= {i: make(i) for i in (own[0], own[-1])}
    if between := own[1:-1]:
      one, other = nnx.split(made[own[0]]), nnx.split(made[own[-1]])
      copied = _are_alike(one, other)
      made |= {i: nnx.merge(*one, copy=True) if copied else make(i) for i in between}
  return [made[i] for i in range(len(kinds))]


def _are_alike(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
  """Whether two modules, as `nnx.split` returns them, differ in nothing but their values, and share none."""
  if one[0] != other[0]:
    return False
  pairs = zip(nnx.to_flat_state(one[1]), nnx.to_flat_state(other[1]), strict=True)
  return all(
    a is not b and (a.get_value().shape, a.get_value().dtype) == (b.get_value().shape, b.get_value().dtype)
    for (_, a), (_, b) in pairs
  )


def _stack(members: Sequence[nnx.Module], count: int, entry: Any) -> nnx.Module:
  """Makes the first of some layers the stack of all of them.

  Args:
    members: the layers; if only shapes matter, the first one.
    count: number of layers.
    entry: mesh axes of the axis of layers.
  """
  first, *rest = ([v for _, v in nnx.iter_graph(one) if isinstance(v, nnx.Variable)] for one in members)
  for variable, *others in zip(first, *rest, strict=True):
    value = variable.get_value()
    stacked: Any
    if rest:
      stacked = jnp.stack([value, *(other.get_value() for other in others)])
    else:
      stacked = jax.ShapeDtypeStruct((count, *value.shape), value.dtype)
    variable.set_value(stacked)
    variable.set_metadata(_with_layers(variable.get_metadata(), entry))
  return members[0]


def _with_layers(metadata: Mapping[str, Any], entry: Any) -> dict[str, Any]:
  """Metadata of a stacked variable, from that of the variable in one layer."""
  changes: dict[str, Any] = {_STACKED: (entry,)}
  if (spec := metadata.get("out_sharding")) is not None:
    changes["out_sharding"] = PartitionSpec(entry, *spec)
  if heads := metadata.get("heads"):
    changes["heads"] = (None, *heads)
  return {**metadata, **changes}


def _of_layer(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Metadata of a variable in one layer, from that of the stacked one."""
  own = {name: value for name, value in metadata.items() if name != _STACKED}
  if (spec := own.get("out_sharding")) is not None:
    own["out_sharding"] = PartitionSpec(*tuple(spec)[1:])
  if heads := own.get("heads"):
    own["heads"] = tuple(heads)[1:]
  return own


class Unit(NamedTuple):
  """Layers that run one after another, as often as their pattern repeats.

  Attributes:
    modules: a layer, or the stacks of all positions in the pattern.
    layers: for each of them, the numbers of its layers.
  """

  modules: list[Any]
  layers: list[range]

  @property
  def is_scanned(self) -> bool:
    """Whether the modules are stacks."""
    return len(self.layers[0]) > 1


def members(layers: Any) -> list[tuple[Any, range]]:
  """The modules of a model's `layers`, and the numbers of the layers that each of them holds, in order."""
  if not isinstance(layers, Mapping):
    return [(layer, range(i, i + 1)) for i, layer in enumerate(layers)]
  # Libraries set attributes in all modules, which a dictionary takes for entries.
  modules = {name: layer for name, layer in layers.items() if isinstance(layer, nnx.Module)}
  found = [(layer, layers_of(name) or range(int(name), int(name) + 1)) for name, layer in modules.items()]
  return sorted(found, key=lambda member: member[1].start)


def units(layers: Mapping[str, Any]) -> Iterator[Unit]:
  """The units of a dictionary of layers, in the order in which they run."""
  unit = Unit([], [])
  for module, numbers in members(layers):
    if unit.layers and numbers.start >= unit.layers[0].stop:
      yield unit
      unit = Unit([], [])
    unit.modules.append(module)
    unit.layers.append(numbers)
  if unit.layers:
    yield unit


def scan(
  run: Callable[[Sequence[Any], jax.Array, Any], tuple[jax.Array, Any]],
  modules: Sequence[Any],
  x: jax.Array,
  steps: Any,
) -> tuple[jax.Array, Any]:
  """Runs stacked layers by one `jax.lax.scan`. What a run changes in a layer changes in the stack.

  Variables of a stack that have no axis of layers, such as the count of a dropout, go from one repetition to the next.

  Args:
    run: called as `run(layers, x, step)` for each repetition, returns x and what is to be stacked.
    modules: stacks, one for each layer of a repetition.
    x: [B, T, D].
    steps: a tree of arrays with an axis of repetitions in front, of which `run` gets one step.

  Returns:
    x [B, T, D] of the last layer, and the stacked results.
  """
  # One module, so that what the stacks share, such as the state of random numbers, stays shared.
  original = nnx.List(list(modules))
  graphdef, state = nnx.split(original)
  flat = dict(nnx.to_flat_state(state))
  stacked = {path: leaf.get_raw_value() for path, leaf in flat.items() if _is_stacked(leaf)}
  carried, structure = jax.tree.flatten(
    {path: _raw(leaf) for path, leaf in flat.items() if path not in stacked}
  )
  place = {id(leaf): at for at, leaf in enumerate(carried)}
  stand_ins: list[tuple[StandIn, list[Leaf]]] = []

  def body(carry: tuple[jax.Array, list[Any]], step: Any) -> tuple[tuple[jax.Array, list[Any]], Any]:
    (x, carried), (slices, own) = carry, step
    values = {
      **{path: _held(value, flat[path]) for path, value in slices.items()},
      **jax.tree.unflatten(structure, carried),
    }
    variables = [(path, _of(leaf, values[path])) for path, leaf in flat.items()]
    stand_in = StandIn(original, graphdef, nnx.from_flat_state(variables))
    with in_scan():
      x, result = run(list(stand_in.module), x, own)
    changes = stand_in.changes()
    stand_ins.append((stand_in, changes))
    carried = list(carried)
    for leaf in changes:
      if id(leaf.replaces) in place:
        carried[place[id(leaf.replaces)]] = leaf.value
    return (x, carried), ([leaf.value for leaf in changes if id(leaf.replaces) not in place], result)

  (x, carried), (values, results) = jax.lax.scan(body, (x, carried), (stacked, steps))
  stand_in, changes = stand_ins[-1]
  if changes:
    rest = iter(values)
    (entry,) = next(flat[path].get_metadata()[_STACKED] for path in stacked)

    def describe(original: nnx.Variable | None, metadata: dict[str, Any]) -> dict[str, Any]:
      is_own = original is None or _is_stacked(original)
      return _with_layers(metadata, entry) if is_own else metadata

    def handed(leaf: Leaf) -> Any:
      if id(leaf.replaces) in place:
        return carried[place[id(leaf.replaces)]]
      metadata, value = _with_layers(leaf.metadata, entry), next(rest)
      if "out_sharding" not in metadata:
        return value
      return shard(value, declared(metadata, value.ndim), metadata.get("heads", ()))

    stand_in.hand_back([handed(leaf) for leaf in changes], describe)
  return x, results


def _is_stacked(leaf: Any) -> bool:
  return isinstance(leaf, nnx.Variable) and _STACKED in leaf.get_metadata()


def _raw(leaf: Any) -> Any:
  return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _of(leaf: Any, value: Any) -> Any:
  """A variable in one layer, or a bare array."""
  if not isinstance(leaf, nnx.Variable):
    return value
  own = leaf.replace(value)
  if _is_stacked(leaf):
    own.set_metadata(_of_layer(leaf.get_metadata()))
  return own


def _held(value: Any, variable: nnx.Variable) -> Any:
  """Constrains the arrays of one layer, and their gradients, to the declared sharding."""
  metadata = _of_layer(variable.get_metadata())
  return jax.tree.map(lambda x: shard(x, declared(metadata, x.ndim), metadata.get("heads", ())), value)
