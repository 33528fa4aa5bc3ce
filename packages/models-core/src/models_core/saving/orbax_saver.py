"""Saves a model's parameters as an Orbax tree, in a directory with all other files that loading needs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from models_core.dtypes import as_dtype
from models_core.errors import SaveError
from models_core.family import Family
from models_core.formats import ORBAX, LocalFiles, OnBytes, checkpoint_entries, weight_files
from models_core.layers import by_layer
from models_core.saving.atomic import local_path
from models_core.saving.base import Base
from models_core.saving.directory import CONFIG, config_text, copy_companions, shared_directory, write_texts
from models_core.saving.orbax_writer import write_tree
from models_core.saving.plan import Shaped, plan_save
from models_core.saving.shapes import check_shapes
from models_core.saving.target import Place


def save_parameters_to_orbax(
  parameters: Mapping[str, Shaped],
  get: Callable[[str], Any],
  save_dir: Place,
  *,
  family: Family,
  config: Any,
  base: Base | None = None,
  dtype: Any = None,
  overwrite: bool = False,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
  naming: str = ORBAX.naming,
  wrapping: str = "",
) -> None:
  """Writes an Orbax tree. The write is atomic: `save_dir` is either unchanged or holds the complete checkpoint.

  The arrays have the names and layouts of the family's "orbax" weight table; for Gemma these are the ones of Google's
  trees. If the family has no such table, the arrays have the names and layouts of the parameters:
  `layers.0.attn.q_proj.w` is the leaf `["layers"]["0"]["attn"]["q_proj"]["w"]`. Host memory holds one parameter at a
  time, or those that one fused array consists of.

  Args:
    parameters: shapes and dtypes of the parameters, by name.
    get: a parameter's name -> its array.
    save_dir: directory to write; it may be missing or empty.
    family: family of the model.
    config: configuration of the model.
    base: the files that the model was loaded from. Fields of config.json that `config` does not have are copied from
      it. If its weights are an Orbax tree, this also decides which arrays are fused, and arrays that the model does not
      have are copied from it.
    dtype: dtype in which floating-point parameters are written; None keeps the dtype of each.
    overwrite: whether `save_dir` may hold files. Weights and files of the same names are replaced, all others stay.
    on_total: called once with the number of bytes that will be written.
    on_bytes: called with the number of bytes of each write.
    naming: the naming scheme to write: that of the family's weight table of this name.
    wrapping: what the names of all arrays begin with, such as "params.".

  Raises:
    CheckpointError: if `base` is broken or of another architecture.
    ConfigError: if the parameters have other names or shapes than the configuration gives a model, config.json cannot
      express the configuration, or the family has no table for the naming scheme.
    MissingExtraError: if TensorStore is not installed.
    SaveError: if `save_dir` holds files and `overwrite` is false, or keeps weights that would be loaded instead of the
      tree, has a backslash in its path, or is not a directory of this machine; if another process is writing it, a value does not fit `dtype`, the file
      system refuses the write, or there are several processes.
    TypeError: if `dtype` is not a floating-point type.
  """
  if not isinstance(save_dir, str | os.PathLike):
    raise SaveError(
      f"{save_dir.path}: an Orbax tree is written to a directory of this machine only: write it there and copy it, or "
      "save safetensors"
    )
  if jax.process_count() > 1:
    raise SaveError(
      f"{os.fspath(save_dir)}: {jax.process_count()} processes cannot write an Orbax tree together: save safetensors, "
      "or run a single process"
    )
  _check_target(local_path(os.fspath(save_dir)), overwrite)
  parameters, get = by_layer(parameters, get)
  shapes = {name: shaped.shape for name, shaped in parameters.items()}
  table = family.table_of(ORBAX, shapes, naming)
  tree = None if base is None else base.in_format(ORBAX)
  if tree is not None and family.tables_for(ORBAX, tree.tensors, shapes)[0].rows != table.rows:
    # The names in a tree of another naming scheme say nothing about this one.
    tree = None
  tensors = plan_save(parameters, table, config=config, base=tree, dtype=as_dtype(dtype))
  check_shapes(parameters, family, config)
  tensors = [dataclasses.replace(tensor, name=wrapping + tensor.name) for tensor in tensors]
  files = None if base is None else base.files
  texts = {CONFIG: config_text(family, config, files, parameters, tensors)}
  with contextlib.ExitStack() as stack:
    directory = stack.enter_context(
      shared_directory(os.fspath(save_dir), overwrite, sum(tensor.nbytes for tensor in tensors))
    )
    reader = None if base is None else stack.enter_context(base.open_reader(tensors))
    write_tree(directory, tensors, get, reader=reader, on_total=on_total, on_bytes=on_bytes)
    copy_companions(directory, files)
    write_texts(directory, texts)


def _check_target(target: str, overwrite: bool) -> None:
  """Refuses a directory in which the tree would be lost, or would not be what is loaded."""
  if "\\" in target:
    raise SaveError(
      f"{target}: TensorStore takes a backslash for a slash, and would write elsewhere: give another path"
    )
  if overwrite and os.path.isdir(target):
    kept = sorted(set(weight_files(LocalFiles(target))) - checkpoint_entries(target))
    if kept:
      raise SaveError(
        f"{target} holds {', '.join(kept)}, which would be loaded instead of the Orbax tree: move it away, or give "
        "another path"
      )
