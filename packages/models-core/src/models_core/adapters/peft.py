"""LoRA adapters in the format of the library `peft`: adapter_model.safetensors and adapter_config.json.

The factors are named after the module that they change. Those of `base_model.model.model.layers.0.self_attn.q_proj` are
its `.lora_A.weight` [r, in] and its `.lora_B.weight` [out, r]. Names and shapes follow from the weight table.

Each expert is written as a module of its own; peft fuses them if transformers holds the experts fused. Adapters that
peft trained on fused experts can be read, too. They have A [E * r, in] and B [out, r * E] for one fused tensor, such as
gate and up together.
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
from models_core.saving import (
  Place,
  SavedFile,
  file_bytes,
  plan_state,
  put_files,
  replace_directory,
  write_files,
  write_texts,
)
from models_core.weights import Form, Piece, WeightTable, letter_sizes, pieces

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")

# Keys of adapter_config.json that may change the result, and the values with which they do not.
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
  save_dir: Place,
  family: Family,
  config: Any,
  *,
  base_model: str | None = None,
  overwrite: bool = False,
) -> None:
  """Writes an adapter that `peft.PeftModel.from_pretrained` can load.

  Args:
    adapter: the adapter, such as `adapter_of` returns.
    save_dir: directory to write, or a target that a source provides; it may be missing or empty. The write is atomic.
    family: family of the model.
    config: configuration of the model.
    base_model: repository or directory of the model that the adapter changes, for adapter_config.json.
    overwrite: whether `save_dir` may hold files. Files of the same names are replaced, all others stay.

  Raises:
    AdapterError: if the adapter does not fit the model, or peft has no factors for one of its tensors.
    SaveError: if `save_dir` holds files and `overwrite` is false, or the file system refuses the write.
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
  if isinstance(save_dir, str | os.PathLike):
    with replace_directory(os.fspath(save_dir), overwrite=overwrite, nbytes=file.nbytes) as directory:
      write_files(directory, [file], tensors.__getitem__)
      write_texts(directory, {ADAPTER_CONFIG: text})
  else:
    contents = {ADAPTER_WEIGHTS: file_bytes(file, tensors.__getitem__), ADAPTER_CONFIG: text}
    put_files(save_dir, contents, overwrite=overwrite, last=ADAPTER_CONFIG)


def load_peft_adapter(place: str | os.PathLike | Files, family: Family, config: Any) -> Adapter:
  """Reads an adapter that `peft` or `save_peft_adapter` wrote. The numbers are exactly those of the file.

  Args:
    place: directory of the adapter, or its files.
    family: family of the model.
    config: configuration of the model.

  Raises:
    AdapterError: if the adapter does not fit the model, or is of a kind that is not supported.
    CheckpointError: if its files are missing or broken.
  """
  files = as_files(place)
  names = set(files.names())
  if missing := [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name not in names]:
    raise CheckpointError(
      files.path, [f"{name} is missing: give the directory of a peft adapter" for name in missing]
    )
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
        fused = pieces(row, form, placeholders, shape, letter_sizes(config))[0]
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
          f"{files.path}: {absent[0]} is missing: the adapter must change all of {name} or nothing of it"
        )
      used.update(wanted)
      factors[name] = _from_peft(files.path, {tensor: arrays[tensor] for tensor in wanted}, own, shape, rank)
  if left := sorted(arrays.keys() - used):
    raise AdapterError(
      f"{files.path}: the model has no matrix that these factors fit: "
      f"{', '.join(left[:8])}{', ...' if len(left) > 8 else ''}"
    )
  adapter = Adapter(factors, alpha, rank)
  check_factors(adapter, table, shapes)
  return adapter


def _read_arrays(files: Files) -> dict[str, np.ndarray]:
  """All tensors of the adapter by name, without the prefix that peft puts before the names."""
  checkpoint = read_safetensors_file(files, ADAPTER_WEIGHTS)
  with contextlib.closing(checkpoint.open([ADAPTER_WEIGHTS])) as reader:
    return {
      info.name.removeprefix(_PREFIX): np.array(reader.read_box(info, info.everything))
      for info in checkpoint.tensors.values()
    }


def _shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of the model's parameters, by name."""
  return {name: p.shape for name, p in abstract_model(family.model_class, config).parameters.items()}


def _roles(table: WeightTable, name: str, form: Form) -> Roles | None:
  """The roles of a parameter's axes; None if it is not a matrix."""
  try:
    return roles(find_row(table, name)[0], form)
  except AdapterError:
    return None


def _modules(
  form: Form, placeholders: Mapping[str, str], own: Roles, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], str]]:
  """The peft modules of a parameter, each with its index along the stacked axes.

  Example: the down projections of the experts of a layer are `((0,), "model.layers.0.mlp.experts.0.down_proj")`,
  `((1,), "model.layers.0.mlp.experts.1.down_proj")` and so on. Other parameters are one module, with the index `()`.

  Raises:
    AdapterError: if one tensor holds the matrices of several experts, for which peft has no factors of this kind.
  """
  if not _is_split(form, placeholders, own):
    raise AdapterError(
      f"{form.name} holds several matrices in one tensor, which an adapter in peft's format cannot change: merge the "
      "adapter into the weights instead"
    )
  sizes = dict(zip(own.axes, shape, strict=True))
  for index in np.ndindex(*(sizes[axis] for axis in own.experts)):
    at = dict(zip(own.experts, index, strict=True))
    yield index, form.name.format(**placeholders, **at).removesuffix(".weight")


