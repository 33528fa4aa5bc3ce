"""What a checkpoint says about generation: its context, and how it wants tokens to be chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from models_core.config import HEADER_CONFIGS
from models_core.errors import CheckpointError, ConfigError
from models_core.formats import Checkpoint, Files, read_json
from models_core.generation import GREEDY, Sampling

_log = logging.getLogger(__name__)

NAME = "generation_config.json"
_CONFIG = "config.json"
_CONTEXT = "max_position_embeddings"
# key of generation_config.json -> field of Sampling, and the value that transformers takes where samples are drawn and
# the key is missing.
_FIELDS = {
  "temperature": ("temperature", 1.0),
  "top_k": ("top_k", 50),
  "top_p": ("top_p", 1.0),
  "min_p": ("min_p", 0.0),
}
_PENALTY = "repetition_penalty"
# Keys that change which tokens come, and values that leave them alone.
_NOT_IMPLEMENTED = {
  "num_beams": (1,),
  "typical_p": (1.0,),
  "epsilon_cutoff": (0.0,),
  "eta_cutoff": (0.0,),
  "no_repeat_ngram_size": (0,),
  "encoder_repetition_penalty": (1.0,),
  "bad_words_ids": (),
  "suppress_tokens": ([],),
  "begin_suppress_tokens": ([],),
  "forced_bos_token_id": (),
  "forced_eos_token_id": (),
  "min_length": (0,),
  "min_new_tokens": (0,),
  "guidance_scale": (1.0,),
  "sequence_bias": (),
  "stop_strings": ([],),
}


def read_sampling(files: Files) -> Sampling:
  """How the checkpoint's generation_config.json wants tokens to be chosen; greedily if there is none.

  Keys that change the tokens and are not implemented are noted in the log.

  Raises:
    CheckpointError: if the file is malformed, or a number is outside its range.
  """
  if NAME not in files.names():
    return GREEDY
  try:
    raw = read_json(files, NAME)
    ignored = [k for k, plain in _NOT_IMPLEMENTED.items() if raw.get(k) is not None and raw[k] not in plain]
    if ignored:
      _log.warning("%s/%s: %s: not implemented, and not applied", files.path, NAME, ", ".join(ignored))
    return _sampling(raw)
  except ConfigError as error:
    raise CheckpointError(files.path, [f"{NAME}: {error}"]) from None


def _sampling(raw: Mapping[str, Any]) -> Sampling:
  stated = {key: value for key, value in raw.items() if value is not None}
  values: dict[str, Any] = {"repetition_penalty": stated.get(_PENALTY, 1.0)}
  if stated.get("do_sample") is True:
    values |= {field: stated.get(key, default) for key, (field, default) in _FIELDS.items()}
  return Sampling(**values)


def read_context(checkpoint: Checkpoint) -> int | None:
  """How many tokens of a row the model was made for, from config.json or the header; None if neither says it."""
  files = checkpoint.files
  if checkpoint.format is not None and checkpoint.format.name in HEADER_CONFIGS:
    raw = HEADER_CONFIGS[checkpoint.format.name](checkpoint)
  elif _CONFIG in files.names():
    raw = read_json(files, _CONFIG)
  else:
    return None
  inner = raw.get("text_config")
  value = (inner if isinstance(inner, Mapping) else raw).get(_CONTEXT)
  return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
