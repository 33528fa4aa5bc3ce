"""LoRA factors in the Orbax trees of trainers: beside the weights that they change, or alone.

The factors of a tensor `w` are `w_lora_a` and `w_lora_b`, as qwix makes them. They have the tensor's axes: those that
its product contracts are in `w_lora_a` [in axes, r], all others in `w_lora_b` [r, out axes]. The tensor's row of the
weight table tells which axes these are in the parameter.

Example: tunix's query projection has the layout "d n h -> (n h) d", and d is in. With 32 heads of dimension 128 and
rank 8, the factors [2048, 8] and [8, 32, 128] become [2048, 8] and [8, 4096].
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from models_core.adapters.lora import A, Adapter, B, Factors, Roles, check_factors, find_row, roles
from models_core.errors import AdapterError, CheckpointError
from models_core.family import Family
from models_core.formats import ORBAX, Files, as_files, read_orbax
from models_core.loading import AbstractModel, abstract_model
from models_core.stacks import without_stacks
from models_core.weights import Form, Piece, WeightTable, parse_layout, pieces

# What names end with if a Flax state was saved with its variables.
_VARIABLE = ".value"


def factor_names(names: Iterable[str]) -> list[str]:
  """Those of some tensors' names that are names of LoRA factors."""
  return [name for name in names if name.removesuffix(_VARIABLE).endswith((A, B))]


def load_orbax_adapter(
  place: str | os.PathLike | Files, family: Family, config: Any, *, alpha: float
) -> Adapter:
  """Reads the LoRA factors in an Orbax tree that a trainer saved from a model of the family, or tunix from its own.

  Args:
    place: directory of the tree, or of a training run, or its files. Tensors that are no factors are not read.
    family: family of the model.
    config: configuration of the model.
    alpha: the alpha of the training; trees do not store it.

  Raises:
    AdapterError: if there are no factors, or they do not fit the model.
    CheckpointError: if the tree is missing or broken.
  """
  where, arrays = _read_factors(as_files(place))
  model = abstract_model(family.model_class, without_stacks(config))
  shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
  problem = None
  # Some names are those of several naming schemes. The shapes fit one of them.
  for table in family.tables_for(ORBAX, {_weight(name) for name in arrays}, shapes):
    try:
      adapter = _adapter(arrays, model, table, family.huggingface, alpha)
      check_factors(adapter, family.huggingface, shapes)
      return adapter
    except AdapterError as error:
      problem = error
  raise AdapterError(f"{where}: {problem}")


def _adapter(
  arrays: Mapping[str, np.ndarray],
  model: AbstractModel,
  table: WeightTable,
  huggingface: WeightTable,
  alpha: float,
) -> Adapter:
  """The adapter that consists of some factors.

  Args:
    arrays: the factors by name.
    model: the model that they change.
    table: weight table of the naming scheme of the factors.
    huggingface: that of Hugging Face's, which tells the roles of axes.
    alpha: the alpha of the training.

  Raises:
    AdapterError: if one of a pair is missing, no parameter fits a factor, a shape differs, or the ranks differ.
  """
  factors: dict[str, Factors] = {}
  used: set[str] = set()
  for name, parameter in model.parameters.items():
    row, at = find_row(table, name)
    for form in row.forms:
      piece = pieces(row, form, at, parameter.shape, model.letters)[0]
      sides = [piece.tensor + side for side in (A, B)]
      if found := {side: arrays[side] for side in sides if side in arrays}:
        if absent := [side for side in sides if side not in found]:
          raise AdapterError(f"{absent[0]} is missing: a change needs both of its factors")
        matrix, _ = find_row(huggingface, name)
        factors[name] = _arranged(found, form, piece, roles(matrix, matrix.forms[0]))
        used.update(sides)
  if left := sorted(arrays.keys() - used):
    raise AdapterError(
      "the model has no matrix that these factors fit: "
      f"{', '.join(left[:8])}{', ...' if len(left) > 8 else ''}"
    )
  ranks = {one.rank for one in factors.values()}
  if len(ranks) > 1:
    raise AdapterError(f"all LoRA factors must have one rank, but they have the ranks {sorted(ranks)}")
  return Adapter(factors, alpha, ranks.pop())


def _read_factors(files: Files) -> tuple[str, dict[str, np.ndarray]]:
  """Where a tree lies, and its factors by name.

  Raises:
    AdapterError: if it has none.
  """
  checkpoint = read_orbax(files)
  if checkpoint.problems:
    raise CheckpointError(files.path, checkpoint.problems)
  infos = [checkpoint.tensors[name] for name in factor_names(checkpoint.tensors)]
  if not infos:
    raise AdapterError(
      f"{files.path} holds no LoRA factors, whose names end in {A} and {B}: load it as a model"
    )
  with contextlib.closing(checkpoint.open(())) as reader:
    return files.path, {
      info.name.removesuffix(_VARIABLE): np.array(reader.read_box(info, info.everything)) for info in infos
    }


def _weight(factor: str) -> str:
  """The name of the tensor that a factor changes."""
  return factor.removesuffix(A).removesuffix(B)


def _arranged(sides: Mapping[str, np.ndarray], form: Form, piece: Piece, own: Roles) -> Factors:
  """The factors of a parameter, from those of the tensor that holds it.

  Args:
    sides: the tensor's factors a and b, by name.
    form: the form of the tensor.
    piece: the form, resolved for the tensor.
    own: roles of the parameter's axes.

  Raises:
    AdapterError: if a factor has another shape.
  """
  theirs, ours = parse_layout(form.layout)
  # An axis of the tensor is a letter, a part such as "0/2", or all letters of an axis of the parameter.
  axes = [" ".join(group) for group in theirs]
  sizes = dict(zip(axes, piece.shape, strict=True)) | {"r": next(iter(sides.values())).shape[-1]}

  def of(role: str) -> list[str]:
    groups = [ours[own.axes.index(axis)] for axis in role]
    return [a for group in groups for a in ([" ".join(group)] if " ".join(group) in axes else group)]

  experts, into, out = of(own.experts), of(own.input), of(own.output)
  a_axes = [axis for axis in axes if axis in experts or axis in into] + ["r"]
  b_axes = [*experts, "r", *(axis for axis in axes if axis not in experts and axis not in into)]
  a, b = sides.values()
  if experts and b.ndim == len(b_axes) - len(experts):
    # All experts share it.
    b_axes = b_axes[len(experts) :]
  for (name, factor), needed in zip(sides.items(), (a_axes, b_axes), strict=True):
    if factor.shape != (shape := tuple(sizes[axis] for axis in needed)):
      raise AdapterError(f"{name} has shape {factor.shape}, but the model needs {shape}")
  parts = dict(zip(axes, piece.select, strict=True))
  b = b[tuple(parts[axis] if "/" in axis else slice(None) for axis in b_axes)]
  kept = [axis for axis in b_axes if "/" not in axis]
  lead = [axis for axis in experts if axis in kept]
  a = a.transpose([a_axes.index(axis) for axis in (*experts, *into, "r")])
  b = b.transpose([kept.index(axis) for axis in (*lead, "r", *out)])
  return Factors(
    a.reshape(*a.shape[: len(experts)], -1, sizes["r"]), b.reshape(*b.shape[: len(lead)], sizes["r"], -1)
  )
