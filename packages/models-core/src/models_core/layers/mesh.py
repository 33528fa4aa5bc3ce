"""The same model code for both kinds of mesh axes.

`jax.make_mesh` makes Explicit axes: an operation whose result could be sharded in several ways needs a stated one.
`jax.sharding.Mesh` makes Auto axes: the compiler decides. Models are written for Auto axes. On a mesh with Explicit
axes the whole call runs in a region where these axes are Auto, and the results of the call get stated shardings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from models_core.layers.stand_in import Leaf, StandIn, map_state
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


def platform_of(*trees: Any) -> str:
  """For which devices a computation is traced: "cpu", "gpu" or "tpu". The mesh tells, or else JAX's default device."""
  mesh = find_mesh(trees)
  abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
  if (device := getattr(abstract, "abstract_device", None)) is not None:
    # Older versions of JAX tell only the kind, such as "TPU v5 lite".
    kind = device.device_kind.lower()
    return getattr(device, "platform", kind if kind == "cpu" else "tpu" if "tpu" in kind else "gpu")
  default = jax.config.jax_default_device  # type: ignore[attr-defined]
  return default.platform if isinstance(default, jax.Device) else default or jax.default_backend()


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


def on_auto_axes(function: Callable[..., jax.Array], sharding: Sharding) -> Callable[..., jax.Array]:
  """The function, for which the axes of an Explicit mesh are Auto; its result gets the given sharding."""
  if isinstance(sharding, NamedSharding) and (axes := explicit_axes(sharding.mesh)):
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)
  return function


def call_module(
  function: Callable[..., Any], out_specs: Any, module: nnx.Module, weight: jax.Array, *trees: Any
) -> Any:
  """Calls `function(module, *trees)` in a context where every mesh axis is Auto.

  On Explicit axes, and where gradients by sharded parameters may be taken, a `StandIn` of the module runs. On Auto axes
  it holds each gradient to the sharding of its parameter, for which the compiler would often choose another one.

  Args:
    function: takes the module, and all other arrays as arguments.
    out_specs: tree of PartitionSpecs, the sharding of the result on Explicit axes; unused for Auto axes.
    module: the module. What the function changes in it stays changed.
    weight: a parameter of the module, which tells the mesh.
    *trees: further arguments of the function.

  Returns:
    The function's result.
  """
  mesh = find_mesh(weight, trees)
  explicit = explicit_axes(mesh)
  if mesh is None or not (explicit or isinstance(weight, jax.core.Tracer)):
    return call_auto(lambda _, *trees: function(module, *trees), out_specs, weight, *trees)
  stand_ins = []

  def run(_: jax.Array, *trees: Any) -> Any:
    graphdef, state = nnx.split(module)
    stand_in = StandIn(module, graphdef, map_state(state, _to_auto if explicit else _held))
    stand_ins.append(stand_in)
    return function(stand_in.module, *trees)

  out = call_auto(run, out_specs, weight, *trees)
  changes = stand_ins[0].changes()
  stand_ins[0].hand_back([_to_explicit(leaf, mesh) if explicit else leaf.value for leaf in changes])
  return out


def _to_auto(x: Any, metadata: Mapping[str, Any]) -> Any:
  """Casts an array of an Explicit mesh to the Auto mesh in context."""
  return jax.sharding.reshard(x, PartitionSpec(*(None,) * x.ndim)) if isinstance(x, jax.Array) else x


def _to_explicit(leaf: Leaf, mesh: Mesh | AbstractMesh) -> Any:
  """Casts an array to an Explicit mesh: with the sharding of what it replaces, or else its own, or the declared one."""
  x, old = leaf.value, leaf.replaces
  if not isinstance(x, jax.Array):
    return x
  if isinstance(old, jax.Array) and old.shape == x.shape:
    spec = spec_of(old)
  elif not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
    spec = x.sharding.spec
  else:
    spec, _ = fit(x.shape, declared(leaf.metadata, x.ndim), mesh, leaf.metadata.get("heads", ()))
  # Older versions of JAX do not reshard an array that lies on one device without a mesh in context.
  concrete = isinstance(mesh, Mesh) and not isinstance(x, jax.core.Tracer)
  return (jax.device_put if concrete else jax.sharding.reshard)(x, NamedSharding(mesh, spec))


def _held(x: Any, metadata: Mapping[str, Any]) -> Any:
  """Constrains a parameter, and with it its gradient, to its declared sharding."""
  if not isinstance(x, jax.core.Tracer):
    return x
  return shard(x, declared(metadata, x.ndim), metadata.get("heads", ()))


def declared(metadata: Mapping[str, Any], ndim: int) -> PartitionSpec:
  """The declared spec of a variable; empty if it is not one of an array with this many axes."""
  spec = metadata.get("out_sharding") or ()
  return PartitionSpec(*spec) if len(spec) <= ndim else PartitionSpec()


def fit_auto(shape: Sequence[int], spec: PartitionSpec, heads: Sequence[int | None] = ()) -> PartitionSpec:
  """The part of a spec that the Auto axes of the mesh in context can hold; an empty spec if there are none."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.auto_axes:
    return PartitionSpec()
  auto = set(mesh.auto_axes)
  own = [entry if auto.issuperset(axis_names(entry)) else None for entry in spec]
  return fit(shape, tuple(own), mesh, heads)[0]


def fit_explicit(
  shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh | None
) -> PartitionSpec:
  """The part of a spec that the Explicit axes of a mesh can hold, with an entry for each entry of the spec."""
  own = set(explicit_axes(mesh))
  if mesh is None or not own:
    return PartitionSpec(*(None,) * len(spec))
  return fit(shape, tuple(entry if own.issuperset(axis_names(entry)) else None for entry in spec), mesh)[0]


def shard(x: jax.Array, spec: PartitionSpec, heads: Sequence[int | None] = ()) -> jax.Array:
  """Constrains the sharding of an array, and of its gradient, inside `call_auto`.

  Args:
    x: the array; returned unchanged without a mesh.
    spec: the sharding; the mesh takes the part that it can hold.
    heads: for each leading axis, the number of heads that it consists of, or None. Each device gets whole heads.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.auto_axes:
    return x
  return jax.lax.with_sharding_constraint(x, fit_auto(x.shape, spec, heads))


def spec_of(x: jax.Array) -> PartitionSpec:
  """The spec in the type of an array, with an entry for each axis: all None unless its mesh has Explicit axes."""
  sharding = jax.typeof(x).sharding
  entries = tuple(sharding.spec) if sharding.mesh.explicit_axes else ()
  return PartitionSpec(*entries, *(None,) * (x.ndim - len(entries)))
