"""LoRA adapters as the library `peft` keeps them: adapter_model.safetensors and adapter_config.json.

A factor's name is that of the module it changes: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`
[r, in], and `.lora_B.weight` [out, r]. Both follow from the rows of the weight table.

Experts are written as modules of their own, which peft fuses where transformers holds them fused. What peft itself
trained on fused experts is read, too: A [E * r, in] and B [out, r * E] of one tensor, such as gate and up together.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from models_core.adapters.lora import Adapter, Factors, Roles, check_factors, find_row, roles
from models_core.errors import AdapterError, CheckpointError, ConfigError
from models_core.family import Family
from models_core.formats import Files, as_files, read_json, read_safetensors_file
from models_core.loading import abstract_model
from models_core.saving import SavedFile, plan_state, replace_directory, write_files, write_texts
from models_core.weights import Form, Piece, WeightTable, pieces

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")

# Keys of adapter_config.json that change the numbers, and the values with which they don't.
_PLAIN: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "fan_in_fan_out": (False, None),
  "use_dora": (False, None),
  "use_qalora": (False, None),
  "lora_bias": (False, None),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "modules_to_save": ([], None),
  "trainable_token_indices": ([], {}, None),
  "layer_replication": ([], None),
  "alora_invocation_tokens": ([], None),
}


def save_peft_adapter(
  adapter: Adapter,
  save_dir: str | os.PathLike,
  family: Family,
  config: Any,
  *,
  base_model: str | None = None,
  overwrite: bool = False,
) -> None:
  """Writes an adapter that `peft.PeftModel.from_pretrained` loads.

  Args:
    adapter: as `lora.adapter_of` gives it.
    save_dir: is missing or empty.
    family: of the model.
    config: of the model.
    base_model: repository or directory of the model that it changes.
    overwrite: whether `save_dir` may hold something. Files of the same names are replaced, others stay.

  Raises:
    AdapterError: if the adapter does not fit the model.
    SaveError: if `save_dir` holds something, or the file system refuses.
  """
  table, shapes = family.huggingface, _shapes(family, config)
  own = check_factors(adapter, table, shapes)
  tensors: dict[str, np.ndarray] = {}
  for name, factors in adapter.factors.items():
    row, placeholders = find_row(table, name)
    for index, module in _modules(row.forms[0], placeholders, own[name], shapes[name]):
      for side, data in zip(_SIDES, _to_peft(factors, own[name], index), strict=True):
        tensors[_PREFIX + module + side] = data
  file = SavedFile(ADAPTER_WEIGHTS, tuple(plan_state(tensors)))
  text = json.dumps(_config(adapter, tensors, table, shapes, base_model), indent=2).encode() + b"\n"
  with replace_directory(os.fspath(save_dir), overwrite=overwrite) as directory:
    write_files(directory, [file], tensors.__getitem__)
    write_texts(directory, {ADAPTER_CONFIG: text})


def load_peft_adapter(place: str | os.PathLike | Files, family: Family, config: Any) -> Adapter:
  """Reads an adapter that `peft` or `save_peft_adapter` wrote, bit by bit.

  Args:
    place: its directory.
    family: of the model.
    config: of the model.

  Raises:
    AdapterError: if the adapter does not fit the model, or is of a kind that is not implemented.
    CheckpointError: if its files are missing or broken.
  """
  files = as_files(place)
  names = set(files.names())
  if missing := [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name not in names]:
    raise CheckpointError(files.path, [f"{name} is missing: this is no adapter of peft" for name in missing])
  rank, alpha = _read_config(files)
  arrays = _read_arrays(files)
  table, shapes = family.huggingface, _shapes(family, config)
  factors: dict[str, Factors] = {}
  used: set[str] = set()
  for name, shape in shapes.items():
    row, placeholders = find_row(table, name)
    for form in row.forms:
      if (own := _roles(table, name, form)) is None:
        continue
      if not _is_split(form, placeholders, own):
        fused = pieces(row, form, placeholders, shape)[0]
        if module := _module_of_fused(arrays, fused, rank):
          wanted = [module + side for side in _SIDES]
          used.update(wanted)
          factors[name] = _from_fused([arrays[tensor] for tensor in wanted], fused, own, shape, rank)
        continue
      modules = list(_modules(form, placeholders, own, shape))
      wanted = [module + side for _, module in modules for side in _SIDES]
      if not any(tensor in arrays for tensor in wanted):
        continue
      if absent := [tensor for tensor in wanted if tensor not in arrays]:
        raise AdapterError(
          f"{files.path}: {absent[0]} is missing: the adapter changes a part of {name} alone"
        )
      used.update(wanted)
      factors[name] = _from_peft(files.path, {tensor: arrays[tensor] for tensor in wanted}, own, shape, rank)
  if left := sorted(arrays.keys() - used):
    raise AdapterError(
      f"{files.path}: {', '.join(left[:8])}{', ...' if len(left) > 8 else ''}: the model has no matrix for it"
    )
  adapter = Adapter(factors, alpha, rank)
  check_factors(adapter, table, shapes)
  return adapter


def _read_arrays(files: Files) -> dict[str, np.ndarray]:
  """All tensors by name, without the prefix that peft gives them."""
  checkpoint = read_safetensors_file(files, ADAPTER_WEIGHTS)
  with contextlib.closing(checkpoint.open([ADAPTER_WEIGHTS])) as reader:
    return {
      info.name.removeprefix(_PREFIX): np.array(reader.read_box(info, info.everything))
      for info in checkpoint.tensors.values()
    }


def _shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
  return {name: p.shape for name, p in abstract_model(family.model_class, config).parameters.items()}


def _roles(table: WeightTable, name: str, form: Form) -> Roles | None:
  """None for what is no matrix."""
  try:
    return roles(find_row(table, name)[0], form)
  except AdapterError:
    return None


def _modules(
  form: Form, placeholders: Mapping[str, str], own: Roles, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], str]]:
  """The modules of a parameter, each with its index along the stacked axes.

  Raises:
    AdapterError: where one tensor holds the matrices of several experts, for which peft has no such factors.
  """
  if not _is_split(form, placeholders, own):
    raise AdapterError(f"{form.name} holds several matrices in one tensor: peft has no factors for these")
  sizes = dict(zip(own.axes, shape, strict=True))
  for index in np.ndindex(*(sizes[axis] for axis in own.experts)):
    at = dict(zip(own.experts, index, strict=True))
    yield index, form.name.format(**placeholders, **at).removesuffix(".weight")


def _is_split(form: Form, placeholders: Mapping[str, str], own: Roles) -> bool:
  """Whether each matrix is a tensor of its own."""
  return {*_PLACEHOLDER.findall(form.name)} - placeholders.keys() == {*own.experts}


def _to_peft(factors: Factors, own: Roles, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """A [r, in] and B [out, r] of one matrix."""
  rank, b_axes = factors.rank, own.b_of(factors.b)
  a = np.asarray(factors.a)[index]
  b = np.asarray(factors.b)[index if b_axes == own.b else ()]
  a = _transposed(a, own.a[len(index) :], "r" + own.inputs).reshape(rank, -1)
  b = _transposed(b, b_axes.removeprefix(own.experts), own.outputs + "r").reshape(-1, rank)
  return np.ascontiguousarray(a), np.ascontiguousarray(b)


def _from_peft(
  where: str, tensors: Mapping[str, np.ndarray], own: Roles, shape: tuple[int, ...], rank: int
) -> Factors:
  """The factors of a parameter from A and B of each of its matrices."""
  sizes = dict(zip(own.axes, shape, strict=True)) | {"r": rank}
  ends = len(own.experts)
  sides = (("r" + own.inputs, own.a[ends:]), (own.outputs + "r", own.b[ends:]))
  found: list[list[np.ndarray]] = [[], []]
  for number, (name, data) in enumerate(tensors.items()):
    theirs, ours = sides[number % 2]
    full = tuple(sizes[axis] for axis in theirs)
    flat = (rank, math.prod(full[1:])) if number % 2 == 0 else (math.prod(full[:-1]), rank)
    if data.shape != flat:
      raise AdapterError(f"{where}: {name} has shape {data.shape}, but the model needs {flat}")
    found[number % 2].append(_transposed(data.reshape(full), theirs, ours))
  experts = tuple(sizes[axis] for axis in own.experts)
  a, b = (np.stack(parts).reshape(*experts, *parts[0].shape) for parts in found)
  return Factors(a, b)


def _module_of_fused(arrays: Mapping[str, np.ndarray], fused: Piece, rank: int) -> str | None:
  """The module under whose name peft keeps the factors of a tensor that holds all experts; None where it has none.

  They are at the module that the tensor belongs to, those of the module's other tensors deeper in: the shapes tell.
  """
  if len(fused.shape) != 3:
    return None
  E, out, into = fused.shape
  module = fused.tensor.rpartition(".")[0]
  while all(module + side in arrays for side in _SIDES):
    if [arrays[module + side].shape for side in _SIDES] == [(E * rank, into), (out, rank * E)]:
      return module
    module += ".base_layer"
  return None


def _from_fused(
  tensors: Sequence[np.ndarray], fused: Piece, own: Roles, shape: tuple[int, ...], rank: int
) -> Factors:
  """The factors of a parameter that is a part of a tensor [E, out, in]: that part of B's rows, and all of A."""
  sizes = dict(zip(own.axes, shape, strict=True)) | {"r": rank}
  a, b = tensors
  # The tensor's first axis are the experts, its last one is the input.
  outputs = slice(1, len(fused.split) - len(own.inputs))
  b = b.reshape(*fused.split[outputs], rank, -1)[fused.select[outputs]]
  theirs = (own.experts + "r" + own.inputs, own.outputs + "r" + own.experts)
  full = (tuple(sizes[axis] for axis in axes) for axes in theirs)
  a, b = (data.reshape(size) for data, size in zip((a, b), full, strict=True))
  return Factors(_transposed(a, theirs[0], own.a), _transposed(b, theirs[1], own.b))


