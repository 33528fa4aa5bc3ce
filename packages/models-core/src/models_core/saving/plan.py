"""The save plan: which parameters become which tensors of which files. It is made from shapes alone.

The weight table is applied backwards. If the checkpoint that a model was loaded from is given, its headers decide what
the table leaves open: in which form each parameter is written, whether a tied head is stored, and which tensors are
copied because the model has no parameter for them.
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
from models_core.weights import Piece, Row, WeightTable, letter_sizes, matches, pieces

_log = logging.getLogger(__name__)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
  "KIB": 2**10,
  "MIB": 2**20,
  "GIB": 2**30,
  "TIB": 2**40,
}


class Shaped(Protocol):
  """Anything with a shape and a dtype: an array, or a `jax.ShapeDtypeStruct`."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes of the axes."""

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the elements."""


@dataclasses.dataclass(frozen=True)
class SavedTensor:
  """A tensor to be written.

  Attributes:
    name: name in the file.
    dtype: dtype in the file.
    shape: shape in the file.
    parts: names of the parameters that fill the tensor, each with the piece that describes how.
    copied: the tensor of the base that is copied to the file, if any; `parts` is empty then.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  parts: tuple[tuple[str, Piece], ...] = ()
  copied: TensorInfo | None = None

  @property
  def nbytes(self) -> int:
    """The number of bytes in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class SavedFile:
  """A file of a checkpoint.

  Attributes:
    name: name of the file.
    tensors: tensors of the file, in the order in which they are written.
  """

  name: str
  tensors: tuple[SavedTensor, ...]

  @functools.cached_property
  def layout(self) -> tuple[bytes, dict[str, int]]:
    """The bytes of the file before the data, and the offset of each tensor's data from the beginning of the file."""
    return file_layout({tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors})

  @property
  def nbytes(self) -> int:
    """The number of bytes of the whole file."""
    return len(self.layout[0]) + sum(tensor.nbytes for tensor in self.tensors)


