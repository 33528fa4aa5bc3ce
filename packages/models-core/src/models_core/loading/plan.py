"""The load plan: which bytes of which file become which part of which parameter. It is made from headers alone."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from models_core.dequantising import dequantised, without_zero_biases
from models_core.dtypes import common_dtype
from models_core.errors import CheckpointError
from models_core.family import Family
from models_core.formats import Checkpoint, OnBytes, TensorInfo
from models_core.loading.abstract import AbstractModel, misfit_notes
from models_core.loading.compiling import Compiling, with_shapes
from models_core.loading.floats import check_floats
from models_core.loading.misnamed import misnamed
from models_core.loading.opened import OpenedPlan
from models_core.loading.planned import PlannedParameter, mesh_of
from models_core.loading.process_split import files_of_process
from models_core.loading.ties import mis_shaped
from models_core.sharding import check_mesh
from models_core.weights import Piece, Row, Tied, WeightTable, pieces

# Most problems that an error lists; the rest are counted.
_MOST = 40
# Most problems of the same kind that are listed one by one.
_FEW = 3
# The number of a layer in a name.
_LAYER = re.compile(r"\.\d+(?=\.)")


@dataclasses.dataclass(frozen=True)
class LoadPlan:
  """What loading a checkpoint will do. A plan is made without reading tensor data.

  Attributes:
    checkpoint: the headers of the checkpoint.
    model: the abstract model to fill.
    parameters: the parameters and what fills each of them, in the model's order.
    ignored: tensors that are not loaded, each with the reason.
    ties: pairs of tensors that must be equal.
    family: family of the model, if it belongs to one.
    config: configuration of the model, if it belongs to a family.
  """

  checkpoint: Checkpoint
  model: AbstractModel
  parameters: tuple[PlannedParameter, ...]
  ignored: tuple[tuple[str, str], ...] = ()
  ties: tuple[Tied, ...] = ()
  family: Family | None = None
  config: Any = None

  def open(self, on_bytes: OnBytes | None = None) -> OpenedPlan:
    """Opens the plan to read parameters one by one: `with plan.open() as opened`.

    Args:
      on_bytes: called with the number of bytes of each read, from several threads.

    Raises:
      TypeError: if the plan is for an AbstractMesh, which has no devices.
    """
    check_mesh(self.mesh)
    return OpenedPlan(self.checkpoint, self.parameters, self.ties, on_bytes, self.model.config)

  def shapes(self) -> nnx.Module:
    """The model as it will be loaded, with a `jax.ShapeDtypeStruct` in the place of each array."""
    return with_shapes(self.model, self.parameters)

  def compile(self, function: Callable[..., Any], *args: Any) -> Compiling:
    """Compiles `function(model, *args)` in a thread, while the caller loads the plan.

    The time to the first result is then the longer one of the two, not their sum:

        step = plan.compile(lambda model, tokens: model(tokens)[0], jax.ShapeDtypeStruct((1, 16), "int32"))
        model = load(plan)
        logits = step(model, tokens)  # waits until the function is compiled

    The thread traces the function, too: contexts that the caller has entered, such as `jax.set_mesh`, do not hold there.

    Args:
      function: of the model and other arguments; one that is jitted keeps its options, such as donated arguments.
      *args: the other arguments, as arrays or as `jax.ShapeDtypeStruct`.
    """
    return Compiling(function, self.shapes(), *args)

  @property
  def files(self) -> tuple[str, ...]:
    """Names of the files that hold a tensor of the plan, sorted."""
    names = {piece.tensor for planned in self.parameters for piece in planned.pieces}
    names |= {name for tie in self.ties for name in (tie.tensor, tie.twin)}
    held = {part.file for name in names for part in self.checkpoint.tensors[name].stored}
    return tuple(sorted(held.union(self.checkpoint.shared_files)))

  @property
  def files_of_process(self) -> tuple[str, ...]:
    """Names of the files that this process reads from, sorted."""
    return files_of_process(self.checkpoint, self.parameters, self.ties)

  @property
  def mesh(self) -> Mesh | None:
    """The mesh of the parameters; None is one device."""
    return mesh_of(self.parameters)

  @property
  def num_parameters(self) -> int:
    """The number of elements of all parameters together."""
    return sum(math.prod(planned.parameter.shape) for planned in self.parameters)

  @property
  def stored_nbytes(self) -> int:
    """The number of bytes that are read from the checkpoint's files."""
    tensors = self.checkpoint.tensors
    names = {piece.tensor for planned in self.parameters for piece in planned.pieces}
    return sum(part.stop - part.start for name in names for part in tensors[name].stored)

  def bytes_per_device(self) -> dict[jax.Device, int]:
    """The number of bytes that each device of the mesh will hold. A plan for an AbstractMesh has no devices."""
    check_mesh(self.mesh)
    total: dict[jax.Device, int] = collections.defaultdict(int)
    for planned in self.parameters:
      for device in planned.parameter.sharding.device_set:
        total[device] += planned.shard_nbytes
    return dict(sorted(total.items(), key=lambda item: item[0].id))

  def shares(self) -> dict[int, int]:
    """How many devices will hold how many bytes: {bytes: devices}."""
    if isinstance(self.mesh, AbstractMesh):
      return {sum(planned.shard_nbytes for planned in self.parameters): self.mesh.size}
    return dict(collections.Counter(self.bytes_per_device().values()))

  def casts(self) -> dict[tuple[str, str], int]:
    """The number of tensors that are cast, by (stored dtype, loaded dtype)."""
    tensors = self.checkpoint.tensors
    changes = collections.Counter(
      (_stored(tensors[piece.tensor]), planned.dtype.name)
      for planned in self.parameters
      for piece in planned.pieces
      if tensors[piece.tensor].dtype != planned.dtype or tensors[piece.tensor].encoding
    )
    return dict(changes)

  def _encoded(self) -> dict[str, str]:
    """By encoding, the stored and the loaded size of the tensors, for messages."""
    tensors = self.checkpoint.tensors
    stored: dict[str, int] = collections.defaultdict(int)
    loaded: dict[str, int] = collections.defaultdict(int)
    used = {piece.tensor: planned.dtype for planned in self.parameters for piece in planned.pieces}
    for info, dtype in ((tensors[name], dtype) for name, dtype in used.items()):
      if info.encoding is not None:
        stored[info.encoding] += sum(part.stop - part.start for part in info.stored)
        loaded[info.encoding] += math.prod(info.shape) * dtype.itemsize
    return {name: f", {_size(stored[name])} -> {_size(loaded[name])}" for name in stored}

  def replicated(self) -> list[str]:
    """Notes on the axes that are replicated because the mesh cannot hold their declared sharding."""
    return misfit_notes(self.model.parameters)

  def notes(self) -> list[str]:
    """Notes on what a user may not expect: axes that are replicated, and files and tensors that are not loaded."""
    left_out = collections.Counter(reason for _, reason in self.ignored)
    unread = [f"{_count(n, 'tensor')} not loaded: {why}" for why, n in left_out.items()]
    return [*self.replicated(), *self.checkpoint.notes, *unread]

  def __str__(self) -> str:
    lines = [
      f"{self.num_parameters:,} parameters, {_size(self.stored_nbytes)} to read from "
      f"{_count(len(self.files), 'file')} of {self.checkpoint.files.path}"
    ]
    lines += [f"{_count(n, 'device')}, each holding {_size(nbytes)}" for nbytes, n in self.shares().items()]
    encoded = self._encoded()
    lines += [
      f"{_count(n, 'tensor')}: {stored} -> {loaded}{encoded.get(stored, '')}"
      for (stored, loaded), n in self.casts().items()
    ]
    lines += [f"{tie.tensor} must equal {tie.twin}" for tie in self.ties]
    return "\n".join(lines + self.notes())


