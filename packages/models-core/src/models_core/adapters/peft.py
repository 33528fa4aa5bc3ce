"""Reads LoRA adapters in the format of the library `peft`: adapter_model.safetensors and adapter_config.json.

All tensors of the file are accounted for: factors, DoRA's magnitudes, whole parameters, rows of embeddings and biases.
They are compared with what adapter_config.json says was adapted.

Adapters of experts have factors for each of them, or, if peft trained on fused experts, A [E * r, in] and B [out, r * E]
for one fused tensor, such as gate and up together.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models_core.adapters.lora import Adapter, Factors, Rows, check_factors, find_row, with_defaults
from models_core.adapters.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PeftConfig, read_peft_config
from models_core.adapters.peft_names import (
  BASE_LAYER,
  MAGNITUDE,
  PREFIX,
  ROWS,
  SHIFT,
  SIDES,
  Matrices,
  matrices_of,
)
from models_core.adapters.vocabulary import twins_of, untied_config, vocabulary_parameters, with_head
from models_core.errors import AdapterError, CheckpointError
from models_core.family import Family
from models_core.formats import Files, as_files, read_safetensors_file
from models_core.loading import abstract_model
from models_core.stacks import without_stacks
from models_core.weights import Piece, WeightTable, arrange, letter_sizes, matches, part_shape, pieces

_log = logging.getLogger(__name__)

# What base classes of transformers, which have no head, leave out of the names of modules.
_BODY = "model."
# Tensors that only training needs.
_TRAINING = (".lora_velora_embed", ".lora_monteclora_sampler.")


def load_peft_adapter(place: str | os.PathLike | Files, family: Family, config: Any) -> Adapter:
  """Reads an adapter that `peft` or `save_peft_adapter` wrote. The numbers are exactly those of the file.

  What the model leaves out of its base, such as a vision tower, is left out here, too, and named in the log.

  Args:
    place: directory of the adapter, or its files.
    family: family of the model.
    config: configuration of the model that the adapter is merged into.

  Raises:
    AdapterError: if the adapter does not fit the model, is of a kind that is not supported, or its tensors are not those
      that adapter_config.json names.
    CheckpointError: if its files are missing or broken.
  """
  files = _adapter_files(place)
  settings = read_peft_config(files)
  return _Reading(files, settings, family, without_stacks(config)).adapter()


def _adapter_files(place: str | os.PathLike | Files) -> Files:
  """The files of an adapter.

  Raises:
    CheckpointError: if one of both files is missing.
  """
  files = as_files(place)
  if isinstance(place, (str, os.PathLike)) and not os.path.exists(files.path):
    raise CheckpointError(
      files.path,
      [
        "there is no such directory; an adapter on the hub or in a store is read by "
        f"models_automodel.load_adapter({os.fspath(place)!r}, model)"
      ],
    )
  names = set(files.names())
  missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name not in names]
  problems = [f"{name} is missing: give the directory of a peft adapter" for name in missing]
  if missing == [ADAPTER_WEIGHTS] and "adapter_model.bin" in names:
    problems = [
      "its weights are the pickle adapter_model.bin, which is not read: load it with peft and save it again, as "
      f"{ADAPTER_WEIGHTS}"
    ]
  if problems:
    raise CheckpointError(files.path, problems)
  return files


class _Reading:
  """One reading of an adapter: which tensors are left, and which problems were found."""

  def __init__(self, files: Files, settings: PeftConfig, family: Family, config: Any):
    self.files, self.settings, self.family, self.config = files, settings, family, config
    self.table = with_head(family.huggingface)
    self.letters = letter_sizes(config)
    self.shapes = _shapes(family, config)
    self.embedding, self.head = twins_of(self.table)
    # A head that is the embedding has no parameter, but it is a module in transformers, with an adapter of its own.
    self.is_tied = bool(self.head) and self.embedding in self.shapes and self.head not in self.shapes
    if self.is_tied:
      self.shapes[self.head] = self.shapes[self.embedding]
    self.left, self.body = _with_body(_read_arrays(files), self.table)
    # Factors of tensors that hold the matrices of several parameters, such as gate and up.
    self.fused: dict[str, np.ndarray] = {}
    # The form in which each parameter's factors were found.
    self.found: dict[str, Matrices] = {}
    self.mis_shaped: list[str] = []
    self.problems: list[str] = []

  @functools.cached_property
  def vocabulary(self) -> frozenset[str]:
    """Names of the parameters whose first axis is that of the vocabulary; the first use builds a model of another size."""
    own = vocabulary_parameters(self.family, self.config, self.shapes)
    return own | ({self.head} if self.is_tied else set())

  def adapter(self) -> Adapter:
    """Reads everything.

    Raises:
      AdapterError: with all problems.
    """
    if not self.left:
      raise AdapterError(
        f"{self.files.path}: {ADAPTER_WEIGHTS} holds no tensors, although {ADAPTER_CONFIG} says "
        f"{self.settings.targets.stated}: it was probably saved without gathering the weights (DeepSpeed ZeRO-3, FSDP); "
        "save it again from the gathered weights"
      )
    self._drop_unread()
    adapted = {name.partition(".lora_")[0] for name in self.left if ".lora_" in name}
    whole = self._whole(adapted)
    vocab_size = self._vocab_size(whole)
    factors = self._factors()
    rows = self._rows()
    shifts = self._shifts()
    self._check_expected(whole, rows)
    if left := sorted(name.removeprefix(self.body) for name in self.left):
      self.problems.append(f"the model has nothing that these tensors belong to: {_few(left)}")
    if self.mis_shaped:
      more = len(self.mis_shaped) - 1
      rest = f" ({more} more tensors do not fit either)" if more else ""
      self.problems.insert(0, self.mis_shaped[0] + rest)
    self._raise()
    adapter = with_defaults(
      Adapter(factors, self.settings.alpha_of(""), self.settings.rank, whole, rows, shifts, vocab_size)
    )
    adapter = self._tied(adapter) if self.is_tied else adapter
    check_factors(adapter, self.table, self.shapes)
    return adapter

  def _raise(self) -> None:
    if len(self.problems) == 1:
      raise AdapterError(f"{self.files.path}: {self.problems[0]}")
    if self.problems:
      raise AdapterError("\n  - ".join([f"{self.files.path}: {len(self.problems)} problems", *self.problems]))

  def _real(self, module: str) -> str:
    """The name of a module in the model that was trained."""
    return module.removeprefix(self.body)

  def _drop_unread(self) -> None:
    """Leaves out what the model leaves out of its base, and says so in the log."""
    reasons: collections.Counter[str] = collections.Counter()
    for name in list(self.left):
      module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
      tensor = module.removesuffix(BASE_LAYER) + ".weight"
      if reason := next((row.reason for row in self.table.ignored if matches(row.pattern, tensor)), None):
        reasons[reason] += 1
        del self.left[name]
      elif any(part in name for part in _TRAINING):
        del self.left[name]
    for reason, count in reasons.items():
      _log.warning("%s: %d tensor%s not loaded: %s", self.files.path, count, "s" * (count != 1), reason)

  def _take(self, *names: str) -> np.ndarray | None:
    """The first of some tensors that is there, which is then accounted for."""
    return next((self.left.pop(name) for name in names if name in self.left), None)

  def _whole(self, adapted: set[str]) -> dict[str, np.ndarray]:
    """Parameters that are stored whole, by name.

    Args:
      adapted: names of the modules that have factors; the weight of such a module is that of its base layer.
    """
    found: dict[str, np.ndarray] = {}
    for name, shape in self.shapes.items():
      row, at = find_row(self.table, name)
      for form in row.forms:
        parts = pieces(row, form, at, shape, self.letters)
        stored = [next((s for s in _stored(p.tensor, adapted) if s in self.left), None) for p in parts]
        if all(one is None for one in stored):
          continue
        if None in stored:
          absent = parts[stored.index(None)].tensor
          self.problems.append(
            f"{absent} is missing: the adapter must replace all of {name} or nothing of it"
          )
          continue
        arrays = [self.left.pop(one) for one in stored if one is not None]
        if name in self.vocabulary and arrays[0].ndim == len(shape):
          shape = (arrays[0].shape[0], *shape[1:])
          parts = pieces(row, form, at, shape, self.letters)
        if self._fits([(p.tensor, a, p.shape) for p, a in zip(parts, arrays, strict=True)]):
          found[name] = _assembled(arrays, parts, shape)
    return found

  def _fits(self, tensors: Sequence[tuple[str, np.ndarray, tuple[int, ...]]]) -> bool:
    """Whether tensors have the shapes that the model needs; those that have not are noted."""
    wrong = [(name, data.shape, needed) for name, data, needed in tensors if data.shape != needed]
    for name, shape, needed in wrong:
      why = ": it was saved without gathering the weights (DeepSpeed ZeRO-3, FSDP)" if 0 in shape else ""
      self.mis_shaped.append(f"{self._real(name)} has shape {shape}, but the model needs {needed}{why}")
    return not wrong

  def _vocab_size(self, whole: Mapping[str, np.ndarray]) -> int | None:
    """The size of the vocabulary, if the adapter changes it; the shapes of the model's parameters change with it."""
    sizes = {name: whole[name].shape[0] for name in self.shapes if name in whole and name in self.vocabulary}
    if len(set(sizes.values())) > 1:
      stated = ", ".join(f"{name} {size}" for name, size in sizes.items())
      self.problems.append(f"it holds embeddings and heads of different vocabularies: {stated} rows")
    if not sizes or set(sizes.values()) == {self.shapes[name][0] for name in self.vocabulary}:
      return None
    size = next(iter(sizes.values()))
    for name in self.vocabulary:
      self.shapes[name] = (size, *self.shapes[name][1:])
    return size

  def _factors(self) -> dict[str, Factors]:
    """Factors, by the name of the parameter."""
    found: dict[str, Factors] = {}
    for name, shape in self.shapes.items():
      for matrices in matrices_of(self.table, name, shape):
        factors = self._fused(matrices) if matrices.modules is None else self._separate(matrices)
        if factors is not None:
          found[name], self.found[name] = factors, matrices
    return found

  def _fused(self, matrices: Matrices) -> Factors | None:
    """Factors of a part of a tensor that holds the matrices of all experts."""
    row, at = find_row(self.table, matrices.parameter)
    fused = pieces(row, matrices.form, at, matrices.shape, self.letters)[0]
    rank = self.settings.rank_of(self._real(fused.tensor))
    module = _module_of_fused(self.left | self.fused, fused, rank)
    if module is None:
      return None
    for side in SIDES:
      if module + side in self.left:
        self.fused[module + side] = self.left.pop(module + side)
    if self.settings.initial is not None:
      self._refuse_initial(fused.tensor)
    a, b = _from_fused([self.fused[module + side] for side in SIDES], fused, matrices, rank)
    return Factors(a, b, self.settings.alpha_of(self._real(fused.tensor)))

  def _separate(self, matrices: Matrices) -> Factors | None:
    """Factors of a parameter whose matrices are modules of their own."""
    assert matrices.modules is not None
    modules = list(matrices.modules.values())
    wanted = [module + side for module in modules for side in matrices.sides]
    if not any(tensor in self.left for tensor in wanted):
      return None
    name, sizes, own = matrices.parameter, matrices.sizes, matrices.roles
    # Also if they do not fit: then they are not missing.
    self.found[name] = matrices
    if absent := [tensor for tensor in wanted if tensor not in self.left]:
      self.problems.append(
        f"{self._real(absent[0])} is missing: the adapter must change all of {name} or nothing of it"
      )
      for tensor in wanted:
        self.left.pop(tensor, None)
      return None
    real = [self._real(module) for module in modules]
    ranks, alphas = {self.settings.rank_of(m) for m in real}, {self.settings.alpha_of(m) for m in real}
    if len(ranks) > 1 or len(alphas) > 1:
      self.problems.append(
        f"the matrices of {name} have several ranks or alphas: ranks {sorted(ranks)}, alphas {sorted(alphas)}; merge "
        "the adapter with peft"
      )
    rank = ranks.pop()
    needed = ((rank, sizes[own.input]), (sizes[own.output], rank))
    if matrices.is_embedding:
      needed = ((rank, sizes[own.output]), (sizes[own.input], rank))
    arrays = [self.left.pop(tensor) for tensor in wanted]
    shapes = [needed[number % 2] for number in range(len(wanted))]
    magnitude = self._magnitude(matrices)
    if not self._fits(list(zip(wanted, arrays, shapes, strict=True))):
      return None
    a, b = (np.stack([data.T for data in arrays[side::2]]) for side in range(2))
    if matrices.is_embedding:
      a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    experts = tuple(sizes[axis] for axis in own.experts)
    a, b = (factor.reshape(*experts, *factor.shape[1:]) for factor in (a, b))
    return Factors(a, b, alphas.pop(), magnitude, self._initial(matrices))

  def _initial(self, matrices: Matrices) -> str | None:
    """The initialisation of a parameter's factors, if it changed the base."""
    if self.settings.initial is None:
      return None
    if matrices.is_embedding or matrices.roles.experts:
      self._refuse_initial(matrices.parameter)
    return self.settings.initial

  def _refuse_initial(self, name: str) -> None:
    self.problems.append(
      f"init_lora_weights={self.settings.initial!r} of {name} is not supported: merge the adapter with peft"
    )

  def _magnitude(self, matrices: Matrices) -> np.ndarray | None:
    """DoRA's magnitudes of a parameter: one for each row of a matrix, or for each column of an embedding."""
    if not self.settings.dora:
      return None
    assert matrices.modules is not None
    own, sizes = matrices.roles, matrices.sizes
    kept = own.input if matrices.is_embedding else own.output
    found = []
    for module in matrices.modules.values():
      data = self._take(module + MAGNITUDE, f"{module}{MAGNITUDE}.weight")
      if data is None:
        self.problems.append(f"{self._real(module)}{MAGNITUDE} is missing, although use_dora is true")
      elif self._fits([(module + MAGNITUDE, data, (sizes[kept],))]):
        found.append(data)
    if len(found) < len(matrices.modules):
      return None
    shape = tuple(sizes[axis] if axis in own.experts + kept else 1 for axis in own.axes)
    return np.stack(found).reshape(shape)

  def _rows(self) -> dict[str, Rows]:
    """Rows of embeddings that are replaced, by the name of the parameter."""
    found: dict[str, Rows] = {}
    for name in (self.embedding, self.head):
      for matrices in matrices_of(self.table, name, self.shapes[name]) if name in self.shapes else ():
        assert matrices.modules is not None
        (module,) = matrices.modules.values()
        indices = next(
          (i for end, i in self.settings.tokens.items() if self._real(module).endswith(end)), None
        )
        if indices is None or (values := self._take(module + ROWS)) is None:
          continue
        if self._fits([(module + ROWS, values, (len(indices), *matrices.shape[1:]))]):
          found[name] = Rows(indices, values)
    return found

  def _shifts(self) -> dict[str, np.ndarray]:
    """What is added to biases, by the name of the bias."""
    if not self.settings.lora_bias:
      return {}
    found: dict[str, np.ndarray] = {}
    biases = {
      form.name.format(**at).removesuffix(".bias"): name
      for name in self.shapes
      for row, at in [find_row(self.table, name)]
      for form in row.forms
      if form.name.endswith(".bias")
    }
    without: list[str] = []
    for matrices in self.found.values():
      for module in (matrices.modules or {}).values():
        data = self._take(module + SHIFT)
        if data is None:
          self.problems.append(f"{self._real(module)}{SHIFT} is missing, although lora_bias is true")
        elif module not in biases:
          without.append(self._real(module))
        elif self._fits([(module + SHIFT, data, self.shapes[biases[module]])]):
          scale = self.settings.alpha_of(self._real(module)) / self.settings.rank_of(self._real(module))
          found[biases[module]] = data.astype(np.float32) * np.float32(scale)
    if without:
      self.problems.append(
        f"lora_bias is true, but the model has no bias to add it to, so that it cannot be merged: {_few(without)}"
      )
    return found

  def _check_expected(self, whole: Mapping[str, Any], rows: Mapping[str, Rows]) -> None:
    """Compares what was found with what adapter_config.json says was adapted."""
    settings, targets = self.settings, self.settings.targets
    present: set[str] = set()
    too_few: list[str] = []
    too_many: list[str] = []
    not_whole: list[str] = []
    for name, shape in self.shapes.items():
      # A head that stays tied has what the embedding has, whether it is named or not.
      follows = settings.keeps_tie and self.is_tied and name == self.head
      if name in self.found:
        targeted, module = self._is_targeted(self.found[name])
        present.add(module)
        if not targeted and not (follows and self.embedding in self.found):
          too_many.append(module)
      elif not follows:
        too_few += self._lacking(name, shape)
      tensor = self._usual_tensor(name, shape)
      if name not in whole and self._is_wanted_whole(name, tensor):
        not_whole.append(tensor)
    too_few, too_many, not_whole = (list(dict.fromkeys(names)) for names in (too_few, too_many, not_whole))
    # Factors under names that the model does not have are not missing, too.
    if too_few and (self.found or not any(".lora_" in name for name in self.left)):
      some = f"{len(too_few)} of the {len(present) + len(too_few)} modules" if present else "all modules"
      self.problems.append(
        f"{ADAPTER_WEIGHTS} lacks the factors of {some} that {targets.stated} names: {_few(too_few)}; save the adapter "
        "again, from gathered weights"
      )
    if too_many:
      self.problems.append(
        f"{ADAPTER_WEIGHTS} has factors of modules that {targets.stated} does not name, which peft would not load: "
        f"{_few(too_many)}; correct {ADAPTER_CONFIG}"
      )
    if not_whole:
      biases = [tensor for tensor in not_whole if tensor.endswith(".bias")]
      why = (
        f"bias={settings.bias!r}"
        if len(biases) == len(not_whole)
        else f"modules_to_save={list(settings.modules_to_save)}"
      )
      self.problems.append(
        f"{ADAPTER_WEIGHTS} lacks tensors that {why} names: {_few(not_whole)}; save the adapter again with a newer peft, or "
        f"take them out of {ADAPTER_CONFIG} if the base's are meant"
      )
    if settings.tokens and not rows:
      self.problems.append(
        f"{ADAPTER_WEIGHTS} lacks the rows of the embedding that trainable_token_indices names: save the adapter again"
      )

  def _lacking(self, name: str, shape: tuple[int, ...]) -> list[str]:
    """The module of a parameter without factors, if adapter_config.json says that it has some."""
    for matrices in matrices_of(self.table, name, shape):
      usual = find_row(self.table, name)[0].forms[self._usual_form(name)]
      targeted, module = self._is_targeted(matrices)
      # Which of the experts and the router are linear layers depends on the version of transformers.
      optional = self.settings.targets.all_linear and bool(matrices.roles.experts or ".router." in name)
      if matrices.form is usual and targeted and not optional:
        return [module]
    return []

  def _usual_form(self, name: str) -> int:
    """Which form a parameter would have in this adapter: that of most parameters with as many forms."""
    votes = self._votes[len(find_row(self.table, name)[0].forms)]
    return votes.most_common(1)[0][0] if votes else 0

  @functools.cached_property
  def _votes(self) -> Mapping[int, collections.Counter[int]]:
    """How many parameters were found in which form, by the number of forms that they may have."""
    votes: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for name, matrices in self.found.items():
      forms = find_row(self.table, name)[0].forms
      votes[len(forms)][forms.index(matrices.form)] += 1
    return votes

  def _usual_tensor(self, name: str, shape: tuple[int, ...]) -> str:
    """The name that a parameter's first tensor would have in this adapter."""
    row, at = find_row(self.table, name)
    return self._real(pieces(row, row.forms[self._usual_form(name)], at, shape, self.letters)[0].tensor)

  def _is_wanted_whole(self, name: str, tensor: str) -> bool:
    """Whether adapter_config.json says that a tensor is stored whole."""
    settings, (module, _, leaf) = self.settings, tensor.rpartition(".")
    if settings.is_saved_whole(module):
      return not (settings.keeps_tie and self.is_tied and name == self.head)
    adapted = any(
      module == self._real(m) for one in self.found.values() for m in (one.modules or {}).values()
    )
    return leaf == "bias" and (settings.bias == "all" or (settings.bias == "lora_only" and adapted))

  def _is_targeted(self, matrices: Matrices) -> tuple[bool, str]:
    """Whether adapter_config.json says that a parameter was adapted, and the name of its first module or tensor."""
    targets = self.settings.targets
    if matrices.modules is None:
      row, at = find_row(self.table, matrices.parameter)
      tensor = self._real(pieces(row, matrices.form, at, matrices.shape, self.letters)[0].tensor)
      # If target_modules names the experts' modules, peft makes names of tensors of them when it loads the model.
      separate = [
        m for m in matrices_of(self.table, matrices.parameter, matrices.shape) if m.modules is not None
      ]
      return targets.has_parameter(tensor) or any(self._is_targeted(m)[0] for m in separate), tensor
    real = [self._real(module) for module in matrices.modules.values()]
    kind = {"is_embedding": matrices.is_embedding, "is_head": matrices.is_head}
    targeted = any(targets.has_module(m, **kind) or targets.has_parameter(f"{m}.weight") for m in real)
    return targeted, real[0]

  def _tied(self, adapter: Adapter) -> Adapter:
    """An adapter of a model whose head is the embedding: for both of them, or for one that is taken apart.

    Raises:
      AdapterError: if it has to be taken apart, and the family's models have no head of their own.
    """
    changes = (adapter.factors, adapter.whole, adapter.rows)
    saved = self._is_wanted_whole(
      self.embedding, self._usual_tensor(self.embedding, self.shapes[self.embedding])
    )
    of_head = any(self.head in one and not _same(one.get(self.embedding), one[self.head]) for one in changes)
    of_embedding = not self.settings.keeps_tie and any(
      self.embedding in one and self.head not in one
      for one in (adapter.factors, *([adapter.whole] if saved else []))
    )
    if not of_head and not of_embedding:
      factors, whole, rows = dict(adapter.factors), dict(adapter.whole), dict(adapter.rows)
      for named in (factors, whole, rows):
        named.pop(self.head, None)
      return dataclasses.replace(adapter, factors=factors, whole=whole, rows=rows)
    if untied_config(self.config) is None:
      raise AdapterError(
        f"{self.files.path}: it changes the embedding or the head alone, and {self.family.name} models have one matrix for "
        "both: merge it with peft into a model that was loaded with tie_word_embeddings=False"
      )
    # What is stored once for both belongs to the head, too.
    whole, rows = dict(adapter.whole), dict(adapter.rows)
    if self.embedding in whole and not saved:
      whole.setdefault(self.head, whole[self.embedding])
    if self.embedding in rows:
      rows.setdefault(self.head, rows[self.embedding])
    return dataclasses.replace(adapter, whole=whole, rows=rows, unties=True)


