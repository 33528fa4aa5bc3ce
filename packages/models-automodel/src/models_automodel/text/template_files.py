"""The chat templates among a checkpoint's files, by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from models_automodel.text.chat_template import DEFAULT, MAX_BYTES, ChatTemplate
from models_core.errors import CheckpointError
from models_core.formats import Files

_log = logging.getLogger(__name__)

# The folder of the templates besides the default one.
TEMPLATES = "additional_chat_templates"
_FILE, _SUFFIX = "chat_template.jinja", ".jinja"
_CONFIG, _PROCESSOR = "tokenizer_config.json", "chat_template.json"


def read_templates(
  files: Files, names: frozenset[str], config: Mapping[str, Any], processor: Mapping[str, Any]
) -> dict[str, ChatTemplate]:
  """The templates of chat_template.jinja and additional_chat_templates/, else those of tokenizer_config.json.

  Args:
    files: the checkpoint's files.
    names: their names.
    config: content of tokenizer_config.json.
    processor: content of chat_template.json, in which a processor's template is. It counts if there is no other.

  Raises:
    CheckpointError: if a template is no text, or too large.
  """
  stated = _stated(files, _CONFIG, config.get("chat_template"))
  if found := _of_files(files, names):
    if left := [name for name, value in stated.items() if found.get(name, value).source != value.source]:
      _log.warning(
        "%s: the chat templates are those of %s; %s of %s differs and is not read",
        files.path,
        ", ".join(template.origin for template in found.values()),
        ", ".join(repr(name) for name in left),
        _CONFIG,
      )
    return found
  return stated or _stated(files, _PROCESSOR, processor.get("chat_template"))


def _of_files(files: Files, names: frozenset[str]) -> dict[str, ChatTemplate]:
  found = {DEFAULT: _FILE} if _FILE in names else {}
  for name in sorted(names):
    folder, _, file = name.rpartition("/")
    if folder == TEMPLATES and file.endswith(_SUFFIX):
      found[file.removesuffix(_SUFFIX)] = name
  return {name: ChatTemplate(_read(files, file), file) for name, file in found.items()}


def _read(files: Files, name: str) -> str:
  if (size := files.size(name)) > MAX_BYTES:
    raise CheckpointError(
      files.path, [f"{name} has {size:,} bytes, more than the {MAX_BYTES:,} that are read"]
    )
  try:
    return files.read(name, 0, size).decode()
  except UnicodeDecodeError as error:
    raise CheckpointError(files.path, [f"{name} is not UTF-8: {error}"]) from error


def _stated(files: Files, file: str, value: Any) -> dict[str, ChatTemplate]:
  """The templates in a JSON file: one, a list of named ones, or an object of them."""
  if value is None:
    return {}
  if isinstance(value, str):
    return {DEFAULT: ChatTemplate(value, f"of {file}")}
  if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
    pairs = [(entry.get("name"), entry.get("template")) for entry in value]
  else:
    pairs = list(value.items()) if isinstance(value, Mapping) else [(None, None)]
  if not all(isinstance(name, str) and isinstance(source, str) for name, source in pairs):
    raise CheckpointError(files.path, [f"{file}: chat_template is not a string, nor a list of named ones"])
  return {name: ChatTemplate(source, f"{name!r} of {file}") for name, source in pairs}
