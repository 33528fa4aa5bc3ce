"""Companions: the files that belong to a model besides its weights."""

from __future__ import annotations

import fnmatch

from models_core.formats import Files

CONFIG = "config.json"

_COMPANIONS = (
  CONFIG,
  "generation_config.json",
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template*",
  "preprocessor_config.json",
  "processor_config.json",
  "*.safetensors.index.json",
  "LICENSE*",
  "NOTICE*",
  "USE_POLICY*",
)
# Savers write these themselves.
_WRITTEN = (CONFIG, "*.safetensors.index.json")


def is_companion(name: str) -> bool:
  """Whether a file belongs to a model besides its weights, such as the tokenizer's."""
  return _matches(name, _COMPANIONS)


def companions_of(files: Files) -> list[str]:
  """Names of the files that are copied when a model is saved, in whatever format its weights are written.

  Everything else stays behind: weights in other formats, states of a training run, a README that describes the base.
  """
  return sorted(name for name in files.names() if is_companion(name) and not _matches(name, _WRITTEN))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
