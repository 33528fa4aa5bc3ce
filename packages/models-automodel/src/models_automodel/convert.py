"""Converts a checkpoint parameter by parameter, so that only one of them is in host memory at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Any

import jax

from models_automodel.automodel import AutoModel
from models_automodel.errors import SaveError, source_errors
from models_automodel.progress import weights_bar
from models_automodel.targets import check_place, open_target
from models_automodel.text import with_tokenizer
from models_automodel.where import Where
from models_core.errors import ConfigError
from models_core.formats import SAFETENSORS
from models_core.saving import WRITERS, Base

_log = logging.getLogger(__name__)


def convert(
  source: str | os.PathLike | Where,
  target: str | os.PathLike,
  *,
  to: str = SAFETENSORS.naming,
  dtype: Any = None,
  max_shard_size: int | str | None = None,
  ignore_config_keys: Collection[str] = (),
  overwrite: bool = False,
  progress: bool = True,
  file: str | None = None,
  subfolder: str | None = None,
  variant: str | None = None,
) -> None:
  """Converts a checkpoint: from GGUF, from or to an Orbax tree, to another dtype or shard size.

  Args:
    source: a model id, path or address as `from_pretrained` takes it, or a `Where`. Its version is pinned once, so all
      written files come from one version.
    target: directory to write, or address in an object store, such as "gs://bucket/folder"; it must be missing or empty
      unless `overwrite` is set.
    to: the naming scheme to write, a key of `models_core.saving.WRITERS`: "huggingface" writes safetensors files that
      transformers loads; "orbax" writes a tree that Orbax restores, for Gemma under Google's names; "maxtext" writes one
      that MaxText loads, of Llama and Qwen.
    dtype: of the written floating-point parameters; None keeps each as it is stored.
    max_shard_size: bytes of tensor data in a safetensors file; None is "5GB". Must be None for an Orbax tree.
    ignore_config_keys: keys of config.json to leave out, as `from_pretrained` takes them.
    overwrite: whether `target` may hold files. Weights and files of the same names are replaced, others stay.
    progress: whether progress bars are shown on a terminal.
    file: which of several checkpoints of the source, as `from_pretrained` takes it; a `Where` has its own.
    subfolder: of the source.
    variant: of the source's weights.

  Raises:
    ConfigError: if the naming scheme cannot be written, or `max_shard_size` does not apply to it.
    SaveError: if the target cannot be written; before anything is read where that can be seen.
    ModelsError: as `from_pretrained` and `save_pretrained` raise it.
  """
  if (writer := WRITERS.get(to)) is None:
    raise ConfigError(f"the naming scheme {to!r} cannot be written: choose one of {', '.join(WRITERS)}")
  options: dict[str, Any] = {}
  if max_shard_size is not None:
    if not writer.has_shards:
      raise ConfigError(
        f"max_shard_size is {max_shard_size!r}, but {to} checkpoints are not split into files by size: leave it out"
      )
    options["max_shard_size"] = max_shard_size
  place = open_target(target)
  if not isinstance(place, str | os.PathLike) and not writer.has_targets:
    raise SaveError(
      f"{place.path}: the naming scheme {to!r} is written to a directory of this machine only: write it there and copy it, "
      f"or leave --to out"
    )
  check_place(place, overwrite=overwrite)
  where = source
  if not isinstance(where, Where):
    where = Where.of(where, progress=progress, file=file, subfolder=subfolder, variant=variant)
  plan = AutoModel.plan(where, dtype=dtype, ignore_config_keys=ignore_config_keys)
  files = plan.checkpoint.files
  # In the same format, tensors that the model does not need are copied.
  notes = plan.checkpoint.notes if writer.format is plan.checkpoint.format else plan.notes()
  if notes:
    _log.warning("\n".join([f"{files.path}:", *notes]))
  shapes = {
    planned.parameter.name: jax.ShapeDtypeStruct(planned.parameter.shape, planned.dtype)
    for planned in plan.parameters
  }
  with source_errors(), plan.open() as opened, weights_bar(progress) as bar:
    writer.save(
      shapes,
      opened.read,
      place,
      family=plan.family,
      config=plan.config,
      # Tensors that the model has no parameter for are copied from here.
      base=Base(with_tokenizer(files, plan.checkpoint), plan.checkpoint, lambda: opened.reader),
      overwrite=overwrite,
      on_total=bar.reset,
      on_bytes=bar.update,
      **options,
    )
