"""Saves parameters as a directory of safetensors files; the arrays may be computed while they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from models_core.dtypes import as_dtype
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.formats import INDEX, SAFETENSORS, OnBytes
from models_core.layers import by_layer, dotted
from models_core.saving.base import Base
from models_core.saving.directory import (
  CONFIG,
  companion_texts,
  config_text,
  copy_companions,
  shared_directory,
  shared_draft,
  write_texts,
)
from models_core.saving.plan import Shaped, index_json, parse_size, plan_save, plan_state, split_files
from models_core.saving.safetensors_writer import stream_files, write_files
from models_core.saving.shapes import check_shapes
from models_core.saving.target import Place, named_for


def save_parameters_to_safetensors(
  parameters: Mapping[str, Shaped],
  get: Callable[[str], Any],
  save_dir: Place,
  *,
  family: Family | None = None,
  config: Any = None,
  base: Base | None = None,
  dtype: Any = None,
  overwrite: bool = False,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
  max_shard_size: int | str = "5GB",
  more: Mapping[str, bytes] | None = None,
) -> None:
  """Writes parameters that `get` returns one by one; otherwise the same as `save_model_to_safetensors`.

  Args:
    parameters: shapes and dtypes of the parameters, by name.
    get: a parameter's name -> its array. Called when the parameter is needed, again for each file that needs it.
    save_dir: directory to write, or a target that a source provides; it may be missing or empty. In a target there is
      always an index, and the names of the weight files are used by no other save.
    family: family of the model.
    config: configuration of the model; required with a family.
    base: the files that the model was loaded from; it requires a family.
    dtype: dtype in which floating-point parameters are written; None keeps the dtype of each.
    overwrite: whether `save_dir` may hold files. Weights and files of the same names are replaced, all others stay.
    on_total: called once with the number of bytes that this process will write.
    on_bytes: called with the number of bytes of each write, from several threads.
    max_shard_size: most bytes of tensor data in one file, as a number or a string such as "5GB", "200MB" or "2GiB".
    more: contents of further files, by name.

  Raises:
    CheckpointError: if `base` is broken or of another architecture.
    ConfigError: if the parameters have other names or shapes than the configuration gives a model, config.json cannot
      express the configuration, or `family`, `config` and `base` are not given
      together.
    SaveError: if `save_dir` holds files and `overwrite` is false, another process is writing it, a value does not fit
      `dtype`, or the file system refuses the write.
    TypeError: if `dtype` is not a floating-point type.
    ValueError: if `max_shard_size` is not a size.
  """
  if (family is None) != (config is None):
    raise ConfigError("family= and config= belong together: give both, or neither")
  if family is None and base is not None:
    raise ConfigError("base= needs the family of the checkpoint: give family= and config= as well")
  limit, dtype = parse_size(max_shard_size), as_dtype(dtype)
  if family is None:
    tensors = plan_state(parameters, dtype=dtype)
  else:
    checkpoint = None if base is None else base.in_format(SAFETENSORS)
    parameters, get = by_layer(parameters, get)
    tensors = plan_save(parameters, family.huggingface, config=config, base=checkpoint, dtype=dtype)
    check_shapes(parameters, family, config)
  shards = split_files(tensors, limit)
  files = None if base is None else base.files
  texts = dict(more or {})
  if family is not None:
    texts[CONFIG] = config_text(family, config, files, parameters, tensors)
  with contextlib.ExitStack() as stack:
    if isinstance(save_dir, str | os.PathLike):
      directory = stack.enter_context(
        shared_directory(os.fspath(save_dir), overwrite, sum(file.nbytes for file in shards))
      )
      reader = None if base is None else stack.enter_context(base.open_reader(tensors))
      write_files(directory, shards, get, reader=reader, on_total=on_total, on_bytes=on_bytes)
      if jax.process_index() == 0:
        copy_companions(directory, files)
        write_texts(directory, index_json(shards) | texts)
    else:
      last = INDEX if family is None else CONFIG
      draft = stack.enter_context(shared_draft(save_dir, shards, overwrite=overwrite, last=last))
      reader = None if base is None else stack.enter_context(base.open_reader(tensors))
      named = named_for(draft, shards)
      stream_files(draft, named, get, reader=reader, on_total=on_total, on_bytes=on_bytes)
      if jax.process_index() == 0:
        for name, data in (*companion_texts(files), *texts.items()):
          draft.put(name, data)


def flatten(state_dict: Mapping[Any, Any]) -> dict[str, Any]:
  """The arrays of a nested dictionary, by their paths joined with dots.

  Raises:
    TypeError: if the dictionary is empty or a value is not a numeric array.
  """
  flat = {}
  pure = nnx.to_pure_dict(state_dict) if isinstance(state_dict, nnx.State) else state_dict
  for path, leaf in nnx.traversals.flatten_mapping(pure).items():
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    name = dotted(path)
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
      raise TypeError(
        f"{name} is a {type(value).__name__}, expected an array: save nnx.state(model, nnx.Param)"
      )
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
      raise TypeError(
        f"{name} has the dtype {value.dtype}, which is not numeric: save only nnx.state(model, nnx.Param)"
      )
    flat[name] = value
  if not flat:
    raise TypeError("the state dictionary is empty: save nnx.state(model, nnx.Param)")
  return flat
