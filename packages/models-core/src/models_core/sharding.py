"""Which mesh axis shards which axis of a parameter or an activation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from models_core.errors import ShardingError

# What shards one axis of an array: a mesh axis, several of them, or None for replication.
AxisNames = str | tuple[str, ...] | None
# An entry for each axis of an array, or for the leading ones.
Spec = tuple[AxisNames, ...] | PartitionSpec

# Axis letters of the fields whose names do not end with them.
_LETTERS = {"rms_norm_weight": "d", "qk_norm_weight": "h"}

# Omitted field -> the field that it takes its entries from, letter by letter.
_FALLBACKS = {
  "lm_head_vd": "emb_vd",
  "q_bias_nh": "q_weight_dnh",
  "kv_bias_nh": "kv_weight_dnh",
  "router_weight_ed": "exp_weight_edf",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ShardingConfig:
  """Mesh axes for each kind of parameter and activation.

  The letters at the end of a field's name are the axes that its entries shard: `q_weight_dnh=("fsdp", "tp", None)`
  shards D over fsdp and N over tp, in whatever order a parameter keeps its axes. The letters are v vocabulary, d width
  of the model, n heads (query or KV), h dimension of a head, f width of the feed-forward block, e experts, b batch,
  t time and l stacked layers. `stack_l` shards the axis of layers in front of stacked parameters. A mesh never splits a head. `act_btv` shards logits; None leaves them to the compiler, or, on a mesh with
  Explicit axes, shards them along b alone.

  Raises:
    ShardingError: if a field does not have one entry for each of its letters.
  """

  emb_vd: Spec
  q_weight_dnh: Spec
  kv_weight_dnh: Spec
  o_weight_nhd: Spec
  ffw_weight_df: Spec
  ffw_weight_fd: Spec
  rms_norm_weight: Spec
  act_btd: Spec
  act_btf: Spec
  act_btnh: Spec
  lm_head_vd: Spec | None = None
  q_bias_nh: Spec | None = None
  kv_bias_nh: Spec | None = None
  qk_norm_weight: Spec = (None,)
  exp_weight_edf: Spec = ("tp", "fsdp", None)
  exp_weight_efd: Spec = ("tp", None, "fsdp")
  router_weight_ed: Spec | None = None
  act_btv: Spec | None = None
  stack_l: Spec = (None,)

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, letters = getattr(self, field.name), _letters(field.name)
      if value is not None and len(value) != len(letters):
        raise ShardingError(
          f"ShardingConfig.{field.name}={tuple(value)} has {len(value)} entries, but stands for "
          f"{len(letters)} axes ({', '.join(letters.upper())}): give one entry for each axis"
        )

  @staticmethod
  def get_default_sharding(is_sampling: bool = False) -> ShardingConfig:
    """Shards parameters over fsdp and tp; for sampling over tp only, so that no decoding step gathers parameters.

    For sampling, activations are replicated over tp between the blocks, and so are the weights of norms: their product
    would be sharded as the weights are, and then be gathered.
    """
    fsdp = None if is_sampling else "fsdp"
    return ShardingConfig(
      emb_vd=("tp", fsdp),
      q_weight_dnh=(fsdp, "tp", None),
      kv_weight_dnh=(fsdp, "tp", None),
      o_weight_nhd=("tp", None, fsdp),
      ffw_weight_df=(fsdp, "tp"),
      ffw_weight_fd=("tp", fsdp),
      rms_norm_weight=(None if is_sampling else "tp",),
      act_btd=("fsdp", None, None if is_sampling else "tp"),
      act_btf=("fsdp", None, "tp"),
      act_btnh=("fsdp", None, "tp", None),
      exp_weight_edf=("tp", fsdp, None),
      exp_weight_efd=("tp", None, fsdp),
    )

  def spec(self, field: str, axes: str) -> PartitionSpec:
    """Entries of a field in the order of a parameter's axes.

    `spec("q_weight_dnh", "(n h) d")` is `PartitionSpec("tp", "fsdp")` by default. The letter k, KV heads, takes the
    entry of n. An axis of several letters takes the mesh axes of all of them. Axes that the field does not name are
    replicated.
    """
    value = getattr(self, field)
    if value is None:
      return self.spec(_FALLBACKS[field], axes)
    entries = dict(zip(_letters(field), value, strict=True))
    entries["k"] = entries.get("n")
    groups = [group or letter for group, letter in re.findall(r"\(([^()]*)\)|(\S+)", axes)]
    return PartitionSpec(*(_joined([entries.get(letter) for letter in group.split()]) for group in groups))


def _letters(field: str) -> str:
  return _LETTERS.get(field) or field.rsplit("_", 1)[1]


def _joined(entries: Sequence[AxisNames]) -> AxisNames:
  """The entry of an axis that stands for several: "tp" and None -> "tp", "tp" and "sp" -> ("tp", "sp")."""
  stated = [entry for entry in entries if entry is not None]
  if len(stated) < 2:
    return stated[0] if stated else None
  return tuple(name for entry in stated for name in axis_names(entry))


@dataclasses.dataclass(frozen=True, slots=True)
class Misfit:
  """An axis of an array that is replicated, because the mesh cannot hold its entry of the spec.

  Attributes:
    axis: index of the axis.
    size: of the axis.
    names: mesh axes in the entry.
    reason: why the mesh cannot hold the entry.
    remedy: what would fit.
  """

  axis: int
  size: int
  names: tuple[str, ...]
  reason: str
  remedy: str


def axis_names(entry: AxisNames) -> tuple[str, ...]:
  """Mesh axes that an entry of a spec names: "tp" -> ("tp",), None -> ()."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def fit(
  shape: Sequence[int], spec: Spec, mesh: Mesh | AbstractMesh, heads: Sequence[int | None] = ()
) -> tuple[PartitionSpec, tuple[Misfit, ...]]:
  """Replaces entries of a spec that a mesh cannot hold by None.

  On a mesh fsdp=2, tp=2, an array of shape (3, 4) with the spec ("fsdp", "tp") gets (None, "tp"), since 3 is not divisible by 2.

  Args:
    shape: of the array.
    spec: an entry for each leading axis.
    mesh: concrete or abstract.
    heads: for each leading axis, the number of heads that it consists of, or None. Each device gets whole heads.

  Returns:
    The spec that the mesh can hold, and a Misfit for each replaced entry.

  Raises:
    ShardingError: if the spec is longer than the shape or uses a mesh axis twice.
  """
  if len(spec) > len(shape):
    raise ShardingError(
      f"the spec {tuple(spec)} has more entries than the shape {tuple(shape)} has axes: remove the surplus"
    )
  sizes = dict(mesh.shape)
  entries: list[AxisNames] = []
  misfits: list[Misfit] = []
  used: set[str] = set()
  for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
    names = axis_names(entry)
    count = heads[axis] if axis < len(heads) else None
    for name in names:
      if name in used:
        raise ShardingError(
          f"the spec {tuple(spec)} uses the mesh axis {name!r} twice: name each mesh axis once"
        )
      used.add(name)
    missing = [name for name in names if name not in sizes]
    ways = math.prod(sizes.get(name, 1) for name in names)
    if missing:
      reason = f"the mesh has no axis {missing[0]!r}"
      remedy = f"its axes are {', '.join(sizes)}: name one of them in the ShardingConfig"
      misfits.append(Misfit(axis, size, names, reason, remedy))
      entry = None
    elif not _divides(ways, parts := count or size):
      what = f"{parts} heads are" if count else f"{parts} is"
      reason = f"{what} not divisible by {'*'.join(names)}={ways}"
      divisors = (
        [n for n in range(1, min(parts, 4096) + 1) if parts % n == 0] if isinstance(parts, int) else []
      )
      remedy = f"sizes that divide it: {', '.join(map(str, divisors[-8:]))}"
      misfits.append(Misfit(axis, size, names, reason, remedy))
      entry = None
    entries.append(entry if names else None)
  return PartitionSpec(*entries), tuple(misfits)


