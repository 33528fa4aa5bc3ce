"""The save plan: which parameters become which tensors of which files, from shapes alone.

It is the weight table read backwards. Where the checkpoint that a model came from is given, its headers decide
what the table leaves open: which form a parameter is written in, whether a tied head is repeated, and which
tensors that the model has no parameter for are copied through.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from models_core.dtypes import common_dtype
from models_core.errors import CheckpointError
from models_core.formats import CODES, INDEX, SINGLE, Checkpoint, TensorInfo, file_layout, shard_name
from models_core.weights import Piece, Row, WeightTable, matches, pieces

_log = logging.getLogger(__name__)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
  "KIB": 2**10,
  "MIB": 2**20,
  "GIB": 2**30,
  "TIB": 2**40,
}


class Shaped(Protocol):
  """An array, or what is known of one."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes of its axes."""

  @property
  def dtype(self) -> np.dtype:
    """Of its elements."""


@dataclasses.dataclass(frozen=True)
class SavedTensor:
  """A tensor to be written.

  Attributes:
    name: as the file will spell it.
    dtype: of the elements in the file.
    shape: slowest axis first.
    parts: names of parameters, each with the piece of the tensor that it fills.
    copied: the tensor of another checkpoint whose bytes it repeats; then it has no parts.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  parts: tuple[tuple[str, Piece], ...] = ()
  copied: TensorInfo | None = None

  @property
  def nbytes(self) -> int:
    """Bytes in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class SavedFile:
  """A file of a checkpoint.

  Attributes:
    name: of the file.
    tensors: in the order in which they are written.
  """

  name: str
  tensors: tuple[SavedTensor, ...]

  @functools.cached_property
  def layout(self) -> tuple[bytes, dict[str, int]]:
    """The file's bytes up to the data, and where the data of each tensor starts, in bytes from the file's start."""
    return file_layout({tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors})

  @property
  def nbytes(self) -> int:
    """Bytes of the whole file."""
    return len(self.layout[0]) + sum(tensor.nbytes for tensor in self.tensors)


def plan_state(parameters: Mapping[str, Shaped], *, dtype: np.dtype | None = None) -> list[SavedTensor]:
  """Tensors under the parameters' own names and in their own shapes.

  Args:
    parameters: by name.
    dtype: that floating-point parameters are written in; None keeps each as it is.
  """
  return [
    SavedTensor(name, _saved_dtype(name, [array.dtype], dtype), tuple(array.shape), ((name, _whole(array)),))
    for name, array in parameters.items()
  ]


def _whole(array: Shaped) -> Piece:
  everything = (slice(None),) * len(array.shape)
  shape = tuple(array.shape)
  return Piece("", shape, shape, everything, tuple(range(len(shape))), everything)


def plan_save(
  parameters: Mapping[str, Shaped],
  table: WeightTable,
  *,
  config: Any = None,
  base: Checkpoint | None = None,
  dtype: np.dtype | None = None,
) -> list[SavedTensor]:
  """Tensors under a dialect's names and in its layouts.

  Args:
    parameters: of the model, by name.
    table: of the dialect.
    config: of the model, where forms depend on it.
    base: of the same dialect. Its headers decide the form of each parameter, tied tensors that it holds are
      repeated, and its tensors that the table ignores are copied. None takes the form that the configuration's
      published checkpoint has.
    dtype: that floating-point parameters are written in; None keeps each as it is. Copied tensors stay as they are.

  Raises:
    CheckpointError: if the headers of `base` are broken or hold a tensor that the table does not know.
    TypeError: if the table does not cover a parameter, or safetensors files do not hold its dtype.
  """
  held = base.tensors if base is not None else {}
  parts: dict[str, list[tuple[str, Piece]]] = {}
  for name, found in _forms(parameters, table, config, held).items():
    for piece in found:
      parts.setdefault(piece.tensor, []).append((name, piece))
  tensors = {
    name: SavedTensor(
      name,
      _saved_dtype(name, [parameters[parameter].dtype for parameter, _ in filled], dtype),
      filled[0][1].shape,
      tuple(filled),
    )
    for name, filled in parts.items()
  }
  for tensor in tensors.values():
    _check_filled(tensor)
  for tie in table.tied:
    if tie.tensor in held and tie.tensor not in tensors and tie.twin in tensors:
      tensors[tie.tensor] = dataclasses.replace(tensors[tie.twin], name=tie.tensor)
  if base is not None:
    for info in _copied(base, table, tensors):
      tensors[info.name] = SavedTensor(info.name, info.dtype, info.shape, copied=info)
  return list(tensors.values())


