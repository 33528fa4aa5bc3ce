"""Companions: the files that belong to a model besides its weights, and are fetched and copied with it.

Logs, optimizer states, weights in other formats and the README, which describes another model, stay behind.
"""

from __future__ import annotations

import fnmatch

from models_core.formats import Files, names_in

CONFIG = "config.json"
# The key of config.json that names the file of the weights. Savers name their files as usual and drop it.
WEIGHTS_KEY = "transformers_weights"

# Chat templates besides the default one.
_TEMPLATES = "additional_chat_templates"

# In lower case. Savers write these themselves.
_WRITTEN = (CONFIG, "*.safetensors.index.json")
_COPIED = (
  # The tokenizer.
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template*",
  # Generation.
  "generation_config.json",
  # Inputs other than text.
  "*processor_config.json",
  # Terms of use.
  "license*",
  "licence*",
  "notice*",
  "use_policy*",
)


def is_companion(name: str) -> bool:
  """Whether a file belongs to a model besides its weights, such as config.json and the tokenizer's files."""
  return _matches(name, _WRITTEN + _COPIED) or _is_template(name)


def companions_of(files: Files) -> list[str]:
  """Names of the files that are copied when a model is saved, in whatever format its weights are written."""
  own = [name for name in files.names() if _matches(name, _COPIED)]
  return sorted(own + [name for name in names_in(files, _TEMPLATES) if _is_template(name)])


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
  return "/" not in name and any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _is_template(name: str) -> bool:
  folder, _, file = name.rpartition("/")
  return folder == _TEMPLATES and file.endswith(".jinja")
