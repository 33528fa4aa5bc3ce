"""adapter_config.json of the library `peft`: each key is used, known to be harmless, or refused by name.

peft ignores keys that it does not know; here they are refused, since a newer version may have given them a meaning.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from models_core.adapters.initial import INITIAL
from models_core.adapters.targets import Targets, module_pattern
from models_core.errors import AdapterError, CheckpointError, ConfigError
from models_core.formats import Files, read_json

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Why no merged weight depends on them -> keys.
_HARMLESS = {
  "provenance; auto_map and the like name code that is not run": "auto_mapping peft_version task_type",
  "training, and how the factors were initialised if init_lora_weights names it": """
    corda_config eva_config inference_mode loftq_config lora_dropout lora_ga_config merge_weights monteclora_config
    velora_config
  """,
  "layers of Megatron, and weights of other libraries' layouts, which these models do not have": """
    fan_in_fan_out megatron_config megatron_core qalora_group_size
  """,
  "where and in which type peft computes": "lora_dtype runtime_config",
  "learning rates of other trainers": """
    lorap_emb_lr lorap_lr_ratio loraplus_lr_embedding loraplus_lr_ratio
  """,
}
# Keys that make another computation of an adapter, and what to do instead.
_REFUSED = {
  "alora_invocation_tokens": "its changes begin at certain tokens, so that no weights have them",
  "arrow_config": "it chooses between adapters for each token, so that no weights have it",
  "enable_lora": "it is of a layer that joins several projections, which these models do not have",
  "kasa_config": "it also removes singular values of the base",
  "layer_replication": "it repeats layers of the base",
  "use_bdlora": "its factors are block-diagonal",
  "use_qalora": "its factors belong to groups of a quantised base",
}
_REMEDY = "merge it with peft (merge_and_unload) and load the merged model, or train a plain LoRA adapter"
# Values of init_lora_weights that leave the base as it is.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Those that change the base by numbers that nothing stores.
_LOST_STARTS = ("corda", "lora_ga", "loftq", "pissa_niter_")
# What a key may hold without saying anything.
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")

_READ = """
  alpha_pattern base_model_name_or_path bias ensure_weight_tying exclude_modules init_lora_weights layers_pattern
  layers_to_transform lora_alpha lora_bias modules_to_save peft_type r rank_pattern revision target_modules
  target_parameters trainable_token_indices use_dora use_rslora
"""
_KNOWN = frozenset([*_READ.split(), *_REFUSED, *(key for keys in _HARMLESS.values() for key in keys.split())])


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """What adapter_config.json says about an adapter.

  Attributes:
    where: path of the file, for messages.
    base_model: repository or directory of the model that the adapter changes; None if it is not stated.
    revision: its branch, tag or commit; None if it is not stated.
    rank: the rank of modules that no pattern names.
    alpha: LoRA's scale alpha of modules that no pattern names.
    rank_pattern: ranks by patterns of modules' names.
    alpha_pattern: alphas by patterns of modules' names.
    rslora: whether the product of the factors is multiplied by alpha / sqrt(rank) instead of alpha / rank.
    targets: which modules have factors.
    modules_to_save: ends of the names of modules that are stored whole.
    tokens: rows that are replaced, by the end of the module's name.
    bias: which biases are stored whole: "none", "all", or "lora_only", those of modules with factors.
    lora_bias: whether the second factor has a bias.
    dora: whether there are magnitudes.
    initial: the initialisation that changed the base, a key of `INITIAL`, or None.
    keeps_tie: whether a head that is the embedding stays so.
  """

  where: str
  base_model: str | None
  revision: str | None
  rank: int
  alpha: float
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]
  rslora: bool
  targets: Targets
  modules_to_save: tuple[str, ...]
  tokens: Mapping[str, tuple[int, ...]]
  bias: str
  lora_bias: bool
  dora: bool
  initial: str | None
  keeps_tie: bool

  def rank_of(self, module: str) -> int:
    """The rank of a module's factors."""
    return _by_pattern(self.rank_pattern, module, self.rank)

  def alpha_of(self, module: str) -> float:
    """The alpha of a module's factors, with which their product is multiplied by alpha / rank."""
    alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
    return alpha * math.sqrt(self.rank_of(module)) if self.rslora else alpha

  def is_saved_whole(self, module: str) -> bool:
    """Whether a module, or one that it is a part of, is stored whole."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(name.endswith(end) for name in names for end in self.modules_to_save)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """The value of the first pattern that matches the end of a module's name, as peft looks it up."""
  for key, value in patterns.items():
    if module_pattern(key).match(module):
      return value
  return default