def _forms(
  parameters: Mapping[str, Shaped], table: WeightTable, config: Any, held: Mapping[str, TensorInfo]
) -> dict[str, list[Piece]]:
  """The pieces of each parameter, in the form that is held; of what isn't held, in the form of its likes."""
  forms: dict[str, list[list[Piece]]] = {}
  rows: dict[str, Row] = {}
  chosen: dict[str, int] = {}
  for name, array in parameters.items():
    row, at = table.row_of(name)
    rows[name], forms[name] = row, [pieces(row, form, at, array.shape) for form in row.forms]
    complete = [i for i, form in enumerate(forms[name]) if all(piece.tensor in held for piece in form)]
    # One name, several layouts: the shape decides.
    fitting = [i for i in complete if all(held[p.tensor].shape == p.shape for p in forms[name][i])]
    if complete:
      chosen[name] = (fitting or complete)[0]
  # Likes are the same parameter of other layers, else those that have as many forms.
  votes: dict[object, collections.Counter[int]] = collections.defaultdict(collections.Counter)
  for name, form in chosen.items():
    votes[rows[name].ours][form] += 1
    votes[len(rows[name].forms)][form] += 1
  for name in parameters:
    if name not in chosen:
      ballot = votes.get(rows[name].ours) or votes.get(len(rows[name].forms))
      chosen[name] = ballot.most_common(1)[0][0] if ballot else _published(rows[name], config)
  return {name: forms[name][chosen[name]] for name in parameters}


def _published(row: Row, config: Any) -> int:
  """The place of the form that a configuration's published checkpoint has."""
  return next((i for i, form in enumerate(row.forms) if form.when is not None and form.when(config)), 0)


def _check_filled(tensor: SavedTensor) -> None:
  """Refuses a table by which a tensor would have holes."""
  filled = 0
  for _, piece in tensor.parts:
    kept = zip(piece.split, piece.select, strict=True)
    filled += math.prod(size for size, at in kept if isinstance(at, slice))
  if filled != math.prod(tensor.shape):
    names = ", ".join(name for name, _ in tensor.parts)
    raise TypeError(f"{tensor.name} {tensor.shape} is not filled by {names}: the model lacks a part of it")


def _copied(base: Checkpoint, table: WeightTable, tensors: Mapping[str, SavedTensor]) -> Iterator[TensorInfo]:
  """The tensors of the base that no parameter of any model fills."""
  left = [info for name, info in base.tensors.items() if name not in tensors]
  known = [form.name for row in table.rows for form in row.forms]
  problems, dropped = list(base.problems), []
  for info in left:
    ignored = next((row for row in table.ignored if matches(row.pattern, info.name)), None)
    if ignored is not None and ignored.repeated:
      yield info
    elif ignored is not None or any(matches(name, info.name) for name in known):
      dropped.append(info.name)
    else:
      problems.append(f"{info.name} {info.shape} is unexpected: it belongs to another architecture")
  if problems:
    raise CheckpointError(base.files.path, problems)
  if dropped:
    _log.warning(
      "%s: %d tensors of the base are not written, such as %s: the model has no parameter for them",
      base.files.path,
      len(dropped),
      dropped[0],
    )


def _saved_dtype(name: str, dtypes: Sequence[np.dtype], dtype: np.dtype | None) -> np.dtype:
  own = functools.reduce(common_dtype, map(np.dtype, dtypes))
  if dtype is not None and jax.numpy.issubdtype(own, jax.numpy.floating):
    own = dtype
  if own not in CODES:
    raise TypeError(
      f"{name} is {own}, which safetensors files do not hold; they hold {', '.join(CODES.values())}"
    )
  return own


def split_files(tensors: Sequence[SavedTensor], max_shard_size: int) -> list[SavedFile]:
  """Distributes tensors over files in their order.

  Args:
    tensors: of the checkpoint.
    max_shard_size: bytes of tensor data in a file; a larger tensor has a file of its own.

  Returns:
    One `model.safetensors`, or `model-00001-of-00003.safetensors` and so on.
  """
  shards: list[list[SavedTensor]] = [[]]
  room = max_shard_size
  for tensor in tensors:
    if shards[-1] and tensor.nbytes > room:
      shards.append([])
      room = max_shard_size
    shards[-1].append(tensor)
    room -= tensor.nbytes
  if len(shards) == 1:
    return [SavedFile(SINGLE, tuple(shards[0]))]
  return [SavedFile(shard_name(number, len(shards)), tuple(shard)) for number, shard in enumerate(shards, 1)]


def index_json(files: Sequence[SavedFile]) -> dict[str, bytes]:
  """The index of several files, by its name; nothing for a single one."""
  if len(files) == 1:
    return {}
  index = {
    "metadata": {"total_size": sum(tensor.nbytes for file in files for tensor in file.tensors)},
    "weight_map": dict(sorted((tensor.name, file.name) for file in files for tensor in file.tensors)),
  }
  return {INDEX: json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"}


def parse_size(size: int | str) -> int:
  """Bytes of a size such as 5000000000, "5GB" (10^9 bytes each) or "2GiB" (2^30 bytes each).

  Raises:
    ValueError: if it is not that, or not positive.
  """
  if isinstance(size, str):
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B|)\s*", size.upper())
    nbytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
  else:
    nbytes = size if isinstance(size, int) and not isinstance(size, bool) else 0
  if nbytes <= 0:
    raise ValueError(f'{size!r} is no size of a file: write it like 5000000000, "5GB" or "2GiB"')
  return nbytes
