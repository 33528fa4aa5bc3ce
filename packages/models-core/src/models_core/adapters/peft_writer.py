"""Writes LoRA adapters in the format of the library `peft`: adapter_model.safetensors and adapter_config.json.

Each expert is written as a module of its own; peft fuses them if transformers holds the experts fused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from models_core.adapters.lora import Adapter, Factors, check_factors, find_row
from models_core.adapters.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models_core.adapters.peft_names import BASE_LAYER, MAGNITUDE, PREFIX, ROWS, SHIFT, Matrices, matrices_of
from models_core.adapters.targets import NO_MODULES, Targets
from models_core.adapters.vocabulary import merged_config, twins_of, with_head
from models_core.errors import AdapterError
from models_core.family import Family
from models_core.formats import Files, as_files, read_safetensors
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
from models_core.stacks import without_stacks
from models_core.weights import WeightTable, letter_sizes, pieces, put_back


def save_peft_adapter(
  adapter: Adapter,
  save_dir: Place,
  family: Family,
  config: Any,
  *,
  base_model: str | None = None,
  base: str | os.PathLike | Files | None = None,
  overwrite: bool = False,
) -> None:
  """Writes an adapter that `peft.PeftModel.from_pretrained` can load.

  Args:
    adapter: the adapter, such as `adapter_of` returns.
    save_dir: directory to write, or a target that a source provides; it may be missing or empty. The write is atomic.
    family: family of the model.
    config: configuration of the model that the adapter changes.
    base_model: repository or directory of the model that the adapter changes, for adapter_config.json; None is `base`, if
      that is a path.
    base: the checkpoint of this model, if its modules may have other names than those of a language model alone: beside a
      vision tower, transformers puts a prefix before them. Only headers are read.
    overwrite: whether `save_dir` may hold files. Files of the same names are replaced, all others stay.

  Raises:
    AdapterError: if the adapter does not fit the model, or peft has no form for one of its changes.
    CheckpointError: if the headers of `base` are broken.
    SaveError: if `save_dir` holds files and `overwrite` is false, or the file system refuses the write.
  """
  model = _Model.of(adapter, family, config, () if base is None else read_safetensors(as_files(base)).tensors)
  if base_model is None and isinstance(base, (str, os.PathLike)):
    base_model = os.fspath(base)
  tensors, keys = _contents(adapter, model)
  text = json.dumps(_config(adapter, model, base_model, keys), indent=2).encode() + b"\n"
  file = SavedFile(ADAPTER_WEIGHTS, tuple(plan_state(tensors)))
  if isinstance(save_dir, str | os.PathLike):
    with replace_directory(os.fspath(save_dir), overwrite=overwrite, nbytes=file.nbytes) as directory:
      write_files(directory, [file], tensors.__getitem__)
      write_texts(directory, {ADAPTER_CONFIG: text})
  else:
    contents = {ADAPTER_WEIGHTS: file_bytes(file, tensors.__getitem__), ADAPTER_CONFIG: text}
    put_files(save_dir, contents, overwrite=overwrite, last=ADAPTER_CONFIG)


@dataclasses.dataclass(frozen=True)
class _Model:
  """The modules of a model in transformers.

  Attributes:
    table: weight table with a row for the head.
    shapes: shapes of the parameters after the adapter was merged, by name.
    letters: sizes of letters in layouts.
    forms: index of the form of each row, by its parameter, in which transformers holds it.
    is_prefixed: whether modules have other names than those of a language model alone.
    is_tied: whether the head is the embedding, also after the adapter was merged.
    embedding: parameter of the embedding.
    head: parameter of the head.
  """

  table: WeightTable
  shapes: Mapping[str, tuple[int, ...]]
  letters: Mapping[str, int]
  forms: Mapping[str, int]
  is_prefixed: bool
  is_tied: bool
  embedding: str
  head: str

  @classmethod
  def of(cls, adapter: Adapter, family: Family, config: Any, held: Any) -> _Model:
    """The modules of a model.

    Args:
      adapter: that changes the model.
      family: of the model.
      config: of the model.
      held: names of the base's tensors; empty if there is no base.

    Raises:
      AdapterError: if the adapter does not fit the model.
    """
    table = with_head(family.huggingface)
    embedding, head = twins_of(table)
    config = without_stacks(config)
    final = merged_config(config, adapter, family)
    shapes = {n: p.shape for n, p in abstract_model(family.model_class, final).parameters.items()}
    check_factors(adapter, family.huggingface, shapes)
    is_tied = bool(head) and embedding in shapes and head not in shapes
    if is_tied:
      shapes[head] = shapes[embedding]
    chosen = {name: _form(table, name, held) for name in shapes}
    forms, prefixed = {n: c[0] for n, c in chosen.items()}, any(c[1] for c in chosen.values())
    return cls(table, shapes, letter_sizes(config), forms, prefixed, is_tied, embedding, head)

  def matrices(self, name: str) -> Matrices | None:
    """The matrices of a parameter; None if it is a vector."""
    form = find_row(self.table, name)[0].forms[self.forms[name]]
    return next((m for m in matrices_of(self.table, name, self.shapes[name]) if m.form is form), None)

  def modules(self, name: str) -> Mapping[tuple[int, ...], str]:
    """The modules of a parameter, as `Matrices.modules`.

    Raises:
      AdapterError: if it is a vector, or one tensor holds the matrices of several experts.
    """
    matrices = self.matrices(name)
    if matrices is None or matrices.modules is None:
      form = find_row(self.table, name)[0].forms[0]
      raise AdapterError(
        f"{form.name} holds several matrices in one tensor, which an adapter in peft's format cannot change: merge the "
        "adapter into the weights instead"
      )
    return matrices.modules

  def tensors(self, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a parameter that is stored whole, by name."""
    row, at = find_row(self.table, name)
    result = {}
    for piece in pieces(row, row.forms[self.forms[name]], at, self.shapes[name], self.letters):
      result[piece.tensor] = np.empty(piece.shape, array.dtype)
      put_back(array[piece.target], piece, result[piece.tensor])
    return result

  def whole_modules(self) -> dict[str, set[str]]:
    """The parameters of each module, by the names of the modules."""
    found: dict[str, set[str]] = {}
    for name, shape in self.shapes.items():
      row, at = find_row(self.table, name)
      for piece in pieces(row, row.forms[self.forms[name]], at, shape, self.letters):
        found.setdefault(piece.tensor.rpartition(".")[0], set()).add(name)
    return found


