"""The directory or target of a saved checkpoint: its creation by all processes, and the files besides the weights."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from models_core.config import HEADER_CONFIGS, QUANTISATION_KEYS
from models_core.errors import CheckpointError, ConfigError, SaveError
from models_core.family import Family
from models_core.formats import Files, checkpoint_entries, formats_in, read_json
from models_core.saving.atomic import replace_directory, save_errors, sync_directory
from models_core.saving.companions import CONFIG, WEIGHTS_KEY, companions_of
from models_core.saving.config_json import config_json
from models_core.saving.plan import SavedFile, SavedTensor, Shaped
from models_core.saving.target import Draft, Target, draft_of

T = TypeVar("T")

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def shared_directory(save_dir: str, overwrite: bool, nbytes: int) -> Iterator[str]:
  """Gives a directory that all processes fill together. It becomes `save_dir` if none of them fails.

  Args:
    save_dir: the directory.
    overwrite: whether it may hold files.
    nbytes: of all files that will be written, for messages.

  Raises:
    SaveError: in all processes, if one of them fails.
  """

  def first() -> AbstractContextManager[str]:
    return replace_directory(save_dir, overwrite=overwrite, outdated=checkpoint_entries, nbytes=nbytes)

  with _shared(
    save_dir, nbytes, first, lambda directory: directory, lambda directory: directory
  ) as directory:
    yield directory


@contextlib.contextmanager
def shared_draft(
  target: Target, files: Sequence[SavedFile], *, overwrite: bool, last: str
) -> Iterator[Draft]:
  """Gives a draft of a checkpoint, whose files all processes create together. It is committed if none of them fails.

  Takes the arguments of `draft_of`. Small files are put by process 0.

  Raises:
    SaveError: in all processes, if one of them fails.
  """

  def first() -> AbstractContextManager[Draft]:
    return draft_of(target, files, overwrite=overwrite, last=last)

  with _shared(
    target.path, None, first, lambda draft: draft.token, lambda token: target.join(token, last)
  ) as draft:
    yield draft


@contextlib.contextmanager
def _shared(
  path: str,
  nbytes: int | None,
  first: Callable[[], AbstractContextManager[T]],
  name: Callable[[T], str],
  join: Callable[[str], T],
) -> Iterator[T]:
  """Enters a context in process 0, and gives what it yields to all processes. It is left once all have succeeded.

  Args:
    path: path or address that is written, for messages.
    nbytes: of all files that will be written, for messages.
    first: makes the context.
    name: what names the yielded value for other processes.
    join: makes the value from its name, in the other processes.
  """
  if jax.process_count() == 1:
    with first() as only:
      yield only
    return
  # Every process takes part in every step, so that none waits forever for one that failed.
  failure: Exception | None = None
  try:
    with contextlib.ExitStack() as stack:
      own: T | None = None
      try:
        if jax.process_index() == 0:
          own = stack.enter_context(first())
      except OSError as error:
        failure = error
      if named := _from_first("" if own is None else name(own)):
        try:
          with save_errors(path, nbytes):
            yield join(named) if own is None else own
        except Exception as error:
          failure = error
      if not _all_well(failure is None and bool(named)):
        raise failure or SaveError(
          f"{path} is unchanged: another process could not write its part; the error raised there says why"
        )
  except Exception as error:
    failure = error
  if not _all_well(failure is None):
    raise failure or SaveError(
      f"{path} is unchanged: process 0 could not replace it; the error raised there says why"
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
    texts: contents of the files, by name; a name may have folders, such as "folder/file".

  Raises:
    OSError: if a file exists already, or the file system refuses.
  """
  for name, data in texts.items():
    path = os.path.join(directory, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    if os.path.dirname(name):
      sync_directory(os.path.dirname(path))


def companion_texts(base: Files | None) -> Iterator[tuple[str, bytes]]:
  """Names and contents of the companions of the base, one after the other."""
  if base is not None:
    for name in companions_of(base):
      yield name, base.read(name, 0, base.size(name))


def copy_companions(directory: str, base: Files | None) -> None:
  """Copies the companions of the base to a directory."""
  for name, data in companion_texts(base):
    write_texts(directory, {name: data})


def config_text(
  family: Family,
  config: Any,
  base: Files | None,
  parameters: Mapping[str, Shaped],
  tensors: Sequence[SavedTensor],
) -> bytes:
  """The text of config.json: the base's keys, those that the configuration changes, and the saved dtype.

  Args:
    family: family of the model.
    config: configuration of the model.
    base: the files that the model was loaded from.
    parameters: shapes and dtypes of the model's parameters, by name.
    tensors: the tensors that are saved.

  Raises:
    ConfigError: if reading the text would give a different configuration.
  """
  former = {} if base is None else _former_config(base)
  former.pop(WEIGHTS_KEY, None)
  # What is written is plain: a statement that the base was quantised would no longer be true.
  if base is not None and any(former.get(key) for key in QUANTISATION_KEYS):
    _log.warning("%s is quantised; what is saved is not, and takes more room", base.path)
  former = {key: value for key, value in former.items() if key not in QUANTISATION_KEYS}
  if isinstance(text := former.get("text_config"), Mapping):
    former["text_config"] = {key: value for key, value in text.items() if key not in QUANTISATION_KEYS}
  raw = config_json(family, config, former, _main_dtype(parameters, tensors).name)
  return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"


def _former_config(base: Files) -> dict[str, Any]:
  """The configuration of the base, from its config.json or the header of its weights; empty if neither has it.

  A header says what no field of a model does, such as the length of the context.
  """
  if CONFIG in base.names():
    return read_json(base, CONFIG)
  for format in formats_in(base):
    if format.name in HEADER_CONFIGS:
      try:
        return dict(HEADER_CONFIGS[format.name](format.read(base)))
      except (CheckpointError, ConfigError) as error:
        # The model says all that its logits depend on.
        _log.warning("config.json holds what the model says alone, as the base's cannot be read: %s", error)
  return {}


def _main_dtype(parameters: Mapping[str, Shaped], tensors: Sequence[SavedTensor]) -> np.dtype:
  """The dtype in which most elements of the parameters are saved."""
  written = {name: tensor.dtype for tensor in tensors if tensor.copied is None for name, _ in tensor.parts}
  sizes: dict[np.dtype, int] = {}
  for name, dtype in written.items():
    sizes[dtype] = sizes.get(dtype, 0) + math.prod(parameters[name].shape)
  return max(sizes, key=lambda dtype: sizes[dtype])