def _is_split(form: Form, placeholders: Mapping[str, str], own: Roles) -> bool:
  """Whether each matrix of a parameter is a tensor of its own, rather than fused experts."""
  return {*_PLACEHOLDER.findall(form.name)} - placeholders.keys() == {*own.experts}


def _to_peft(factors: Factors, own: Roles, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """peft's A [r, in] and B [out, r] of one matrix of a parameter."""
  a = np.asarray(factors.a)[index]
  b = np.asarray(factors.b)[index if own.b_of(factors.b) == own.b else ()]
  return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)


def _from_peft(
  where: str, tensors: Mapping[str, np.ndarray], own: Roles, shape: tuple[int, ...], rank: int
) -> Factors:
  """The factors of a parameter, from peft's A and B of each of its matrices in turn.

  Raises:
    AdapterError: if a tensor does not have the shape that the model needs.
  """
  sizes = dict(zip(own.axes, shape, strict=True))
  needed = ((rank, sizes[own.input]), (sizes[own.output], rank))
  found: list[list[np.ndarray]] = [[], []]
  for number, (name, data) in enumerate(tensors.items()):
    if data.shape != needed[number % 2]:
      raise AdapterError(f"{where}: {name} has shape {data.shape}, but the model needs {needed[number % 2]}")
    found[number % 2].append(data.T)
  experts = tuple(sizes[axis] for axis in own.experts)
  a, b = (np.stack(parts).reshape(*experts, *parts[0].shape) for parts in found)
  return Factors(a, b)


def _module_of_fused(arrays: Mapping[str, np.ndarray], fused: Piece, rank: int) -> str | None:
  """The name under which peft stores the factors of a tensor that holds all experts; None if there are none.

  It is that of the module which the tensor belongs to. If several tensors of one module are adapted, peft nests them:
  `experts`, `experts.base_layer` and so on. The shapes of the factors tell which one belongs to the tensor.
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
  """The factors of a parameter that is a part of a fused tensor [E, out, in]: all of A, and that part of B's rows."""
  sizes = dict(zip(own.axes, shape, strict=True)) | {"r": rank}
  a, b = tensors
  # The first axis of the tensor is that of the experts, the last one is the input.
  outputs = slice(1, len(fused.split) - 1)
  b = b.reshape(*fused.split[outputs], rank, -1)[fused.select[outputs]]
  theirs = (own.experts + "r" + own.input, own.output + "r" + own.experts)
  full = (tuple(sizes[axis] for axis in axes) for axes in theirs)
  a, b = (data.reshape(size) for data, size in zip((a, b), full, strict=True))
  return Factors(_transposed(a, theirs[0], own.a), _transposed(b, theirs[1], own.b))


def _transposed(data: np.ndarray, old: str, new: str) -> np.ndarray:
  """Reorders axes, named by letters: from "rd" to "dr"."""
  return data.transpose([old.index(axis) for axis in new])


def _config(
  adapter: Adapter,
  tensors: Mapping[str, np.ndarray],
  table: WeightTable,
  shapes: Mapping[str, tuple[int, ...]],
  base_model: str | None,
) -> dict[str, Any]:
  """The contents of adapter_config.json."""
  adapted = {
    name.removeprefix(_PREFIX).removesuffix(_SIDES[0]) for name in tensors if name.endswith(_SIDES[0])
  }
  suffixes = {module.rpartition(".")[2] for module in adapted}
  everywhere = set()
  for name, shape in shapes.items():
    row, placeholders = find_row(table, name)
    if (own := _roles(table, name, row.forms[0])) is not None:
      everywhere |= {module for _, module in _modules(row.forms[0], placeholders, own, shape)}
  # A short name such as "q_proj" stands for all modules of this name, and every reader understands it. Short names
  # are listed if the adapter changes all of these modules, otherwise full names.
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
  """Reads rank and alpha from adapter_config.json.

  Raises:
    AdapterError: if the adapter is of a kind that is not supported, or rank or alpha is not a valid number.
    CheckpointError: if the file is not valid JSON.
  """
  where = f"{files.path}/{ADAPTER_CONFIG}"
  try:
    raw = read_json(files, ADAPTER_CONFIG)
  except ConfigError as error:
    raise CheckpointError(files.path, [str(error)]) from None
  if odd := [key for key, values in _PLAIN.items() if raw.get(key, values[0]) not in values]:
    stated = ", ".join(f"{key}={raw[key]!r}" for key in odd)
    raise AdapterError(f"{where}: {stated} is not supported: train a plain or a rank-stabilised LoRA adapter")
  rank, alpha = raw.get("r"), raw.get("lora_alpha")
  if type(rank) is not int or rank < 1:
    raise AdapterError(f"{where}: r is {rank!r}, expected a positive whole number")
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
    raise AdapterError(f"{where}: lora_alpha is {alpha!r}, expected a finite number")
  # Rank-stabilised LoRA scales by alpha / sqrt(rank): the same as plain LoRA with alpha * sqrt(rank).
  return rank, alpha * math.sqrt(rank) if raw.get("use_rslora") else alpha