def _same(one: Any, another: Any) -> bool:
  """Whether two changes of parameters hold the same numbers."""
  leaves = [jax.tree.leaves(_plain(change)) for change in (one, another)]
  return len(leaves[0]) == len(leaves[1]) and all(map(np.array_equal, *leaves))


def _plain(change: Any) -> Any:
  return vars(change) if isinstance(change, (Factors, Rows)) else change


def _few(names: Sequence[str]) -> str:
  return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _stored(tensor: str, adapted: Collection[str]) -> list[str]:
  """The names under which peft may store a whole tensor.

  Args:
    tensor: its name in the checkpoint.
    adapted: names of the modules that have factors; their weights are those of a base layer.
  """
  module, _, leaf = tensor.rpartition(".")
  base = f"{module}{BASE_LAYER}.{leaf}"
  if module in adapted:
    return [base, tensor] if leaf == "bias" else [base]
  return [tensor, f"{module}.modules_to_save.{leaf}"]


def _assembled(arrays: Sequence[np.ndarray], parts: Sequence[Piece], shape: tuple[int, ...]) -> np.ndarray:
  """A parameter from the tensors that hold it."""
  if len(parts) == 1:
    return arrange(arrays[0], parts[0], shape)
  result = np.empty(shape, arrays[0].dtype)
  for data, piece in zip(arrays, parts, strict=True):
    result[piece.target] = arrange(data, piece, part_shape(piece, shape))
  return result