def _count(number: int, what: str) -> str:
  return f"{number} {what}{'s' * (number != 1)}"


def _stored(info: TensorInfo) -> str:
  return info.encoding or info.dtype.name


def _size(nbytes: int) -> str:
  return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def plan_load(
  checkpoint: Checkpoint,
  model: AbstractModel,
  table: WeightTable,
  *,
  dtype: np.dtype | None = None,
  layers: int | None = None,
  raw: Mapping[str, Any] | None = None,
) -> LoadPlan:
  """Finds the tensors of a checkpoint that fill each parameter of a model.

  Args:
    checkpoint: the headers of the checkpoint.
    model: the abstract model to fill.
    table: weight table of the checkpoint's naming scheme; its prefix may be missing in the checkpoint, or occur twice.
    dtype: dtype of the loaded floating-point parameters; None keeps the stored dtype of each.
    layers: the number of layers that the model is cut to; tensors of later layers are not loaded. None is no cut.
    raw: the checkpoint's config.json, if it has been read: it is not read again to see whether it states a quantisation.

  Raises:
    CheckpointError: with all missing, unexpected, duplicate and mis-shaped tensors.
    TypeError: if the table does not have exactly one row for a parameter, or `dtype` is not a floating-point type.
  """
  table = table.spelled_as(checkpoint.tensors)
  checkpoint = dequantised(
    checkpoint, dtype=dtype, raw=raw, is_ignored=lambda name: table.ignores(name) is not None
  )

  def match(checkpoint: Checkpoint) -> Match:
    return match_tensors(
      {name: info.shape for name, info in checkpoint.tensors.items()},
      {name: parameter.shape for name, parameter in model.parameters.items()},
      table,
      model.letters,
      config=model.config,
      layers=layers,
      may_be_held=checkpoint.may_hold,
    )

  found = match(checkpoint)
  if (lean := without_zero_biases(checkpoint, found.needed)) is not checkpoint:
    checkpoint, found = lean, match(lean)
  tensors = checkpoint.tensors
  unequal = [problem for tie in found.ties if (problem := mis_shaped(tie, tensors, model.config)) is not None]
  ignored = {name for name, _ in found.ignored}
  quantised, note = check_floats(checkpoint, found.needed, ignored, model.parameters, raw)
  amiss = misnamed(tensors, table) if found.problems and not quantised else None
  # That weights are quantised, or names have another prefix, explains whatever else does not fit.
  explained = quantised or ((amiss,) if amiss else ())
  if problems := [*checkpoint.problems, *(explained or (*found.problems, *unequal))]:
    raise CheckpointError(checkpoint.files.path, shorten(problems))
  planned = [
    PlannedParameter(
      model.parameters[name], loaded_dtype({tensors[piece.tensor].dtype for piece in pieces}, dtype), pieces
    )
    for name, pieces in found.pieces.items()
  ]
  if note is not None:
    checkpoint = dataclasses.replace(checkpoint, notes=(*checkpoint.notes, note))
  return LoadPlan(checkpoint, model, tuple(planned), found.ignored, found.ties)


