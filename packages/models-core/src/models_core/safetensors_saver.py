"""A model's parameters as a directory of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from models_core.abstract import dotted
from models_core.checkpoint import Files, as_files
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.reader import OnBytes
from models_core.safetensors_headers import read_safetensors
from models_core.safetensors_writer import write_files
from models_core.save_plan import Shaped, index_json, parse_size, plan_save, plan_state, split_files
from models_core.saved_directory import CONFIG, config_text, copy_companions, shared_directory, write_texts


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
  on_total: OnBytes | None = None,
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
    on_total: called once with the number of bytes that this process is going to write.
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
    on_total=on_total,
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
  on_total: OnBytes | None = None,
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
    tensors = plan_save(
      parameters, family.weights["huggingface"], config=config, base=checkpoint, dtype=dtype
    )
  shards = split_files(tensors, limit)
  texts = index_json(shards)
  if family is not None:
    texts[CONFIG] = config_text(family, config, files, parameters, tensors)
  with shared_directory(os.fspath(save_dir), overwrite) as directory:
    write_files(directory, shards, get, base=files, on_total=on_total, on_bytes=on_bytes)
    if jax.process_index() == 0:
      copy_companions(directory, files, set(companions) - texts.keys())
      write_texts(directory, texts)


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