def _read_arrays(files: Files) -> dict[str, np.ndarray]:
  """All tensors of the adapter by name, without the prefix that peft puts before the names."""
  checkpoint = read_safetensors_file(files, ADAPTER_WEIGHTS)
  if not checkpoint.tensors:
    return {}
  with contextlib.closing(checkpoint.open([ADAPTER_WEIGHTS])) as reader:
    arrays = {
      info.name.removeprefix(PREFIX): np.array(reader.read_box(info, info.everything))
      for info in checkpoint.tensors.values()
    }
  # Beside a module that is stored whole, some versions store what it replaces, and the same tensor twice.
  for name in list(arrays):
    for part in (".original_module.", ".modules_to_save."):
      if part in name and name.replace(part, ".") in arrays:
        del arrays[name]
  return arrays


def _with_body(arrays: Mapping[str, np.ndarray], table: WeightTable) -> tuple[dict[str, np.ndarray], str]:
  """Tensors under the names of a model with a head, and what was put before the names.

  A base class of transformers has no head, and its modules have shorter names.
  """
  weights = [f"{name.partition('.lora_')[0]}.weight" for name in arrays if ".lora_" in name]
  body = max(("", _BODY), key=lambda prefix: table.known([prefix + name for name in weights]))
  return {body + name: data for name, data in arrays.items()}, body