@dataclasses.dataclass(frozen=True)
class Match:
  """Which tensors fill which parameters.

  Attributes:
    pieces: by parameter, in the model's order. Parameters with a problem are missing.
    ignored: tensors that no parameter needs, each with the reason.
    ties: pairs of tensors that must be equal.
    problems: one sentence for each missing, unexpected, duplicate or mis-shaped tensor.
    needed: by the name of each tensor that could fill a parameter, or is tied to one that does, the parameter.
  """

  pieces: Mapping[str, tuple[Piece, ...]]
  ignored: tuple[tuple[str, str], ...]
  ties: tuple[Tied, ...]
  problems: tuple[str, ...]
  needed: Mapping[str, str]


def match_tensors(
  tensors: Mapping[str, tuple[int, ...]],
  parameters: Mapping[str, tuple[int, ...]],
  table: WeightTable,
  letters: Mapping[str, int],
  *,
  config: Any = None,
  layers: int | None = None,
  may_be_held: Callable[[str], bool] = lambda name: False,
) -> Match:
  """Finds the tensors that fill each parameter, from names and shapes alone.

  Args:
    tensors: shapes of all tensors, by name.
    parameters: shapes of all parameters, by name.
    table: weight table of the tensors' naming scheme.
    letters: sizes of letters in layouts that the configuration tells, as `letter_sizes` returns them.
    config: of the model; it decides between layouts of the same shape.
    layers: the number of layers that the model is cut to; tensors of later layers are ignored. None is no cut.
    may_be_held: whether a tensor may be in a file that could not be read. It is not missing then.

  Raises:
    TypeError: if the table does not have exactly one row for a parameter.
  """
  problems: list[str] = []
  filled: dict[str, tuple[Piece, ...]] = {}
  used: dict[str, str] = {}
  heads = _stored_as_heads(tensors, parameters, table)
  for name, shape in parameters.items():
    row, placeholders = table.row_of(name)
    forms = [pieces(row, form, placeholders, shape, letters) for form in row.forms]
    if heads:
      forms = [
        [dataclasses.replace(piece, tensor=heads.get(piece.tensor, piece.tensor)) for piece in form]
        for form in forms
      ]
    found, trouble = _choose(row, forms, name, shape, tensors, config, may_be_held, table.absence)
    problems += trouble
    if found:
      filled[name] = tuple(found)
    # Tensors of an incomplete form are part of its problem: do not report them as unexpected too.
    used |= {piece.tensor: name for form in ([found] if found else forms) for piece in form}
  left = [name for name in tensors if name not in used]
  ties = tuple(tie for tie in table.tied if tie.tensor in left and tie.twin in tensors)
  unsure = {tie.tensor for tie in table.tied if may_be_held(tie.twin)}
  ignored, unexpected = [], []
  for name in left:
    if name in unsure or any(name == tie.tensor for tie in ties):
      continue
    row_ignored = table.ignores(name)
    reason = None if row_ignored is None else row_ignored.reason
    if reason is None and layers is not None and (table.layer_of(name) or 0) >= layers:
      reason = f"layers from {layers} on, which were not requested"
    if reason is not None:
      ignored.append((name, reason))
    else:
      unexpected.append(name)
  # Only the first few get a suggestion: comparing all names with all others takes minutes.
  problems += [
    f"{name} {tensors[name]} is unexpected: the model has no parameter for it{_near(name, used) if i < 5 else ''}"
    for i, name in enumerate(unexpected)
  ]
  used |= {tie.tensor: used[tie.twin] for tie in ties if tie.twin in used}
  return Match(filled, tuple(ignored), ties, tuple(problems), used)


