"""A model's parameters as a directory of safetensors files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from models_core.abstract import dotted
from models_core.checkpoint import Files, as_files
from models_core.errors import ConfigError, SaveError
from models_core.family import Family
from models_core.reader import OnBytes
from models_core.replace_directory import replace_directory, save_errors
from models_core.safetensors_headers import INDEX, SINGLE, is_inside, parse_json, read_safetensors
from models_core.safetensors_writer import write_files
from models_core.save_plan import Shaped, index_json, parse_size, plan_save, plan_state, split_files

CONFIG = "config.json"
# Of this process, not of the checkpoint.
_NOT_IN_CONFIG_JSON = ("shd_config", "remat_config")

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save_model_to_safetensors(
  state_dict: Mapping[Any, Any],
  save_dir: str | os.PathLike,
  max_shard_size: int | str = "5GB",
  *,
  family: Family | None = None,
  config: Any = None,
  base: str | os.PathLike | Files | None = None,
  companions: Sequence[str] = (),
  dtype: Any = None,
  overwrite: bool = False,
  on_bytes: OnBytes | None = None,
) -> None:
  """Writes a state dictionary, at once complete: `save_dir` is what it was, or holds the whole checkpoint.

  Without a family the tensors have the parameters' own names and shapes, and there is no config.json. With a family
  they have Hugging Face's, and transformers reads the directory. Under several processes all must call it, with the
  same arguments.

  Args:
    state_dict: nested or flat dictionary of arrays, as `nnx.state(model, nnx.Param)` or its `to_pure_dict()`.
    save_dir: may be missing or empty.
    max_shard_size: bytes of tensor data in a file, as a number or like "5GB", "200MB", "2GiB".
    family: of the model.
    config: of the model; with a family.
    base: the safetensors checkpoint that the model came from, with a family. What is open without it is as it has
      it: the forms of fused tensors, the prefix of names, a tied head that is stored, parts that the model has not
      such as a vision tower, and the fields of config.json that are no part of `config`.
    companions: names of files of `base` that are copied, where they are there.
    dtype: that floating-point parameters are written in; None keeps each as it is.
    overwrite: whether `save_dir` may hold something. Weights and files of the same names are replaced, others stay.
    on_bytes: called with the number of bytes that were written, from several threads.

  Raises:
    CheckpointError: if `base` is broken or of another architecture.
    ConfigError: if config.json cannot state the configuration, or a family has none.
    SaveError: if `save_dir` exists, is being written, or the file system refuses.
    TypeError: if the dictionary holds something else than arrays.
    ValueError: if `max_shard_size` is no size.
  """
  arrays = flatten(state_dict)
  save_parameters(
    arrays,
    arrays.__getitem__,
    save_dir,
    max_shard_size,
    family=family,
    config=config,
    base=base,
    companions=companions,
    dtype=dtype,
    overwrite=overwrite,
    on_bytes=on_bytes,
  )


def save_parameters(
  parameters: Mapping[str, Shaped],
  get: Callable[[str], Any],
  save_dir: str | os.PathLike,
  max_shard_size: int | str = "5GB",
  *,
  family: Family | None = None,
  config: Any = None,
  base: str | os.PathLike | Files | None = None,
  companions: Sequence[str] = (),
  dtype: Any = None,
  overwrite: bool = False,
  on_bytes: OnBytes | None = None,
) -> None:
  """As `save_model_to_safetensors`, of parameters that are made when they are needed.

  Args:
    parameters: shapes and dtypes, by name.
    get: name -> array.
    save_dir: and all that follows: as there.
  """
  if (family is None) != (config is None):
    raise ConfigError("a family needs a config, and a config a family: give both, or neither")
  if family is None and base is not None:
    raise ConfigError("a base needs the family that reads it: give family= and config=")
  limit, dtype = parse_size(max_shard_size), None if dtype is None else np.dtype(dtype)
  files = as_files(base) if base is not None else None
  names = set(files.names()) if files is not None else set()
  checkpoint = None
  if files is not None and any(name.endswith(".safetensors") for name in names):
    checkpoint = read_safetensors(files)
  if family is None:
    tensors = plan_state(parameters, dtype=dtype)
  else:
    tensors = plan_save(parameters, family.weights["huggingface"], base=checkpoint, dtype=dtype)
  shards = split_files(tensors, limit)
  texts = index_json(shards)
  if family is not None:
    written = {name: tensor.dtype for tensor in tensors if tensor.copied is None for name, _ in tensor.parts}
    texts[CONFIG] = _config_text(family, config, _base_config(files, names), _main_dtype(parameters, written))
  copied = [name for name in companions if name in names and name not in texts]
  with _shared_directory(os.fspath(save_dir), overwrite) as directory:
    write_files(directory, shards, get, base=files, on_bytes=on_bytes)
    if jax.process_index() == 0:
      for name in copied:
        assert files is not None
        _write(os.path.join(directory, name), files.read(name, 0, files.size(name)))
      for name, text in texts.items():
        _write(os.path.join(directory, name), text)


def flatten(state_dict: Mapping[Any, Any]) -> dict[str, Any]:
  """Arrays by their names joined with dots.

  Raises:
    TypeError: if there is something else among them.
  """
  flat = {}
  pure = nnx.to_pure_dict(state_dict) if isinstance(state_dict, nnx.State) else state_dict
  for path, leaf in nnx.traversals.flatten_mapping(pure).items():
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    name = dotted(path)
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
      raise TypeError(f"{name} is {type(value).__name__}, expected an array")
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
      raise TypeError(f"{name} is {value.dtype}, no array of numbers: save nnx.state(model, nnx.Param) alone")
    flat[name] = value
  if not flat:
    raise TypeError("the state dictionary is empty: there is nothing to save")
  return flat


def weight_files(directory: str) -> Collection[str]:
  """Names of the files in a directory that a new checkpoint takes the place of."""
  names = set(os.listdir(directory))
  found = {name for name in names if name in (INDEX, SINGLE) or _SHARD.fullmatch(name)}
  with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
    with open(os.path.join(directory, INDEX), "rb") as file:
      weight_map = parse_json(file.read()).get("weight_map", {})
    found |= {name for name in weight_map.values() if isinstance(name, str) and is_inside(name)} & names
  return found


@contextlib.contextmanager
def _shared_directory(save_dir: str, overwrite: bool) -> Iterator[str]:
  """One directory that all processes fill, and which becomes `save_dir` if none of them failed."""
  if jax.process_count() == 1:
    with replace_directory(save_dir, overwrite=overwrite, outdated=weight_files) as directory:
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
            replace_directory(save_dir, overwrite=overwrite, outdated=weight_files)
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


def _write(path: str, data: bytes) -> None:
  """Writes a new file and puts it on the disk."""
  with open(path, "xb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _main_dtype(parameters: Mapping[str, Shaped], written: Mapping[str, np.dtype]) -> np.dtype:
  """The dtype of most elements."""
  sizes: dict[np.dtype, int] = {}
  for name, dtype in written.items():
    sizes[dtype] = sizes.get(dtype, 0) + math.prod(parameters[name].shape)
  return max(sizes, key=lambda dtype: sizes[dtype])


def _base_config(files: Files | None, names: Collection[str]) -> dict[str, Any]:
  if files is None or CONFIG not in names:
    return {}
  try:
    return dict(parse_json(files.read(CONFIG, 0, files.size(CONFIG))))
  except (ValueError, TypeError, RecursionError) as error:
    raise ConfigError(f"{files.path}/{CONFIG} is not valid: {error}") from None


def _config_text(family: Family, config: Any, base: Mapping[str, Any], dtype: np.dtype) -> bytes:
  """config.json: the base's fields, over which the configuration's go.

  Raises:
    ConfigError: if reading it would give another configuration.
  """
  own = family.write_config(config)
  names = {"torch_dtype": dtype.name, "dtype": dtype.name}
  if isinstance(text := base.get("text_config"), Mapping):
    # The language model's fields lie one level deeper; the whole keeps its own type.
    inner = dict(text) | {k: v for k, v in own.items() if k != "architectures"}
    inner |= {key: name for key, name in names.items() if key in text}
    raw = dict(base) | {"text_config": inner} | names
  else:
    raw = dict(base) | own | names
  again = family.read_config(raw)
  fields = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_IN_CONFIG_JSON]
  if differing := [name for name in fields if getattr(again, name) != getattr(config, name)]:
    raise ConfigError(
      f"config.json cannot state this configuration: {', '.join(differing)} would be read otherwise"
    )
  return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"