def read_peft_config(files: Files) -> PeftConfig:
  """Reads adapter_config.json.

  Args:
    files: of the adapter.

  Raises:
    AdapterError: if the adapter is of a kind that is not supported, or a key is unknown or has no valid value.
    CheckpointError: if the file is not valid JSON.
  """
  where = f"{files.path}/{ADAPTER_CONFIG}"
  try:
    raw = read_json(files, ADAPTER_CONFIG)
  except ConfigError as error:
    raise CheckpointError(files.path, [str(error)]) from None
  keys = _Keys(where, raw)
  kind = keys.take("peft_type", "LORA")
  if kind != "LORA":
    raise AdapterError(f"{where}: peft_type={kind!r} is not supported: {_REMEDY}")
  if problems := [*_refused(raw), *_unknown(raw)]:
    raise AdapterError("\n  - ".join([f"{where}: {_count(len(problems))}", *problems]))
  alpha, rank = keys.number("lora_alpha", 8), keys.rank("r", keys.take("r", 8))
  patterns = {key: keys.mapping(key) for key in ("rank_pattern", "alpha_pattern")}
  for key, pattern in patterns.items():
    for module in pattern:
      keys.check_pattern(key, module)
  return PeftConfig(
    where,
    keys.text("base_model_name_or_path"),
    keys.text("revision"),
    rank,
    alpha,
    {module: keys.rank(f"rank_pattern[{module!r}]", r) for module, r in patterns["rank_pattern"].items()},
    {module: keys.finite(f"alpha_pattern[{module!r}]", a) for module, a in patterns["alpha_pattern"].items()},
    keys.flag("use_rslora"),
    _targets(keys),
    keys.names("modules_to_save") or (),
    _tokens(keys),
    keys.one_of("bias", "none", "all", "lora_only"),
    keys.flag("lora_bias"),
    keys.flag("use_dora"),
    _initial(keys),
    keys.flag("ensure_weight_tying"),
  )


def _refused(raw: Mapping[str, Any]) -> list[str]:
  """One sentence for each key that makes another kind of adapter."""
  found = [key for key in _REFUSED if raw.get(key) not in _EMPTY]
  return [f"{key}={raw[key]!r} is not supported, since {_REFUSED[key]}: {_REMEDY}" for key in found]


def _unknown(raw: Mapping[str, Any]) -> list[str]:
  """One sentence for all keys that nobody knows and that say something."""
  left = sorted(key for key, value in raw.items() if key not in _KNOWN and value not in _EMPTY)
  if not left:
    return []
  stated = ", ".join(f"{key}={raw[key]!r}" for key in left)
  return [
    f"{stated}: not known. If the merged weights do not depend on it, remove it from {ADAPTER_CONFIG}; otherwise "
    f"{_REMEDY}"
  ]


def _count(number: int) -> str:
  return "1 problem" if number == 1 else f"{number} problems"


def _initial(keys: _Keys) -> str | None:
  """The initialisation that changed the base, if any.

  Raises:
    AdapterError: if the change cannot be computed from the base.
  """
  start = keys.take("init_lora_weights", True)
  name = start.lower() if isinstance(start, str) else start
  if isinstance(name, str) and name in INITIAL:
    return name
  if any(name is plain or (isinstance(name, str) and name == plain) for plain in _PLAIN_STARTS):
    return None
  if isinstance(name, str) and name.startswith(_LOST_STARTS):
    raise AdapterError(
      f"{keys.where}: init_lora_weights={start!r} is not supported, since it changed the base by numbers that the "
      "adapter does not hold: save the adapter with peft's path_initial_model_for_weight_conversion, which makes a "
      "plain one of it, or load the changed base that it was trained on"
    )
  raise AdapterError(f"{keys.where}: init_lora_weights={start!r} is not known: {_REMEDY}")


