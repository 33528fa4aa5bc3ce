"""A checkpoint in another form: tensor by tensor, so that no more than one parameter is in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from models_automodel.automodel import AutoModel
from models_automodel.errors import source_errors
from models_automodel.finding import find
from models_automodel.saving import companions_of, save, weights_bar
from models_core.errors import ConfigError
from models_core.family import Family
from models_core.formats import RangeFiles
from models_core.loading import LoadPlan, load_arrays
from models_core.saving import save_parameters_to_orbax

_log = logging.getLogger(__name__)


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

  @property
  def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by name."""
    return {
      planned.parameter.name: jax.ShapeDtypeStruct(planned.parameter.shape, planned.dtype)
      for planned in self.plan.parameters
    }


def _to_huggingface(
  conversion: Conversion, target: str, *, overwrite: bool, progress: bool, max_shard_size: int | str = "5GB"
) -> None:
  save(
    conversion.parameters,
    conversion.get,
    target,
    family=conversion.family,
    config=conversion.config,
    # What the model has no place for comes along.
    base=conversion.plan.checkpoint.files,
    max_shard_size=max_shard_size,
    dtype=None,
    overwrite=overwrite,
    progress=progress,
  )


def _to_orbax(conversion: Conversion, target: str, *, overwrite: bool, progress: bool) -> None:
  checkpoint = conversion.plan.checkpoint
  with weights_bar(progress) as bar:
    save_parameters_to_orbax(
      conversion.parameters,
      conversion.get,
      target,
      family=conversion.family,
      config=conversion.config,
      base=checkpoint,
      companions=companions_of(checkpoint.files),
      overwrite=overwrite,
      on_total=bar.reset,
      on_bytes=bar.update,
    )


# Dialect -> what writes it.
WRITERS: Mapping[str, Callable[..., None]] = {"huggingface": _to_huggingface, "orbax": _to_orbax}
# Dialects whose files have a size that one can choose.
_SHARDED = frozenset({"huggingface"})


def convert(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  dialect: str = "huggingface",
  dtype: Any = None,
  max_shard_size: int | str | None = None,
  overwrite: bool = False,
  progress: bool = True,
  **where: Any,
) -> None:
  """Writes a checkpoint anew: of GGUF, of an Orbax tree or as one, of another dtype, of other shards.

  Args:
    source: as `from_pretrained` takes it.
    target: a directory, missing or empty.
    dialect: to be written, a key of WRITERS: "huggingface", safetensors files as transformers has them; "orbax", a
      tree that Orbax restores, of Gemma with Google's names.
    dtype: of floating-point parameters; None keeps each as it is stored.
    max_shard_size: bytes of tensor data in a safetensors file; None is "5GB". An Orbax tree has no such limit.
    overwrite: whether `target` may hold something.
    progress: show progress bars on a terminal.
    **where: arguments of `from_pretrained` that say where the source is, such as `revision`.

  Raises:
    ConfigError: if nothing writes the dialect, or it has no shards.
    ModelsError: as `from_pretrained` and `save_pretrained` do.
  """
  if dialect not in WRITERS:
    raise ConfigError(f"nothing writes the dialect {dialect!r}; known are {', '.join(WRITERS)}")
  options: dict[str, Any] = {}
  if max_shard_size is not None:
    if dialect not in _SHARDED:
      raise ConfigError(
        f"max_shard_size is {max_shard_size!r}, but {dialect} has no such files: leave it out"
      )
    options["max_shard_size"] = max_shard_size
  found = find(source, progress=progress, **where)
  plan = AutoModel.plan(source, dtype=dtype, progress=progress, **where)
  files = plan.checkpoint.files
  if dialect != plan.checkpoint.dialect and (notes := plan.notes()):
    _log.warning("\n".join([f"{files.path}:", *notes]))
  parts = {part.parameters[0].parameter.name: part for part in _parts(plan)}

  @functools.cache
  def fetch() -> None:
    if not isinstance(files, RangeFiles):
      files.fetch(plan.files)

  def get(name: str) -> jax.Array:
    with source_errors():
      # Not before the writer is ready: what it refuses costs no download.
      fetch()
      return load_arrays(parts[name])[name]

  with source_errors():
    conversion = Conversion(plan, get, found.family, found.config)
    WRITERS[dialect](conversion, os.fspath(target), overwrite=overwrite, progress=progress, **options)


def _parts(plan: LoadPlan) -> Iterator[LoadPlan]:
  """A plan for each parameter, of the tensors that it takes alone."""
  tensors = plan.checkpoint.tensors
  for planned in plan.parameters:
    # A tied head is compared once.
    ties = plan.ties if planned is plan.parameters[0] else ()
    names = [piece.tensor for piece in planned.pieces] + [n for tie in ties for n in (tie.tensor, tie.twin)]
    checkpoint = dataclasses.replace(plan.checkpoint, tensors={name: tensors[name] for name in names})
    yield dataclasses.replace(plan, checkpoint=checkpoint, parameters=(planned,), ties=ties)