def _stored_as_heads(
  tensors: Mapping[str, Any], parameters: Iterable[str], table: WeightTable
) -> dict[str, str]:
  """Embeddings of which a checkpoint holds the tied head alone: the head's name, by that of the embedding.

  Of two names of one tensor, savers keep either. With a head of its own, a model needs both tensors.
  """
  heads = {tie.tensor for tie in table.tied if tie.tensor in tensors}
  heads -= {tie.tensor for tie in table.tied if tie.twin in tensors}
  if heads:
    heads -= {form.name for name in parameters for form in table.row_of(name)[0].forms}
  return {tie.twin: tie.tensor for tie in table.tied if tie.tensor in heads}


def _choose(
  row: Row,
  forms: Sequence[list[Piece]],
  parameter: str,
  size: tuple[int, ...],
  tensors: Mapping[str, tuple[int, ...]],
  config: Any,
  may_be_held: Callable[[str], bool],
  absence: str,
) -> tuple[list[Piece], list[str]]:
  """The pieces of the one form in which a checkpoint holds a parameter, or no pieces and the problems.

  Args:
    row: that describes the parameter.
    forms: the pieces of each of the row's forms.
    parameter: its name.
    size: shape of the parameter.
    tensors: shapes of all tensors, by name.
    config: of the model.
    may_be_held: whether a tensor may be in a file that could not be read.
    absence: why tensors may be missing; "" if nothing tells.
  """
  # A form may name what another one names, too, such as a head that has one name beside several embeddings.
  distinct = [i for i, form in enumerate(forms) if form not in forms[:i]]
  complete = [forms[i] for i in distinct if all(piece.tensor in tensors for piece in forms[i])]
  names = " and ".join(dict.fromkeys(form[0].tensor for form in complete))
  if len({form[0].tensor for form in complete}) > 1:
    return [], [f"{parameter} occurs twice: the checkpoint holds it as {names}; remove one"]
  if len(complete) > 1:
    # The same tensor in several layouts: its shape decides, or else the configuration.
    fitting = [i for i in distinct if _fits(forms[i], tensors)]
    if len(stated := row.published(fitting, config)) == 1:
      fitting = stated
    if len(fitting) > 1:
      name = forms[fitting[0]][0].tensor
      layouts = " and ".join(row.forms[i].layout for i in fitting)
      return [], [
        f"{name} {tensors[name]} is ambiguous: its shape fits more than one layout ({layouts}); convert the "
        "checkpoint to a format with a single layout, such as safetensors"
      ]
    complete = [forms[i] for i in fitting] or complete[:1]
  if not complete:
    nearest = max(forms, key=lambda form: sum(piece.tensor in tensors for piece in form))
    missing = [p.tensor for p in nearest if p.tensor not in tensors and not may_be_held(p.tensor)]
    if not missing:
      return [], []
    needed_by = f"the parameter {parameter} {size} needs"
    why = f"; {absence}" if absence else ""
    if len(missing) == 1:
      return [], [f"{missing[0]} is missing: {needed_by} it{why}"]
    return [], [f"{missing[0]} and {len(missing) - 1} more are missing: {needed_by} them{why}"]
  wrong = [
    f"{piece.tensor} has shape {tensors[piece.tensor]}, but the parameter {parameter} {size} needs {piece.shape}"
    for piece in complete[0]
    if tensors[piece.tensor] != piece.shape
  ]
  return ([], wrong) if wrong else (complete[0], [])


