"""Parameters, which may be made when they are needed, as a directory of safetensors files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from models_core.dtypes import as_dtype
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.formats import SAFETENSORS, OnBytes
from models_core.layers import dotted
from models_core.saving.base import Base
from models_core.saving.directory import CONFIG, config_text, copy_companions, shared_directory, write_texts
from models_core.saving.plan import Shaped, index_json, parse_size, plan_save, plan_state, split_files
from models_core.saving.safetensors_writer import write_files


def save_parameters_to_safetensors(
  parameters: Mapping[str, Shaped],
  get: Callable[[str], Any],
  save_dir: str | os.PathLike,
  *,
  family: Family | None = None,
  config: Any = None,
  base: Base | None = None,
  companions: Collection[str] = (),
  dtype: Any = None,
  overwrite: bool = False,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
  max_shard_size: int | str = "5GB",
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
  limit, dtype = parse_size(max_shard_size), as_dtype(dtype)
  if family is None:
    tensors = plan_state(parameters, dtype=dtype)
  else:
    checkpoint = None if base is None else base.in_format(SAFETENSORS)
    tensors = plan_save(parameters, family.huggingface, config=config, base=checkpoint, dtype=dtype)
  shards = split_files(tensors, limit)
  texts = index_json(shards)
  files = None if base is None else base.files
  if family is not None:
    texts[CONFIG] = config_text(family, config, files, parameters, tensors)
  with contextlib.ExitStack() as stack:
    directory = stack.enter_context(shared_directory(os.fspath(save_dir), overwrite))
    reader = None if base is None else stack.enter_context(base.open_reader(tensors))
    write_files(directory, shards, get, reader=reader, on_total=on_total, on_bytes=on_bytes)
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