def _form(table: WeightTable, name: str, held: Any) -> tuple[int, bool]:
  """In which form transformers holds a parameter, and whether the form's prefix is that of a model with other parts.

  The forms of a row go from a language model alone over older files to newer ones, whose names are those of transformers.
  """
  row, at = find_row(table, name)
  layouts = [form.layout for form in row.forms]
  separate = [index for index, layout in enumerate(layouts) if layout == layouts[0]]
  first = row.forms[0].name.format_map(_Filled(at))
  others = [row.forms[index].name.format_map(_Filled(at)) for index in separate[1:]]
  is_other = bool(held) and first not in held and any(other in held for other in others)
  return (separate[-1], True) if is_other else (0, False)


class _Filled(dict[str, str]):
  """Values of placeholders, with 0 for those that have none: the first of several stacked tensors."""

  def __missing__(self, key: str) -> str:
    return "0"


def _contents(adapter: Adapter, model: _Model) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The tensors of an adapter by name, and those keys of adapter_config.json that depend on them.

  Raises:
    AdapterError: if peft has no form for a change.
  """
  keys: dict[str, Any] = {}
  tensors: dict[str, np.ndarray] = {}
  factors = dict(adapter.factors)
  whole = {name: np.asarray(array) for name, array in adapter.whole.items()}
  if model.is_tied and (model.embedding in factors or model.embedding in whole):
    # peft holds factors and whole matrices of a head and an embedding apart, and can keep them the same.
    keys["ensure_weight_tying"] = True
    if model.embedding in factors:
      factors[model.head] = factors[model.embedding]
    if model.embedding in whole:
      whole[model.head] = whole[model.embedding]
  adapted: dict[str, str] = {}
  for name, one in factors.items():
    matrices = model.matrices(name)
    for index, module in model.modules(name).items():
      assert matrices is not None
      adapted[module] = name
      for side, data in zip(matrices.sides, _to_peft(one, matrices, index), strict=True):
        tensors[module + side] = data
      if one.magnitude is not None:
        tensors[module + MAGNITUDE] = np.ascontiguousarray(np.asarray(one.magnitude)[index].reshape(-1))
  keys |= _shared(factors) | {"target_modules": None, "modules": adapted}
  by_module = model.whole_modules()
  saved: dict[str, None] = {}
  biases: set[str] = set()
  for name, array in whole.items():
    for tensor, data in model.tensors(name, array).items():
      module, _, leaf = tensor.rpartition(".")
      if module in adapted:
        module += BASE_LAYER
        biases |= {name} if leaf == "bias" else set()
      elif by_module[module] <= whole.keys():
        saved[module] = None
      elif leaf == "bias":
        biases.add(name)
      else:
        lacking = ", ".join(sorted(by_module[module] - whole.keys()))
        raise AdapterError(f"peft stores modules whole: give {lacking} as well, which belongs to {module}")
      tensors[f"{module}.{leaf}"] = data
  keys["modules_to_save"] = [_short(module, by_module) for module in saved] or None
  keys["bias"] = _bias(biases, whole, by_module, adapted)
  tokens: dict[str, list[int]] = {}
  for name, rows in adapter.rows.items():
    (module,) = model.modules(name).values()
    tokens[_short(module, by_module)] = [int(index) for index in rows.indices]
    tensors[module + ROWS] = np.ascontiguousarray(rows.values)
  keys["trainable_token_indices"] = tokens or None
  if adapter.shifts:
    _add_shifts(adapter, by_module, adapted, tensors)
    keys["lora_bias"] = True
  return {PREFIX + name: data for name, data in tensors.items()}, keys


def _to_peft(factors: Factors, matrices: Matrices, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """peft's A [r, in] and B [out, r] of one matrix of a parameter; of an embedding A [r, vocabulary] and B [dim, r]."""
  own = matrices.roles
  a = np.asarray(factors.a)[index]
  b = np.asarray(factors.b)[index if own.b_of(factors.b) == own.b else ()]
  if matrices.is_embedding:
    return np.ascontiguousarray(b), np.ascontiguousarray(a)
  return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)


