"""A checkpoint in another form: tensor by tensor, so that no more than one parameter is in memory at a time."""

from __future__ import annotations

import logging
import os
from typing import Any

import jax

from models_automodel.automodel import AutoModel
from models_automodel.errors import source_errors
from models_automodel.saving import companions_of, weights_bar
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
  overwrite: bool = False,
  progress: bool = True,
) -> None:
  """Writes a checkpoint anew: of GGUF, of an Orbax tree or as one, of another dtype, of other shards.

  Args:
    source: as `from_pretrained` takes it, or a `Where`. It is identified once: all that is written is of one version.
    target: a directory, missing or empty.
    to: the naming scheme to be written, a key of `models_core.saving.WRITERS`: "huggingface", safetensors files as
      transformers has them; "orbax", a tree that Orbax restores, of Gemma with Google's names.
    dtype: of floating-point parameters; None keeps each as it is stored.
    max_shard_size: bytes of tensor data in a safetensors file; None is "5GB". An Orbax tree has no such limit.
    overwrite: whether `target` may hold something.
    progress: show progress bars on a terminal.

  Raises:
    ConfigError: if nothing writes the naming scheme, or its files have no maximal size.
    ModelsError: as `from_pretrained` and `save_pretrained` do.
  """
  if (writer := WRITERS.get(to)) is None:
    raise ConfigError(f"nothing writes the naming scheme {to!r}; known are {', '.join(WRITERS)}")
  options: dict[str, Any] = {}
  if max_shard_size is not None:
    if not writer.has_shards:
      raise ConfigError(f"max_shard_size is {max_shard_size!r}, but {to} has no such files: leave it out")
    options["max_shard_size"] = max_shard_size
  where = source if isinstance(source, Where) else Where.of(source, progress=progress)
  plan = AutoModel.plan(where, dtype=dtype)
  files = plan.checkpoint.files
  if writer.format is not plan.checkpoint.format and (notes := plan.notes()):
    _log.warning("\n".join([f"{files.path}:", *notes]))
  shapes = {
    planned.parameter.name: jax.ShapeDtypeStruct(planned.parameter.shape, planned.dtype)
    for planned in plan.parameters
  }
  # The first read fetches the files: what the writer refuses before costs no download.
  with source_errors(), plan.open() as opened, weights_bar(progress) as bar:
    writer.save(
      shapes,
      opened.read,
      os.fspath(target),
      family=plan.family,
      config=plan.config,
      # What the model has no parameter for comes along.
      base=Base(files, plan.checkpoint, lambda: opened.reader),
      companions=companions_of(files),
      overwrite=overwrite,
      on_total=bar.reset,
      on_bytes=bar.update,
      **options,
    )