def _transposed(data: np.ndarray, old: str, new: str) -> np.ndarray:
  return data.transpose([old.index(axis) for axis in new])


def _config(
  adapter: Adapter,
  tensors: Mapping[str, np.ndarray],
  table: WeightTable,
  shapes: Mapping[str, tuple[int, ...]],
  base_model: str | None,
) -> dict[str, Any]:
  """adapter_config.json."""
  adapted = {
    name.removeprefix(_PREFIX).removesuffix(_SIDES[0]) for name in tensors if name.endswith(_SIDES[0])
  }
  suffixes = {module.rpartition(".")[2] for module in adapted}
  everywhere = set()
  for name, shape in shapes.items():
    row, placeholders = find_row(table, name)
    if (own := _roles(table, name, row.forms[0])) is not None:
      everywhere |= {module for _, module in _modules(row.forms[0], placeholders, own, shape)}
  # Names of modules where all that bear them are adapted, which other readers know too; else each in full.
  whole = {module for module in everywhere if module.rpartition(".")[2] in suffixes} == adapted
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "r": adapter.rank,
    "lora_alpha": adapter.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "inference_mode": True,
    "target_modules": sorted(suffixes if whole else adapted),
  }


def _read_config(files: Files) -> tuple[int, float]:
  """Rank and alpha."""
  where = f"{files.path}/{ADAPTER_CONFIG}"
  try:
    raw = read_json(files, ADAPTER_CONFIG)
  except ConfigError as error:
    raise CheckpointError(files.path, [str(error)]) from None
  if odd := [key for key, values in _PLAIN.items() if raw.get(key, values[0]) not in values]:
    stated = ", ".join(f"{key}={raw[key]!r}" for key in odd)
    raise AdapterError(f"{where}: {stated}: not implemented, only plain LoRA is")
  rank, alpha = raw.get("r"), raw.get("lora_alpha")
  if type(rank) is not int or rank < 1:
    raise AdapterError(f"{where}: r is {rank!r}, expected a positive whole number")
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
    raise AdapterError(f"{where}: lora_alpha is {alpha!r}, expected a number")
  # Rank-stabilised LoRA divides by the root of the rank: the same as plain LoRA with a larger alpha.
  return rank, alpha * math.sqrt(rank) if raw.get("use_rslora") else alpha