def _shared(factors: Mapping[str, Factors]) -> dict[str, Any]:
  """What adapter_config.json says of all factors: whether they have magnitudes, and how they were initialised.

  Raises:
    AdapterError: if it is not the same for all of them.
  """
  dora = {one.magnitude is not None for one in factors.values()}
  initial = {one.initial for one in factors.values()}
  if len(dora) > 1 or len(initial) > 1:
    raise AdapterError(
      "in peft's format all factors have magnitudes or none, and one initialisation: split the adapter"
    )
  keys: dict[str, Any] = {"use_dora": dora == {True}}
  return keys | ({"init_lora_weights": one} if (one := next(iter(initial), None)) else {})


def _short(module: str, modules: Mapping[str, Any]) -> str:
  """The last part of a module's name if no other module's name ends with it, otherwise the whole name."""
  short = module.rpartition(".")[2]
  return short if sum(name.endswith(short) for name in modules) == 1 else module


def _bias(
  biases: set[str], whole: Mapping[str, Any], by_module: Mapping[str, set[str]], adapted: Mapping[str, str]
) -> str:
  """The value of the key `bias`.

  Raises:
    AdapterError: if peft has no value for these biases.
  """
  if not biases:
    return "none"
  every = {name for names in by_module.values() for name in names if name.endswith(".b")}
  of_adapted = {name for module in adapted for name in by_module[module] if name in every}
  if every <= whole.keys():
    return "all"
  if biases == of_adapted:
    return "lora_only"
  raise AdapterError(
    "peft stores all biases, or those of modules with factors: the adapter replaces "
    f"{', '.join(sorted(biases)[:8])} alone"
  )


