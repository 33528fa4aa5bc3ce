"""A checkpoint in another form: tensor by tensor, so that no more than one parameter is in memory at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from models_automodel.automodel import AutoModel
from models_automodel.errors import source_errors
from models_automodel.finding import find
from models_automodel.saving import save
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.loader import load_arrays
from models_core.plan import LoadPlan


@dataclasses.dataclass(frozen=True)
class Conversion:
  """What a writer of a dialect gets.

  Attributes:
    plan: of the source.
    get: a parameter's name -> its array, read when it is asked for.
    family: of the model.
    config: of the model.
  """

  plan: LoadPlan
  get: Callable[[str], jax.Array]
  family: Family
  config: Any


def _to_huggingface(conversion: Conversion, target: str, **options: Any) -> None:
  parameters = {
    planned.parameter.name: jax.ShapeDtypeStruct(planned.parameter.shape, planned.dtype)
    for planned in conversion.plan.parameters
  }
  # What the model has no place for comes along from a checkpoint on this machine.
  base = conversion.plan.checkpoint.files
  save(
    parameters,
    conversion.get,
    target,
    family=conversion.family,
    config=conversion.config,
    base=base,
    **options,
  )


# Dialect -> what writes it.
WRITERS: Mapping[str, Callable[..., None]] = {"huggingface": _to_huggingface}


def convert(
  source: str,
  target: str | os.PathLike,
  *,
  dialect: str = "huggingface",
  dtype: Any = None,
  max_shard_size: int | str = "5GB",
  overwrite: bool = False,
  progress: bool = True,
  **where: Any,
) -> None:
  """Writes a checkpoint anew: of GGUF, of another dtype, of other shards.

  Args:
    source: as `from_pretrained` takes it.
    target: a directory, missing or empty.
    dialect: to be written, a key of WRITERS.
    dtype: of floating-point parameters; None keeps each as it is stored.
    max_shard_size: bytes of tensor data in a file.
    overwrite: whether `target` may hold something.
    progress: show progress bars on a terminal.
    **where: arguments of `from_pretrained` that say where the source is, such as `revision`.

  Raises:
    ConfigError: if nothing writes the dialect.
    ModelsError: as `from_pretrained` and `save_pretrained` do.
  """
  if dialect not in WRITERS:
    raise ConfigError(f"nothing writes the dialect {dialect!r}; known are {', '.join(WRITERS)}")
  found = find(source, progress=progress, **where)
  plan = AutoModel.plan(source, dtype=dtype, progress=progress, **where)
  by_name = {planned.parameter.name: planned for planned in plan.parameters}

  def get(name: str) -> jax.Array:
    # A tied head is compared once.
    ties = plan.ties if by_name[name] is plan.parameters[0] else ()
    with source_errors():
      return load_arrays(dataclasses.replace(plan, parameters=(by_name[name],), ties=ties))[name]

  with source_errors():
    plan.checkpoint.files.fetch(plan.files)
    WRITERS[dialect](
      Conversion(plan, get, found.family, found.config),
      os.fspath(target),
      max_shard_size=max_shard_size,
      dtype=None,
      overwrite=overwrite,
      progress=progress,
    )