def _shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of the model's parameters, by name."""
  return {name: p.shape for name, p in abstract_model(family.model_class, config).parameters.items()}


def _module_of_fused(arrays: Mapping[str, np.ndarray], fused: Piece, rank: int) -> str | None:
  """The name under which peft stores the factors of a tensor that holds all experts; None if there are none.

  It is that of the module which the tensor belongs to. If several tensors of one module are adapted, peft nests them:
  `experts`, `experts.base_layer` and so on. The shapes of the factors tell which one belongs to the tensor.
  """
  if len(fused.shape) != 3:
    return None
  E, out, into = fused.shape
  module = fused.tensor.rpartition(".")[0]
  while all(module + side in arrays for side in SIDES):
    if [arrays[module + side].shape for side in SIDES] == [(E * rank, into), (out, rank * E)]:
      return module
    module += BASE_LAYER
  return None


def _from_fused(
  tensors: Sequence[np.ndarray], fused: Piece, matrices: Matrices, rank: int
) -> tuple[np.ndarray, np.ndarray]:
  """The factors of a parameter that is a part of a fused tensor [E, out, in]: all of A, and that part of B's rows."""
  own, sizes = matrices.roles, matrices.sizes | {"r": rank}
  a, b = tensors
  # The first axis of the tensor is that of the experts, the last one is the input.
  outputs = slice(1, len(fused.split) - 1)
  b = b.reshape(*fused.split[outputs], rank, -1)[fused.select[outputs]]
  theirs = (own.experts + "r" + own.input, own.output + "r" + own.experts)
  full = (tuple(sizes[axis] for axis in axes) for axes in theirs)
  a, b = (data.reshape(size) for data, size in zip((a, b), full, strict=True))
  return _transposed(a, theirs[0], own.a), _transposed(b, theirs[1], own.b)


def _transposed(data: np.ndarray, old: str, new: str) -> np.ndarray:
  """Reorders axes, named by letters: from "rd" to "dr"."""
  return data.transpose([old.index(axis) for axis in new])