def _add_shifts(
  adapter: Adapter,
  by_module: Mapping[str, set[str]],
  adapted: Mapping[str, str],
  tensors: dict[str, np.ndarray],
) -> None:
  """Adds the biases of second factors, which every module with factors has in peft."""
  left = set(adapter.shifts)
  for module, name in adapted.items():
    bias = next((one for one in by_module[module] if one in adapter.shifts), None)
    out = tensors[f"{module}.lora_B.weight"].shape[0]
    shift = np.zeros(out, np.float32) if bias is None else np.asarray(adapter.shifts[bias], np.float32)
    tensors[module + SHIFT] = shift / np.float32(adapter.scale_of(name))
    left.discard(bias or "")
  if left:
    raise AdapterError(f"peft shifts only biases of modules with factors: {', '.join(sorted(left))} has none")


def _config(adapter: Adapter, model: _Model, base_model: str | None, keys: dict[str, Any]) -> dict[str, Any]:
  """The contents of adapter_config.json."""
  adapted = keys.pop("modules")
  targets, layers = _targets(model, adapted)
  ranks, alphas = (
    {m: getter(name) for m, name in adapted.items()}
    for getter in (
      lambda name: adapter.factors[_owner(name, adapter, model)].rank,
      lambda name: adapter.alphas[_owner(name, adapter, model)],
    )
  )
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "r": adapter.rank,
    "lora_alpha": adapter.alpha,
    "rank_pattern": _patterns(ranks, adapter.rank),
    "alpha_pattern": _patterns(alphas, adapter.alpha),
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "inference_mode": True,
    **keys,
    "target_modules": targets,
    "layers_to_transform": layers,
    "layers_pattern": None if layers is None else "layers",
  }


def _owner(name: str, adapter: Adapter, model: _Model) -> str:
  """The parameter whose factors a parameter has: a tied head has those of the embedding."""
  return name if name in adapter.factors else model.embedding


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
  """The values that are not the default, by the ends of modules' names if all of that name have one value."""
  by_end: dict[str, set[Any]] = {}
  for module, value in values.items():
    by_end.setdefault(module.rpartition(".")[2], set()).add(value)
  result = {}
  for module, value in values.items():
    end = module.rpartition(".")[2]
    if value != default:
      result[end if len(by_end[end]) == 1 else f"^{module}"] = value
  return result


def _targets(model: _Model, adapted: Mapping[str, str]) -> tuple[list[str] | str, list[int] | None]:
  """target_modules and layers_to_transform.

  A short name such as "q_proj" stands for all modules of this name, and every reader understands it. Short names are
  listed if the adapter changes all of these modules, or all of those in some layers; otherwise full names. Beside a
  vision tower, whose modules have the same short names, full names are listed.
  """
  if not adapted:
    return NO_MODULES, None
  ends = tuple(sorted({module.rpartition(".")[2] for module in adapted}))
  every = {
    module: matrices
    for name in model.shapes
    if (matrices := model.matrices(name)) is not None
    for module in (matrices.modules or {}).values()
  }
  own = [every[module] for module in adapted]
  layers = sorted({int(one.placeholders["i"]) for one in own if "i" in one.placeholders})
  choices = [Targets(ends)]
  # peft does not look at the layer of experts that are one tensor.
  if layers and not any(one.roles.experts for one in own):
    choices.append(Targets(ends, layers=tuple(layers), layers_pattern=("layers",)))
  for targets in [] if model.is_prefixed else choices:
    named = {
      module
      for module, one in every.items()
      if targets.has_module(module, is_embedding=one.is_embedding, is_head=one.is_head)
    }
    if named == adapted.keys():
      return list(ends), None if targets.layers is None else layers
  return sorted(adapted), None
