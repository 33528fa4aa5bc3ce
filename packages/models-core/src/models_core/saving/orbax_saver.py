"""A model's parameters as an Orbax tree, in a directory that loads by itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from models_core.dtypes import as_dtype
from models_core.errors import SaveError
from models_core.family import Family
from models_core.formats import ORBAX, OnBytes
from models_core.saving.base import Base
from models_core.saving.directory import CONFIG, config_text, copy_companions, shared_directory, write_texts
from models_core.saving.orbax_writer import write_tree
from models_core.saving.plan import Shaped, plan_save


def save_parameters_to_orbax(
  parameters: Mapping[str, Shaped],
  get: Callable[[str], Any],
  save_dir: str | os.PathLike,
  *,
  family: Family,
  config: Any,
  base: Base | None = None,
  companions: Collection[str] = (),
  dtype: Any = None,
  overwrite: bool = False,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
) -> None:
  """Writes an Orbax tree, at once complete: `save_dir` is what it was, or holds the whole checkpoint.

  The arrays have the names and layouts of the family's table, those of Google's trees for Gemma. Of a family without
  one they have the parameters' own: `layers.0.attn.q_proj.w` is the leaf `["layers"]["0"]["attn"]["q_proj"]["w"]`.
  One parameter is in host memory at a time, or those of one fused array.

  Args:
    parameters: shapes and dtypes, by name.
    get: name -> array.
    save_dir: may be missing or empty.
    family: of the model.
    config: of the model.
    base: that the model came from. What is open without it is as an Orbax tree has it: the forms of fused arrays,
      parts that the model lacks; and the fields of config.json that are no part of `config`.
    companions: names of files of `base` that are copied, where they are there.
    dtype: that floating-point parameters are written in; None keeps each as it is.
    overwrite: whether `save_dir` may hold something. Weights and files of the same names are replaced, others stay.
    on_total: called once with the number of bytes that are going to be written.
    on_bytes: called with the number of bytes that were written.

  Raises:
    CheckpointError: if `base` is broken or of another architecture.
    ConfigError: if config.json cannot state the configuration.
    MissingExtraError: if TensorStore is not installed.
    SaveError: if `save_dir` exists, is being written, or the file system refuses; under several processes.
    TypeError: if `dtype` is no floating-point type.
  """
  if jax.process_count() > 1:
    raise SaveError(f"{os.fspath(save_dir)}: one process writes an Orbax tree, not {jax.process_count()}")
  table = family.table_of(ORBAX, {name: shaped.shape for name, shaped in parameters.items()})
  tree = None if base is None else base.in_format(ORBAX)
  tensors = plan_save(parameters, table, config=config, base=tree, dtype=as_dtype(dtype))
  files = None if base is None else base.files
  texts = {CONFIG: config_text(family, config, files, parameters, tensors)}
  with contextlib.ExitStack() as stack:
    directory = stack.enter_context(shared_directory(os.fspath(save_dir), overwrite))
    reader = None if base is None else stack.enter_context(base.open_reader(tensors))
    write_tree(directory, tensors, get, reader=reader, on_total=on_total, on_bytes=on_bytes)
    copy_companions(directory, files, set(companions) - texts.keys())
    write_texts(directory, texts)
