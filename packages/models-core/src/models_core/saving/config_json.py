"""config.json of a saved model: that of its base, with the keys that the model changes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from models_core.config import collect_notes
from models_core.errors import ConfigError
from models_core.family import Family

_log = logging.getLogger(__name__)

# Fields that describe how a process runs the model, not the checkpoint.
_NOT_IN_CONFIG_JSON = ("shd_config", "remat_config", "scan_layers", "attn_implementation")
# Keys that say what is saved, and not what it computes: reading the base does not tell whether they have changed.
_OF_THE_MODEL = ("architectures", "num_labels")
_TEXT = "text_config"
# What a family's read_config raises on a base that is not its own.
_UNREADABLE = (LookupError, TypeError, ValueError)


def config_json(family: Family, config: Any, base: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """config.json of a model.

  Keys of the base stay as they are, also those that nobody reads, unless the configuration says something else than the
  base does. Spellings that the base lacks are added, so that older and newer versions of transformers read it. Keys of the
  base that would be refused, or contradict the configuration, are left out, and named in the log.

  Args:
    family: of the model.
    config: of the model.
    base: config.json of the checkpoint that the model was loaded from; empty if there is none.
    dtype: name of the dtype in which most parameters are saved.

  Raises:
    ConfigError: if reading the result would give a different configuration.
  """
  # A multimodal configuration keeps its own type; the keys of the language model are in text_config.
  nested = isinstance(base.get(_TEXT), Mapping)
  inner: Mapping[str, Any] = base[_TEXT] if nested else base
  outer = {key: value for key, value in base.items() if key != _TEXT} if nested else {}

  def place(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    return {**outer, _TEXT: dict(inner)} if nested else dict(inner)

  with collect_notes():  # whoever loads the base or the result hears of them
    own = family.write_config(config)
    if nested:
      own.pop("architectures", None)
    alone = {key: outer[key] for key in ("model_type",) if key in outer}
    wrong = [
      *(k for k in outer if k not in own and _differing(family, config, place(own, {**alone, k: outer[k]}))),
      *(k for k in inner if k not in own and _differing(family, config, place({**own, k: inner[k]}, alone))),
    ]
    inner = {key: value for key, value in inner.items() if key not in wrong}
    outer = {key: value for key, value in outer.items() if key not in wrong}
    former = _rewritten(family, place(inner, outer))
    changed = {
      key: value
      for key, value in own.items()
      if key in _OF_THE_MODEL or key not in inner or value != former.get(key, ...)
    }
    # Where all that has changed is not enough, values of the base read otherwise beside it.
    for new in (changed, own):
      # Keys beside text_config that repeat those in it change with them.
      repeated = {key: value for key, value in new.items() if key in outer and key != "model_type"}
      raw = place({**inner, **new}, {**outer, **repeated})
      if not _differing(family, config, raw):
        break
    for part in (raw, raw[_TEXT]) if nested else (raw,):
      names = ("torch_dtype", "dtype")
      part.update({key: dtype for key in names if part is raw or key in part})
    family.read_config(raw)  # its own error says more
    if differing := _differing(family, config, raw):
      raise ConfigError(
        f"config.json cannot express this configuration: {', '.join(differing)} would be read back with another value"
      )
  if wrong:
    _log.warning(
      "config.json is written without these keys of the base, which the model does not implement or contradicts: %s",
      ", ".join(wrong),
    )
  return raw


def _rewritten(family: Family, base: Mapping[str, Any]) -> Mapping[str, Any]:
  """What would be written for the configuration of the base; empty if the family cannot read it."""
  try:
    return family.write_config(family.read_config(base))
  except _UNREADABLE:
    return {}


def _differing(family: Family, config: Any, raw: Mapping[str, Any]) -> list[str]:
  """Fields that would be read back with another value; all of them if the family refuses to read."""
  fields = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_IN_CONFIG_JSON]
  try:
    again = family.read_config(raw)
  except _UNREADABLE:
    return fields
  return [name for name in fields if getattr(again, name) != getattr(config, name)]