def _fits(form: Sequence[Piece], tensors: Mapping[str, tuple[int, ...]]) -> bool:
  return all(tensors.get(piece.tensor) == piece.shape for piece in form)


def loaded_dtype(stored: Iterable[np.dtype], dtype: np.dtype | None) -> np.dtype:
  """The dtype of a parameter that is loaded from tensors of some dtypes.

  This is the common dtype of the tensors, or `dtype` if the common one is a floating-point type. 64-bit types become
  32-bit ones unless `jax_enable_x64` is on.

  Args:
    stored: dtypes of the tensors that fill the parameter.
    dtype: requested dtype of floating-point parameters, or None.

  Raises:
    TypeError: if `dtype` is not a floating-point type.
  """
  if dtype is not None and not jax.numpy.issubdtype(dtype, jax.numpy.floating):
    raise TypeError(
      f"dtype is {dtype}, expected a floating-point type such as 'bfloat16': integers keep their dtype"
    )
  loaded = functools.reduce(common_dtype, sorted(stored, key=lambda d: (d.itemsize, d.name)))
  if dtype is not None and jax.numpy.issubdtype(loaded, jax.numpy.floating):
    loaded = dtype
  return np.dtype(jax.dtypes.canonicalize_dtype(loaded))


def _near(name: str, used: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, list(used)[:5000], n=1, cutoff=0.9)
  return f" (similar to {near[0]})" if near else ""


def shorten(problems: Sequence[str]) -> list[str]:
  """The first problems, and the number of the others. Those that many layers have in common are one."""
  groups: dict[str, list[str]] = {}
  for problem in problems:
    groups.setdefault(_LAYER.sub(".#", problem), []).append(problem)
  problems = [
    problem
    for like in groups.values()
    for problem in ([f"{like[0]}; the same in {len(like) - 1} other layers"] if len(like) > _FEW else like)
  ]
  shown = list(problems[:_MOST])
  if len(problems) > _MOST:
    shown.append(f"and {len(problems) - _MOST} more")
  return shown