def plan_state(parameters: Mapping[str, Shaped], *, dtype: np.dtype | None = None) -> list[SavedTensor]:
  """Plans tensors that have the names and shapes of the parameters.

  Args:
    parameters: shapes and dtypes of the parameters, by name.
    dtype: dtype in which floating-point parameters are written; None keeps the dtype of each.

  Raises:
    TypeError: if safetensors files cannot store the dtype of a parameter.
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
  """Plans tensors that have the names and layouts of a naming scheme.

  Args:
    parameters: shapes and dtypes of the model's parameters, by name.
    table: weight table of the naming scheme.
    config: configuration of the model; it decides the forms of parameters if `base` does not, and the sizes of letters.
    base: headers of a checkpoint in the same naming scheme. Parameters are written in its forms, tied tensors that it
      holds are written as well, and tensors that the table ignores are copied. None takes the forms of the published
      checkpoint of `config`.
    dtype: dtype in which floating-point parameters are written; None keeps the dtype of each. Copied tensors are not
      cast.

  Raises:
    CheckpointError: if the headers of `base` are broken, or hold a tensor that the table does not know.
    TypeError: if the table does not have exactly one row for a parameter, the parameters do not fill a tensor, or
      safetensors files cannot store a dtype.
  """
  held = base.tensors if base is not None else {}
  table = table.spelled_as(held) if held else table
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
  """The pieces of each parameter, in the form that the base holds.

  A parameter that the base does not hold takes the form of the same parameter in most other layers, or else that of
  most parameters with as many forms; without a base, the form of the published checkpoint.
  """
  letters = letter_sizes(config)
  forms: dict[str, list[list[Piece]]] = {}
  rows: dict[str, Row] = {}
  chosen: dict[str, int] = {}
  for name, array in parameters.items():
    row, at = table.row_of(name)
    rows[name], forms[name] = row, [pieces(row, form, at, array.shape, letters) for form in row.forms]
    complete = [i for i, form in enumerate(forms[name]) if all(piece.tensor in held for piece in form)]
    # The same tensor in several layouts: its shape decides, or else the configuration.
    fitting = [i for i in complete if all(held[p.tensor].shape == p.shape for p in forms[name][i])]
    if complete:
      if len(fitting) > 1:
        fitting = row.published(fitting, config) or fitting
      chosen[name] = (fitting or complete)[0]
  # Count the chosen forms, per row (the same parameter in all layers) and per number of forms.
  votes: dict[object, collections.Counter[int]] = collections.defaultdict(collections.Counter)
  for name, form in chosen.items():
    votes[rows[name].ours][form] += 1
    votes[len(rows[name].forms)][form] += 1
  for name in parameters:
    if name not in chosen:
      ballot = votes.get(rows[name].ours) or votes.get(len(rows[name].forms))
      published = rows[name].published(range(len(forms[name])), config)
      chosen[name] = ballot.most_common(1)[0][0] if ballot else (published or [0])[0]
  return {name: forms[name][chosen[name]] for name in parameters}


def _check_filled(tensor: SavedTensor) -> None:
  """Raises TypeError if the parameters do not fill all of a tensor."""
  filled = 0
  for _, piece in tensor.parts:
    kept = zip(piece.split, piece.select, strict=True)
    filled += math.prod(size for size, at in kept if isinstance(at, slice))
  if filled != math.prod(tensor.shape):
    names = ", ".join(name for name, _ in tensor.parts)
    raise TypeError(
      f"{tensor.name} {tensor.shape} would be incomplete: only {names} fills it; save all parameters of the model"
    )


def _copied(base: Checkpoint, table: WeightTable, tensors: Mapping[str, SavedTensor]) -> Iterator[TensorInfo]:
  """The tensors of the base to copy: those that no model of the architecture has a parameter for.

  Raises:
    CheckpointError: if the headers of the base are broken, or hold a tensor that the table does not know.
  """
  left = [info for name, info in base.tensors.items() if name not in tensors]
  known = [form.name for row in table.rows for form in row.forms]
  problems, dropped = list(base.problems), []
  for info in left:
    ignored = table.ignores(info.name)
    if ignored is not None and ignored.repeated:
      yield info
    elif ignored is not None or any(matches(name, info.name) for name in known):
      dropped.append(info.name)
    else:
      problems.append(
        f"{info.name} {info.shape} is unexpected: the architecture of the model has no such tensor; give the base that "
        "the model was loaded from"
      )
  if problems:
    raise CheckpointError(base.files.path, problems)
  if dropped:
    _log.warning(
      "%s: %d tensors of the base are not saved, such as %s: the model has no parameter for them",
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
      f"{name} has the dtype {own}, which safetensors files cannot store: cast it to one of "
      f"{', '.join(CODES.values())}"
    )
  return own


def split_files(tensors: Sequence[SavedTensor], max_shard_size: int) -> list[SavedFile]:
  """Distributes tensors over files, in their order.

  Args:
    tensors: all tensors of the checkpoint.
    max_shard_size: most bytes of tensor data in one file; a larger tensor gets a file of its own.

  Returns:
    A single `model.safetensors`, or several files `model-00001-of-00003.safetensors` and so on.
  """
  shards: list[list[SavedTensor]] = [[]]
  room = max_shard_size
  for tensor in tensors:
    if shards[-1] and tensor.nbytes > room:
      shards.append([])
      room = max_shard_size
    shards[-1].append(tensor)
    room -= tensor.nbytes
  return [SavedFile(SINGLE, tuple(shards[0]))] if len(shards) == 1 else numbered(shards)


def numbered(shards: Sequence[Sequence[SavedTensor]], token: str = "") -> list[SavedFile]:
  """Files with numbers in their names; with a token, with names that only one save uses."""
  return [
    SavedFile(shard_name(number, len(shards), token), tuple(shard)) for number, shard in enumerate(shards, 1)
  ]


def index_json(files: Sequence[SavedFile]) -> dict[str, bytes]:
  """The contents of the index of several files, by its file name; empty for a single file."""
  return {INDEX: index_of(files)} if len(files) > 1 else {}


def index_of(files: Sequence[SavedFile]) -> bytes:
  """The contents of the index of files."""
  index = {
    "metadata": {"total_size": sum(tensor.nbytes for file in files for tensor in file.tensors)},
    "weight_map": dict(sorted((tensor.name, file.name) for file in files for tensor in file.tensors)),
  }
  return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def parse_size(size: int | str) -> int:
  """The number of bytes of a file size such as 5000000000, "5GB" (5 * 10^9 bytes) or "2GiB" (2 * 2^30 bytes).

  Raises:
    ValueError: if it is not such a size, or not positive.
  """
  if isinstance(size, str):
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B|)\s*", size.upper())
    nbytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
  else:
    nbytes = size if isinstance(size, int) and not isinstance(size, bool) else 0
  if nbytes <= 0:
    raise ValueError(f'{size!r} is not a file size: write it as 5000000000, "5GB" or "2GiB"')
  return nbytes