def _targets(keys: _Keys) -> Targets:
  layers = keys.take("layers_to_transform", None)
  single = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers
  if single is not None and (
    not isinstance(single, list) or any(not isinstance(n, int) or isinstance(n, bool) for n in single)
  ):
    raise AdapterError(f"{keys.where}: layers_to_transform is {layers!r}, expected whole numbers")
  targets = Targets(
    keys.names_or_pattern("target_modules"),
    keys.names_or_pattern("exclude_modules"),
    None if not single else tuple(single),
    tuple(_listed(keys.names_or_pattern("layers_pattern"))),
    keys.names("modules_to_save") or (),
    keys.names("target_parameters") or (),
  )
  for key, patterns in (
    ("target_modules", [targets.modules] if isinstance(targets.modules, str) else []),
    ("exclude_modules", [targets.excluded] if isinstance(targets.excluded, str) else []),
    ("layers_pattern", targets.layers_pattern),
    ("modules_to_save", targets.saved),
  ):
    for pattern in patterns:
      keys.check_pattern(key, pattern)
  return targets


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if not value else (value,) if isinstance(value, str) else value


def _tokens(keys: _Keys) -> dict[str, tuple[int, ...]]:
  value = keys.take("trainable_token_indices", None)
  if not value:
    return {}
  by_module = value if isinstance(value, Mapping) else {"embed_tokens": value}
  for indices in by_module.values():
    if not isinstance(indices, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
      raise AdapterError(
        f"{keys.where}: trainable_token_indices is {value!r}, expected lists of whole numbers"
      )
  return {module: tuple(indices) for module, indices in by_module.items()}


@dataclasses.dataclass(frozen=True)
class _Keys:
  """The keys of adapter_config.json, with the types that they must have."""

  where: str
  raw: Mapping[str, Any]

  def take(self, key: str, default: Any) -> Any:
    """A key's value as it is."""
    return self.raw.get(key, default)

  def _typed(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
    value = self.raw.get(key)
    if value is not None and not fits(value):
      raise AdapterError(f"{self.where}: {key} is {value!r}, expected {expected}")
    return default if value is None else value

  def flag(self, key: str) -> bool:
    """True or false; false where it is missing."""
    return self._typed(key, False, lambda value: isinstance(value, bool), "true or false")

  def text(self, key: str) -> str | None:
    """A text; None where it is missing or empty."""
    return self._typed(key, None, lambda value: isinstance(value, str), "a text") or None

  def one_of(self, key: str, *values: str) -> str:
    """One of some values, the first where it is missing."""
    return self._typed(key, values[0], lambda value: value in values, " or ".join(map(repr, values)))

  def mapping(self, key: str) -> Mapping[str, Any]:
    """An object; empty where it is missing."""
    return self._typed(key, {}, lambda value: isinstance(value, Mapping), "an object")

  def names(self, key: str) -> tuple[str, ...] | None:
    """A list of texts; None where it is missing."""
    value = self._typed(key, None, _is_names, "a list of names")
    return None if value is None else tuple(value)

  def names_or_pattern(self, key: str) -> tuple[str, ...] | str | None:
    """A list of texts, or one text; None where it is missing."""
    fits = lambda value: isinstance(value, str) or _is_names(value)
    value = self._typed(key, None, fits, "a list of names or a regular expression")
    return tuple(value) if isinstance(value, list) else value

  def number(self, key: str, default: float) -> float:
    """A finite number."""
    return self.finite(key, self.take(key, default))

  def finite(self, what: str, value: Any) -> float:
    """Checks a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
      raise AdapterError(f"{self.where}: {what} is {value!r}, expected a finite number")
    return value

  def rank(self, what: str, value: Any) -> int:
    """Checks a rank."""
    if type(value) is not int or value < 1:
      raise AdapterError(f"{self.where}: {what} is {value!r}, expected a positive whole number")
    return value

  def check_pattern(self, key: str, pattern: str) -> None:
    """Checks a regular expression."""
    try:
      re.compile(pattern)
    except re.error as error:
      raise AdapterError(
        f"{self.where}: {key} has {pattern!r}, which is no regular expression: {error}"
      ) from None


def _is_names(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(name, str) for name in value)