def _divides(ways: int, size: Any) -> bool:
  """Whether a size is divisible; false for a symbolic size of which it is unknown."""
  try:
    return bool(size % ways == 0)
  except jax.errors.InconclusiveDimensionOperation:
    return False


def check_mesh(mesh: Any) -> None:
  """Checks the argument `mesh` of a public function.

  Raises:
    TypeError: if it is neither a Mesh of devices nor None.
  """
  if mesh is not None and not isinstance(mesh, Mesh):
    raise TypeError(
      f"mesh is {type(mesh).__name__}, expected a jax.sharding.Mesh of devices, as jax.make_mesh returns, or None "
      "for one device"
    )


def check_mesh_of_plan(mesh: Any) -> None:
  """Checks the argument `mesh` of a function that plans, which needs no devices.

  Raises:
    TypeError: if it is neither a Mesh, an AbstractMesh nor None.
  """
  if not isinstance(mesh, AbstractMesh):
    check_mesh(mesh)


def default_sharding() -> SingleDeviceSharding:
  """Sharding of arrays if there is no mesh: the default device of this process."""
  device = jax.config.jax_default_device  # type: ignore[attr-defined]
  return SingleDeviceSharding(device if isinstance(device, jax.Device) else jax.local_devices()[0])


def named(mesh: Mesh | AbstractMesh | None, spec: PartitionSpec) -> NamedSharding | SingleDeviceSharding:
  """Sharding of a spec that the mesh can hold; without a mesh, the default device."""
  return default_sharding() if mesh is None else NamedSharding(mesh, spec)
