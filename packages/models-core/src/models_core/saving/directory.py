"""The directory of a saved checkpoint: its creation by all processes, and the files besides the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from models_core.errors import ConfigError, SaveError
from models_core.family import Family
from models_core.formats import Files, checkpoint_entries, read_json
from models_core.saving.atomic import replace_directory, save_errors
from models_core.saving.companions import CONFIG, WEIGHTS_KEY, companions_of
from models_core.saving.plan import SavedTensor, Shaped

# Fields that describe how a process runs the model, not the checkpoint.
_NOT_IN_CONFIG_JSON = ("shd_config", "remat_config")


@contextlib.contextmanager
def shared_directory(save_dir: str, overwrite: bool) -> Iterator[str]:
  """Gives a directory that all processes fill together. It becomes `save_dir` if none of them fails.

  Raises:
    SaveError: in all processes, if one of them fails.
  """
  if jax.process_count() == 1:
    with replace_directory(save_dir, overwrite=overwrite, outdated=checkpoint_entries) as directory:
      yield directory
    return
  # Every process takes part in every step, so that none waits forever for one that failed.
  failure: Exception | None = None
  try:
    with contextlib.ExitStack() as stack:
      directory = ""
      try:
        if jax.process_index() == 0:
          directory = stack.enter_context(
            replace_directory(save_dir, overwrite=overwrite, outdated=checkpoint_entries)
          )
      except SaveError as error:
        failure = error
      if directory := _from_first(directory):
        try:
          with save_errors(save_dir):
            yield directory
        except Exception as error:
          failure = error
      if not _all_well(failure is None and bool(directory)):
        raise failure or SaveError(
          f"{save_dir} is unchanged: another process could not write its part; the error raised there says why"
        )
  except Exception as error:
    failure = error
  if not _all_well(failure is None):
    raise failure or SaveError(
      f"{save_dir} is unchanged: process 0 could not replace it; the error raised there says why"
    )


def _from_first(text: str) -> str:
  """Sends a text from process 0 to all processes."""
  buffer = np.zeros(4096, np.uint8)
  data = text.encode()
  buffer[: len(data)] = np.frombuffer(data, np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).rstrip(b"\0").decode()


def _all_well(well: bool) -> bool:
  """Whether all processes have succeeded so far. Waits for all of them."""
  return bool(np.all(multihost_utils.process_allgather(np.array(well, np.int32))))


def write_texts(directory: str, texts: Mapping[str, bytes]) -> None:
  """Writes new files and flushes them to the disk.

  Args:
    directory: directory to write into.
    texts: contents of the files, by name.

  Raises:
    OSError: if a file exists already, or the file system refuses.
  """
  for name, data in texts.items():
    with open(os.path.join(directory, name), "xb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())


def copy_companions(directory: str, base: Files | None) -> None:
  """Copies the companions of the base to a directory."""
  if base is not None:
    for name in companions_of(base):
      write_texts(directory, {name: base.read(name, 0, base.size(name))})


def config_text(
  family: Family,
  config: Any,
  base: Files | None,
  parameters: Mapping[str, Shaped],
  tensors: Sequence[SavedTensor],
) -> bytes:
  """The text of config.json: the base's fields, overridden by those of the configuration and by the saved dtype.

  Args:
    family: family of the model.
    config: configuration of the model.
    base: the files that the model was loaded from.
    parameters: shapes and dtypes of the model's parameters, by name.
    tensors: the tensors that are saved.

  Raises:
    ConfigError: if reading the text would give a different configuration.
  """
  dtype = _main_dtype(parameters, tensors)
  own = family.write_config(config)
  names = {"torch_dtype": dtype.name, "dtype": dtype.name}
  former = read_json(base, CONFIG) if base is not None and CONFIG in base.names() else {}
  former.pop(WEIGHTS_KEY, None)
  if isinstance(text := former.get("text_config"), Mapping):
    # A multimodal configuration keeps its own type; the fields of the language model are in text_config.
    inner = dict(text) | {k: v for k, v in own.items() if k != "architectures"}
    inner |= {key: name for key, name in names.items() if key in text}
    raw = former | {"text_config": inner} | names
  else:
    raw = former | own | names
  again = family.read_config(raw)
  fields = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_IN_CONFIG_JSON]
  if differing := [name for name in fields if getattr(again, name) != getattr(config, name)]:
    raise ConfigError(
      f"config.json cannot express this configuration: {', '.join(differing)} would be read back with another value"
    )
  return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"


def _main_dtype(parameters: Mapping[str, Shaped], tensors: Sequence[SavedTensor]) -> np.dtype:
  """The dtype in which most elements of the parameters are saved."""
  written = {name: tensor.dtype for tensor in tensors if tensor.copied is None for name, _ in tensor.parts}
  sizes: dict[np.dtype, int] = {}
  for name, dtype in written.items():
    sizes[dtype] = sizes.get(dtype, 0) + math.prod(parameters[name].shape)
  return max(sizes, key=lambda dtype: sizes[dtype])
