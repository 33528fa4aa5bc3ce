"""The directory that a saved checkpoint becomes: what lies beside the weights, and what they take the place of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from models_core.errors import ConfigError, SaveError
from models_core.family import Family
from models_core.formats import Files, checkpoint_entries, read_json
from models_core.saving.atomic import replace_directory, save_errors
from models_core.saving.plan import SavedTensor, Shaped

CONFIG = "config.json"
# Of this process, not of the checkpoint.
_NOT_IN_CONFIG_JSON = ("shd_config", "remat_config")


@contextlib.contextmanager
def shared_directory(save_dir: str, overwrite: bool) -> Iterator[str]:
  """One directory that all processes fill, and which becomes `save_dir` if none of them failed."""
  if jax.process_count() == 1:
    with replace_directory(save_dir, overwrite=overwrite, outdated=checkpoint_entries) as directory:
      yield directory
    return
  # All processes take every step, so that none waits for one that failed.
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
        raise failure or SaveError(f"{save_dir} is as it was: another process could not write its part")
  except Exception as error:
    failure = error
  if not _all_well(failure is None):
    raise failure or SaveError(f"{save_dir} is as it was: another process could not put it there")


def _from_first(text: str) -> str:
  """What process 0 says, in all of them."""
  buffer = np.zeros(4096, np.uint8)
  data = text.encode()
  buffer[: len(data)] = np.frombuffer(data, np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).rstrip(b"\0").decode()


def _all_well(well: bool) -> bool:
  """Whether all processes are well. Waits for all."""
  return bool(np.all(multihost_utils.process_allgather(np.array(well, np.int32))))


def write_texts(directory: str, texts: Mapping[str, bytes]) -> None:
  """Writes new files and puts them on the disk.

  Args:
    directory: that gets them; holds none of them.
    texts: contents by name.

  Raises:
    OSError: if the file system refuses.
  """
  for name, data in texts.items():
    with open(os.path.join(directory, name), "xb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())


def copy_companions(directory: str, base: Files | None, names: Collection[str]) -> None:
  """Copies those of the named files that the base has, as they are."""
  if base is not None:
    for name in sorted(set(names).intersection(base.names())):
      write_texts(directory, {name: base.read(name, 0, base.size(name))})


def config_text(
  family: Family,
  config: Any,
  base: Files | None,
  parameters: Mapping[str, Shaped],
  tensors: Sequence[SavedTensor],
) -> bytes:
  """config.json: the base's fields, over which the configuration's go, and the dtype of most elements.

  Args:
    family: of the model.
    config: of the model.
    base: the files that the model came from.
    parameters: of the model, by name.
    tensors: that are saved.

  Raises:
    ConfigError: if reading it would give another configuration.
  """
  dtype = _main_dtype(parameters, tensors)
  own = family.write_config(config)
  names = {"torch_dtype": dtype.name, "dtype": dtype.name}
  former = read_json(base, CONFIG) if base is not None and CONFIG in base.names() else {}
  if isinstance(text := former.get("text_config"), Mapping):
    # The language model's fields lie one level deeper; the whole keeps its own type.
    inner = dict(text) | {k: v for k, v in own.items() if k != "architectures"}
    inner |= {key: name for key, name in names.items() if key in text}
    raw = former | {"text_config": inner} | names
  else:
    raw = former | own | names
  again = family.read_config(raw)
  fields = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_IN_CONFIG_JSON]
  if differing := [name for name in fields if getattr(again, name) != getattr(config, name)]:
    raise ConfigError(
      f"config.json cannot state this configuration: {', '.join(differing)} would be read otherwise"
    )
  return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"


def _main_dtype(parameters: Mapping[str, Shaped], tensors: Sequence[SavedTensor]) -> np.dtype:
  """The dtype of most elements."""
  written = {name: tensor.dtype for tensor in tensors if tensor.copied is None for name, _ in tensor.parts}
  sizes: dict[np.dtype, int] = {}
  for name, dtype in written.items():
    sizes[dtype] = sizes.get(dtype, 0) + math.prod(parameters[name].shape)
  return max(sizes, key=lambda dtype: sizes[dtype])
