"""From a model id or a directory to a model on a mesh."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import tqdm
from flax import nnx
from jax.sharding import Mesh

from models_automodel import intermediate
from models_automodel.errors import source_errors
from models_automodel.families import family_of_config
from models_automodel.finding import Found, find, is_companion
from models_automodel.overrides import cut, override
from models_automodel.revision import agree_on_revision
from models_automodel.saving import companions_of, weights_bar
from models_automodel.where import ModelSource, Where
from models_core.dtypes import as_dtype
from models_core.errors import ModelsError
from models_core.formats import SAFETENSORS, RangeFiles
from models_core.loading import LoadPlan, abstract_model, files_of_process, load, plan_load
from models_core.processes import together
from models_core.saving import Base, flatten, save_parameters_to_safetensors
from models_core.sharding import check_mesh


class AutoModel:
  """Pretrained models of every installed family."""

  @classmethod
  def from_pretrained(
    cls,
    model_id: str | os.PathLike | Where,
    mesh: Mesh | None = None,
    *,
    model_source: ModelSource | str = ModelSource.HUGGINGFACE,
    model_path: str | os.PathLike | None = None,
    model_download_path: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
    intermediate_ckpt_dir: str | os.PathLike | None = None,
    rng_seed: int | None = None,
    **kwargs: Any,
  ) -> tuple[nnx.Module, str]:
    """Loads a model.

    Args:
      model_id: of the hub, a Kaggle handle such as "google/gemma-2/flax/gemma2-2b-it", an address of an object store such
        as "gs://bucket/dir", or a local directory or GGUF file. A `pathlib.Path` is always local. Or a `Where`, which
        says all that the other arguments up to `progress` say.
      mesh: of either kind; None is one device.
      model_source: where the checkpoint lies. A local path and an address of a store need none.
      model_path: a local directory or GGUF file, or an address of the source, to load instead.
      model_download_path: the source's cache directory. Without it a checkpoint in a store is read where it lies, and
        nothing is written to the disk.
      revision: branch, tag or commit.
      token: of the hub.
      progress: show progress bars on a terminal.
      intermediate_ckpt_dir: directory that keeps the loaded model as safetensors: made by the first call, loaded by
        later ones instead of the source. Never overwritten.
      rng_seed: has no effect: nothing of a pretrained model is random.
      **kwargs: as listed below, or fields of the model's configuration.
        dtype: of the parameters, such as "bfloat16"; None keeps each as it is stored.
        config: a configuration to use instead of the checkpoint's.
        layers: `range(n)` loads the first n layers alone, and reads nothing else: for bringing a large model up.
        strict_sharding: raise where the mesh cannot hold a sharding instead of replicating that axis.

    Returns:
      The model and the path of its files: a directory, or the address in a store.

    Raises:
      CheckpointError: with all that is missing, unexpected, doubled or mis-shaped, before weights are read.
      ConfigError: if the configuration is incomplete, contradicts itself or asks for what is not implemented.
      MissingFamilyError: if the architecture's package is not installed.
      ModelNameError: for a model that is unknown or not supported.
      SourceFilesError: if the source cannot give the files.
      TypeError: for a keyword argument that is none of these, or a value of another kind.
    """
    where = _where(
      model_id,
      model_source=model_source,
      model_path=model_path,
      model_download_path=model_download_path,
      revision=revision,
      token=token,
      progress=progress,
    )
    if intermediate_ckpt_dir is not None:
      intermediate.check_alone()
      kept, origin = os.fspath(intermediate_ckpt_dir), intermediate.origin_of(where, kwargs)
      if intermediate.is_kept(kept, origin):
        local = Where(kept, ModelSource.LOCAL.value, progress=where.progress)
        return cls.from_pretrained(local, mesh, **kwargs)
    plan = cls.plan(where, mesh, **kwargs)
    files = plan.checkpoint.files
    hidden = None if where.progress else True  # None: bars on a terminal alone.
    with source_errors():
      with together(mesh):
        if not isinstance(files, RangeFiles):
          wanted = files_of_process(plan)
          files.fetch([name for name in files.names() if name in wanted or is_companion(name)])
      with tqdm.tqdm(
        total=plan.stored_nbytes, unit="B", unit_scale=True, desc="weights", disable=hidden
      ) as bar:
        model: Any = load(plan, on_bytes=bar.update)
    if intermediate_ckpt_dir is not None:
      intermediate.keep(kept, model, family_of_config(model.config, where.model_id), model.config, origin)
    return model, files.path

  @classmethod
  def save_pretrained(
    cls,
    model: nnx.Module,
    save_dir: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    overwrite: bool = False,
    progress: bool = True,
  ) -> None:
    """Writes a model as a directory that `from_pretrained` and transformers load.

    `save_dir` is what it was, or holds the whole checkpoint, whatever happens meanwhile. Saving onto `base` is safe.
    Under several processes all must call it.

    Args:
      model: of an installed family, with a `config`.
      save_dir: may be missing or empty.
      base: the directory of files that the model came from, such as the path that `from_pretrained` returned. What a
        model does not know is taken from it: forms and prefixes of names, a vision tower, tokenizer files, fields of
        config.json. Of a base without safetensors only the tokenizer's and other files. None writes the weights and
        a config.json alone.
      max_shard_size: bytes of tensor data in a file, as a number or like "5GB".
      dtype: that floating-point parameters are written in, such as "bfloat16"; None keeps each as it is.
      overwrite: whether `save_dir` may hold something. Weights and files of the same names are replaced, others stay.
      progress: show a progress bar on a terminal.

    Raises:
      CheckpointError: if `base` is broken or of another architecture.
      ConfigError: if config.json cannot state the model's configuration.
      ModelsError: if the model belongs to no installed family.
      SaveError: if `save_dir` exists, is being written, or the file system refuses. It is as it was.
    """
    config = getattr(model, "config", None)
    if config is None:
      raise ModelsError(f"{type(model).__name__} has no config: save_pretrained() takes models of a family")
    arrays = flatten(nnx.state(model, nnx.Param))
    family = family_of_config(config, type(model).__name__)
    came_from = None if base is None else Base.of(base, SAFETENSORS)
    with weights_bar(progress) as bar:
      save_parameters_to_safetensors(
        arrays,
        arrays.__getitem__,
        save_dir,
        family=family,
        config=config,
        base=came_from,
        companions=() if came_from is None else companions_of(came_from.files),
        dtype=as_dtype(dtype),
        overwrite=overwrite,
        on_total=bar.reset,
        on_bytes=bar.update,
        max_shard_size=max_shard_size,
      )

  @classmethod
  def plan(
    cls,
    model_id: str | os.PathLike | Where,
    mesh: Mesh | None = None,
    *,
    model_source: ModelSource | str = ModelSource.HUGGINGFACE,
    model_path: str | os.PathLike | None = None,
    model_download_path: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
    dtype: Any = None,
    config: Any = None,
    layers: range | None = None,
    strict_sharding: bool = False,
    **fields: Any,
  ) -> LoadPlan:
    """What `from_pretrained` would do, from the configuration and the headers alone. Same arguments and errors."""
    check_mesh(mesh)
    where = _where(
      model_id,
      model_source=model_source,
      model_path=model_path,
      model_download_path=model_download_path,
      revision=revision,
      token=token,
      progress=progress,
    )
    where = agree_on_revision(mesh, where, lambda: find(where, config).files)
    with together(mesh):
      return cls._plan(find(where, config), mesh, dtype, layers, strict_sharding, fields)

  @staticmethod
  def _plan(
    found: Found,
    mesh: Mesh | None,
    dtype: Any,
    layers: range | None,
    strict_sharding: bool,
    fields: dict[str, Any],
  ) -> LoadPlan:
    final = cut(override(found.config, fields, _keywords()), layers)
    model = abstract_model(found.family.model_class, final, mesh, strict=strict_sharding)
    with source_errors():
      checkpoint = found.checkpoint
    shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
    plan = plan_load(
      checkpoint,
      model,
      found.family.table_of(checkpoint.format, shapes),
      dtype=as_dtype(dtype),
      layers=None if layers is None else len(layers),
    )
    return dataclasses.replace(plan, family=found.family, config=final)


def _keywords() -> tuple[str, ...]:
  """Names of the arguments of `from_pretrained`, also of those that it hands on to `plan`; no fields."""
  signatures = (inspect.signature(function) for function in (AutoModel.from_pretrained, AutoModel.plan))
  parameters = [parameter for signature in signatures for parameter in signature.parameters.values()]
  return tuple(dict.fromkeys(p.name for p in parameters if p.kind is not p.VAR_KEYWORD))


def _where(model_id: str | os.PathLike | Where, **arguments: Any) -> Where:
  """What the arguments say together.

  Raises:
    TypeError: if a Where comes with arguments that say the same.
  """
  if not isinstance(model_id, Where):
    return Where.of(model_id, **arguments)
  defaults = inspect.signature(Where.of).parameters
  if given := [name for name, value in arguments.items() if value != defaults[name].default]:
    raise TypeError(f"{', '.join(given)}: a Where says this itself; use dataclasses.replace to change it")
  return model_id
