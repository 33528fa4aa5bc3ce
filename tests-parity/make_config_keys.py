"""Writes the keys that the configurations of the installed transformers have, into models-core.

A key of config.json that one architecture does not read may change the numbers of another. The file holds, for each
version: key -> [a model_type that has it, its neutral values...]. A default is neutral if it switches something off:
false, 0, an empty text, list or object, and 1 where the key is a factor. 0 is neutral where the key counts parts. One run
for each version that the file holds, each without torch: 4.57.1 and 5.24.0.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
import re
from collections.abc import Iterator

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FILE = (
  pathlib.Path(__file__).parents[1] / "packages/models-core/src/models_core/config/transformers_keys.json"
)
VERSION = transformers.__version__

FACTOR = re.compile(r"(^|_)(multiplier|factor|scale|scaling|mult)$")
COUNT = re.compile(r"^(n|num)_|_(experts|rank)$")
# Factors that replace another one: 1 changes the numbers, too.
NEVER_NEUTRAL = ("attention_multiplier",)


def _classes() -> set[type]:
  """The configurations of all architectures, and those that they hold."""
  found: set[type] = set()
  todo = [CONFIG_MAPPING[model_type] for model_type in CONFIG_MAPPING.keys()]  # noqa: SIM118 - lazy, and no dict
  while todo:
    if (one := todo.pop()) in found:
      continue
    found.add(one)
    parts = getattr(one, "sub_configs_defaults", None) or getattr(one, "sub_configs", None)
    parts = list(parts.values()) if isinstance(parts, dict) else []
    parts = [getattr(part, "config_class", part) for part in parts]
    todo += [part for part in parts if inspect.isclass(part) and issubclass(part, PretrainedConfig)]
  return {one for one in found if one is not PretrainedConfig and inspect.isclass(one)}


def _fields(one: type) -> Iterator[tuple[str, object]]:
  """Keys of a configuration with their defaults; those of the base class, and None where there is no default, too."""
  if dataclasses.is_dataclass(PretrainedConfig):
    for field in dataclasses.fields(one):
      made = field.default_factory
      default = field.default if made is dataclasses.MISSING else made()
      yield field.name, None if default is dataclasses.MISSING else default
  else:
    for base in one.__mro__[: one.__mro__.index(PretrainedConfig) + 1]:
      for name, parameter in inspect.signature(base.__init__).parameters.items():
        if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
          yield name, None if parameter.default is parameter.empty else parameter.default
  for alias in getattr(one, "attribute_map", {}):
    yield alias, None


def _neutral(key: str, default: object) -> bool:
  if isinstance(default, (bool, str, list, tuple, dict)):
    return not default
  if default is None or not isinstance(default, (int, float)):
    return False
  return default == 0 or (default == 1 and bool(FACTOR.search(key)) and key not in NEVER_NEUTRAL)


def keys() -> dict[str, list]:
  """What the file holds for the installed version."""
  generic = {name for name, _ in _fields(PretrainedConfig)}
  found: dict[str, tuple[str, set[str]]] = {}
  for one in sorted(_classes(), key=lambda one: (one.model_type or "~", one.__name__)):
    for key, default in _fields(one):
      if key not in generic:
        _, neutral = found.setdefault(key, (one.model_type or one.__name__, set()))
        values = (default, 0) if COUNT.search(key) else (default,)
        neutral |= {json.dumps(value) for value in values if _neutral(key, value)}
  return {
    key: [who, *(json.loads(text) for text in sorted(neutral))]
    for key, (who, neutral) in sorted(found.items())
  }


if __name__ == "__main__":
  held = json.loads(FILE.read_text()) if FILE.exists() else {}
  held = dict(sorted((held | {VERSION: keys()}).items()))
  versions = []
  for version, found in held.items():
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    versions.append(f"{json.dumps(version)}: {{\n{lines}\n}}")
  FILE.write_text("{\n" + ",\n".join(versions) + "\n}\n")
