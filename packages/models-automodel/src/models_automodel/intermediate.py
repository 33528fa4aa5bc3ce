"""A loaded model kept as a directory of safetensors, which later calls load instead of the source.

The directory is an ordinary one, of a config.json and a model.safetensors in Hugging Face's names, with `origin.json`
beside them, which says what call it is the result of.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from models_core.abstract import dotted
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.plan import row_of
from models_core.safetensors_headers import DTYPES, SINGLE, parse_json
from models_core.weights import Piece, pieces, put_back

ORIGIN = "origin.json"


def is_kept(directory: str, origin: Mapping[str, Any]) -> bool:
  """Whether a directory holds the result of this very call; False where there is none, or an empty one.

  Raises:
    ConfigError: if it holds anything else.
  """
  if not os.path.exists(directory) or (os.path.isdir(directory) and not os.listdir(directory)):
    return False
  remedy = "nothing in it is touched: give intermediate_ckpt_dir another directory, or remove it"
  try:
    with open(os.path.join(directory, ORIGIN), "rb") as file:
      found = parse_json(file.read())
  except (OSError, ValueError):
    raise ConfigError(
      f"{directory} is not what from_pretrained keeps: it has no readable {ORIGIN}; {remedy}"
    ) from None
  if found != json.loads(json.dumps(origin)):
    known = found if isinstance(found, dict) else {}
    differing = [
      f"{key}={known.get(key)!r} instead of {value!r}"
      for key, value in origin.items()
      if known.get(key) != value
    ]
    raise ConfigError(f"{directory} is of another call, with {', '.join(differing) or 'more'}; {remedy}")
  return True


def keep(directory: str, model: nnx.Module, family: Family, config: Any, origin: Mapping[str, Any]) -> None:
  """Writes the directory beside its place and moves it there. Where another process was faster, its own stays."""
  if jax.process_count() > 1:
    raise ConfigError(
      "intermediate_ckpt_dir is for one process: save the model from one, and load that directory"
    )
  directory = os.path.abspath(os.path.expanduser(directory))
  draft = f"{directory}.{uuid.uuid4().hex}.tmp"
  os.makedirs(draft)
  try:
    _write(os.path.join(draft, SINGLE), model, family)
    for name, content in (("config.json", family.write_config(config)), (ORIGIN, origin)):
      with open(os.path.join(draft, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    try:
      os.rename(draft, directory)
    except OSError:
      if not is_kept(directory, origin):
        raise
  finally:
    # Our own draft, where it was not moved.
    shutil.rmtree(draft, ignore_errors=True)


def _write(path: str, model: nnx.Module, family: Family) -> None:
  """One safetensors file, parameter by parameter: of the model, host memory holds one tensor's parts at a time."""
  table = family.weights["huggingface"]
  parts: dict[str, list[tuple[Any, Piece]]] = {}
  for path_, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    row, placeholders = row_of(table, dotted(path_))
    array = variable.get_value()
    for piece in pieces(row, row.forms[0], placeholders, array.shape):
      parts.setdefault(piece.tensor, []).append((array, piece))
  codes = {dtype: code for code, dtype in DTYPES.items()}
  header, end = {}, 0
  for name, filled in parts.items():
    array, piece = filled[0]
    nbytes = int(np.prod(piece.shape)) * array.dtype.itemsize
    header[name] = {
      "dtype": codes[np.dtype(array.dtype)],
      "shape": list(piece.shape),
      "data_offsets": [end, end + nbytes],
    }
    end += nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for filled in parts.values():
      array, piece = filled[0]
      tensor = np.zeros(piece.shape, array.dtype)
      for value, place in filled:
        put_back(np.asarray(value)[place.target], place, tensor)
      file.write(tensor.view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
