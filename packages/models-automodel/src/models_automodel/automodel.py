"""AutoModel: from a model id or a directory to a model on a mesh, and back to a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable, Collection
from typing import Any, Unpack

from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from models_automodel import intermediate
from models_automodel.adapters import base_error, base_of, merge_adapter
from models_automodel.errors import ModelNameError, SourceFilesError, source_errors
from models_automodel.families import family_of_config, register
from models_automodel.finding import AdapterFoundError, find
from models_automodel.keywords import ConfigFields, Keywords
from models_automodel.overrides import cut, override
from models_automodel.progress import weights_bar
from models_automodel.revision import agree_on_revision
from models_automodel.targets import check_place, files_at, open_target
from models_automodel.text import with_tokenizer
from models_automodel.where import ModelSource, Where
from models_core.adapters import Adapter, fingerprint_of, load_peft_adapter, merged_model
from models_core.dtypes import as_dtype
from models_core.errors import CheckpointError, ConfigError, ModelsError
from models_core.family import Family
from models_core.formats import SAFETENSORS, Checkpoint, Files, RangeFiles, read_ahead
from models_core.layers import CausalLM
from models_core.loading import AbstractModel, LoadPlan, abstract_model, load_arrays, log_notes, plan_load
from models_core.processes import processes_of, together
from models_core.saving import Base, flatten, is_companion, path_of, save_parameters_to_safetensors
from models_core.score_model import ScoreModel, family_of, score_family
from models_core.shard_cache import ShardCache
from models_core.sharding import check_mesh, check_mesh_of_plan
from models_core.weights import letter_sizes

_log = logging.getLogger(__name__)

# Default of `max_cache_size`.
MAX_CACHE_SIZE = "100GB"


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
    file: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    intermediate_ckpt_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    max_cache_size: int | str = MAX_CACHE_SIZE,
    rng_seed: int | None = None,
    **kwargs: Unpack[Keywords],
  ) -> tuple[CausalLM, str]:
    """Loads a pretrained model onto a mesh.

    Args:
      model_id: a repository id on the hub or its address, "hf://org/repo@revision", a Kaggle handle such as "google/gemma-2/flax/gemma2-2b-it", an address in an
        object store such as "gs://bucket/dir", or a local directory or GGUF file. A `pathlib.Path` is always local.
        "org/repo:Q8_0" chooses a GGUF file, "org/repo/folder" a folder. A `Where` holds this and all other arguments up
        to `variant`. A LoRA adapter of peft is merged into the base that it names.
      mesh: a `jax.sharding.Mesh` with auto or explicit axes; None is one device.
      model_source: the source of the checkpoint. Local paths and addresses in object stores do not need it.
      model_path: a local directory or GGUF file, or an address in the source, to load instead of `model_id`.
      model_download_path: directory that downloads are kept in. Without it, a checkpoint in an object store is read in
        place, and nothing is written to the disk.
      revision: branch, tag or commit.
      token: the user's token for the source.
      progress: whether progress bars are shown on a terminal.
      file: which of several checkpoints: the name of a file or a pattern of names, such as "*Q8_0*".
      subfolder: path of the checkpoint's folder within the place.
      variant: of the weights, as in `model.fp16.safetensors`.
      intermediate_ckpt_dir: directory, or address in an object store, that keeps the loaded model as safetensors. The
        first call writes it; later calls load it instead of the source. It is never overwritten.
      cache_dir: directory of this machine that keeps the parameters as they lie on this process's devices. A later call of
        the same checkpoint, mesh, sharding, dtype and adapter puts them there from it. It has no effect where the
        checkpoint's own files can be used as they are; a note says so.
      max_cache_size: bytes that `cache_dir` may hold, as a number or like "100GB". What was not used for longest makes room.
      rng_seed: has no effect, because nothing in a pretrained model is random.
      **kwargs: one of the following, or a field of the model's configuration.
        dtype: of the floating-point parameters, such as "bfloat16"; None keeps each as it is stored.
        config: a configuration to use instead of the checkpoint's.
        ignore_config_keys: keys of config.json to leave out, where one is refused although the model's numbers do not
          depend on it: `["residual_multiplier"]`, or `["rope_scaling.factor"]` for a key of an object.
        layers: `range(n)` loads only the first n layers and reads nothing of the others, to debug a large model.
        strict_sharding: whether an axis that the mesh cannot shard is an error; otherwise it is replicated.

    Returns:
      The model, and the path of its files: a directory, or the address in an object store. For an adapter, it is the
      path of its base. A checkpoint with a score head gives a `models_core.score_model.ScoreModel`, for which type
      checkers need a `cast`.

    Raises:
      AdapterError: if an adapter does not fit its base, is of a kind that is not supported, or its tensors are not those
        that its configuration names.
      CheckpointError: lists all tensors that are missing, unexpected, duplicate or mis-shaped, before weights are read.
      ConfigError: if the configuration is incomplete, contradicts itself or asks for what is not implemented; if
        `intermediate_ckpt_dir` holds anything but the result of this call, or several processes use it.
      MissingFamilyError: if the architecture's package is not installed.
      ModelNameError: if the model is unknown or not supported.
      SaveError: if `intermediate_ckpt_dir` cannot be written; before anything is loaded, unless its disk fills up; if
        `cache_dir` is an address. A cache that cannot be written is noted.
      ShardingError: with `strict_sharding`, if the mesh cannot shard an axis.
      SourceFilesError: if the source cannot provide the files.
      TypeError: if a keyword argument is none of these, or a value has the wrong type.
      ValueError: if `layers` is not `range(n)` for an n up to the number of layers, or `max_cache_size` is not a size.
    """
    cached: dict[str, Any] = {"cache_dir": cache_dir, "max_cache_size": max_cache_size}
    where = as_where(
      model_id,
      model_source=model_source,
      model_path=model_path,
      model_download_path=model_download_path,
      revision=revision,
      token=token,
      progress=progress,
      file=file,
      subfolder=subfolder,
      variant=variant,
    )
    if intermediate_ckpt_dir is not None:
      intermediate.check_alone()
      kept, origin = intermediate.place_of(intermediate_ckpt_dir), intermediate.origin_of(where, kwargs)
      if intermediate.is_kept(kept, origin):
        known = Where(path_of(kept), ModelSource.LOCAL.value, progress=where.progress)
        return cls.from_pretrained(known, mesh, **cached, **kwargs)
      check_place(kept)
    prepared = prepare(where, mesh, **cached, **kwargs)
    model = prepared.load()
    if intermediate_ckpt_dir is not None:
      intermediate.keep(kept, model, _family_of_model(model, model.config), model.config, origin)
    return model, prepared.plan.checkpoint.files.path

  @classmethod
  def save_pretrained(
    cls,
    model: nnx.Module,
    save_dir: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    config: Any = None,
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    overwrite: bool = False,
    progress: bool = True,
    token: str | bool | None = None,
  ) -> None:
    """Writes a model as a directory that `from_pretrained` and transformers load.

    Whatever happens meanwhile, `save_dir` stays as it was or holds the whole checkpoint. Saving onto `base` is safe.
    Under several processes, all must call it.

    Args:
      model: a model of an installed family; its attribute `config` is the family's configuration.
      save_dir: directory to write, or address in an object store, such as "gs://bucket/folder"; it must be missing or
        empty unless `overwrite` is set.
      base: the checkpoint that the model came from, such as the path or address that `from_pretrained` returned. It provides what
        the model does not hold: the forms and names of tensors, a vision tower, tokenizer files, other fields of
        config.json. A base without safetensors provides only its companions. None writes only the weights and a
        config.json.
      config: the configuration of the model, in place of its attribute `config`, such as
        `dataclasses.replace(model.config, vocab_size=n)` after the embedding was resized by hand.
      max_shard_size: bytes of tensor data in a file, as a number or like "5GB".
      dtype: of the written floating-point parameters, such as "bfloat16"; None keeps the dtype of each.
      overwrite: whether `save_dir` may hold files. Weights and files of the same names are replaced, others stay.
      progress: whether a progress bar is shown on a terminal.
      token: the user's token for an object store.

    Raises:
      CheckpointError: if `base` is broken or of another architecture.
      ConfigError: if the model's parameters have other shapes than its configuration needs, or config.json cannot
        express the configuration.
      ModelsError: if the model belongs to no installed family.
      SaveError: if `save_dir` exists, is being written, cannot be written to at all, or the file system or the store
        refuses. It stays as it was.
      SourceFilesError: if a base in an object store cannot be read.
    """
    config = getattr(model, "config", None) if config is None else config
    if config is None:
      raise ModelsError(
        f"{type(model).__name__} has no attribute config: save_pretrained() needs a model of an installed family"
      )
    place = open_target(save_dir, token=token)
    arrays = flatten(nnx.state(model, nnx.Param))
    family = _family_of_model(model, config)
    with source_errors(), weights_bar(progress) as bar:
      came_from = None if base is None else Base.of(with_tokenizer(files_at(base, token=token)), SAFETENSORS)
      save_parameters_to_safetensors(
        arrays,
        arrays.__getitem__,
        place,
        family=family,
        config=config,
        base=came_from,
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
    mesh: Mesh | AbstractMesh | None = None,
    *,
    model_source: ModelSource | str = ModelSource.HUGGINGFACE,
    model_path: str | os.PathLike | None = None,
    model_download_path: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
    file: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: Any = None,
    config: Any = None,
    ignore_config_keys: Collection[str] = (),
    layers: range | None = None,
    strict_sharding: bool = False,
    **fields: Unpack[ConfigFields],
  ) -> LoadPlan:
    """Plans what `from_pretrained` would do. Reads only the configuration and the headers.

    Takes the arguments of `from_pretrained`, except those of its two caches and `rng_seed`, and raises the same errors.
    The mesh may be a `jax.sharding.AbstractMesh`, which needs no devices; such a plan cannot be loaded.
    """
    check_mesh_of_plan(mesh)
    where = as_where(
      model_id,
      model_source=model_source,
      model_path=model_path,
      model_download_path=model_download_path,
      revision=revision,
      token=token,
      progress=progress,
      file=file,
      subfolder=subfolder,
      variant=variant,
    )
    return _planned(
      where,
      mesh,
      None,
      dtype=dtype,
      config=config,
      ignore_config_keys=ignore_config_keys,
      layers=layers,
      strict_sharding=strict_sharding,
      **fields,
    )

  @staticmethod
  def register(family: Family) -> None:
    """Makes a family known to this process, without a package that announces it: in a notebook, or a test.

    A checkpoint whose config.json has one of the family's `model_types` then loads through AutoModel. To register a
    family of the same name again replaces it. A package announces its families by entry points `models.families`.

    Args:
      family: as `models_core.family.Family` describes it.

    Raises:
      MissingFamilyError: it is written for another version of the family contract, `FAMILY_API_VERSION`.
      ModelNameError: its name is that of an installed family, or a family of this project reads one of its
        `model_types`.
    """
    register(family)


def _planned(
  where: Where,
  mesh: Mesh | AbstractMesh | None,
  begin: Callable[[Checkpoint], None] | None,
  /,
  *,
  dtype: Any = None,
  config: Any = None,
  ignore_config_keys: Collection[str] = (),
  layers: range | None = None,
  strict_sharding: bool = False,
  **fields: Unpack[ConfigFields],
) -> LoadPlan:
  """The plan of a checkpoint. `begin` is called with its headers, once they are read; all else is as for `AutoModel.plan`."""
  where = agree_on_revision(mesh, where, functools.partial(_open, where))
  with together(mesh):
    found = find(where, config, ignore_config_keys)
    whole = override(found.config, fields, _keywords())
    final = cut(whole, layers)
    with source_errors():
      checkpoint = found.checkpoint
      if begin is not None:
        begin(checkpoint)
    family = family_of(found.family, checkpoint)
    model = abstract_model(family.model_class, final, mesh, strict=strict_sharding)
    # A tensor that holds all layers still holds those that were cut.
    model = dataclasses.replace(model, letters=letter_sizes(whole))
    shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
    try:
      plan = plan_load(
        checkpoint,
        model,
        family.tables_for(checkpoint.format, checkpoint.tensors, shapes)[0],
        dtype=as_dtype(dtype),
        layers=None if layers is None else len(layers),
        raw=found.raw,
      )
    except CheckpointError as error:
      if not found.guess or checkpoint.problems:
        raise
      raise CheckpointError(error.where, [found.guess, *error.problems]) from None
    return dataclasses.replace(plan, family=family, config=final)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A model whose files are found and whose headers are read, but no weights.

  Attributes:
    plan: of the model; of the base, for an adapter.
    adapter: that is merged into the base, or None.
    mesh: of the model, or None.
    progress: whether progress bars are shown on a terminal.
    cache: of loaded parameters, or None.
    ignored: keys of config.json that were left out.
  """

  plan: LoadPlan
  adapter: Adapter | None
  mesh: Mesh | None
  progress: bool
  cache: ShardCache | None = None
  ignored: tuple[str, ...] = ()

  def load(self) -> Any:
    """Fetches the files, and loads the model.

    Raises:
      ModelsError: as `AutoModel.from_pretrained`.
    """
    files = self.plan.checkpoint.files
    with source_errors():
      with together(self.mesh):
        if not isinstance(files, RangeFiles):
          wanted = self.plan.files_of_process
          files.fetch([name for name in files.names() if name in wanted or is_companion(name)])
      log_notes(self.plan)
      if self.cache is None or (self.adapter is None and not self.cache.helps(self.plan)):
        return self._made()
      also = repr(self.ignored).encode() if self.ignored else b""
      also += b"" if self.adapter is None else fingerprint_of(self.adapter)
      return self.cache.load(self.plan, self._structure(), self._made, also=also)

  def _made(self) -> Any:
    """The model, read from its files and merged with the adapter."""
    with weights_bar(self.progress) as bar:
      bar.reset(self.plan.stored_nbytes)
      model: Any = self.plan.model.fill(load_arrays(self.plan, on_bytes=bar.update))
    return model if self.adapter is None else merge_adapter(model, self.adapter)

  def _structure(self) -> AbstractModel:
    """The model without its arrays."""
    plan, adapter = self.plan, self.adapter
    if adapter is None or plan.family is None or adapter.keeps_shapes:
      return plan.model
    return merged_model(plan.config, adapter, plan.family, self.mesh)


def prepare(
  where: Where,
  mesh: Mesh | None,
  *,
  cache_dir: str | os.PathLike | None = None,
  max_cache_size: int | str = MAX_CACHE_SIZE,
  **kwargs: Any,
) -> Prepared:
  """Does all of `AutoModel.from_pretrained` that needs no weights, but for those of an adapter.

  Raises:
    CheckpointError: if an adapter's base is not stated or cannot be found.
    ConfigError: if only some layers of an adapter's base are asked for.
    ModelsError: as `AutoModel.plan`.
    ValueError: if `max_cache_size` is not a size.
  """
  check_mesh(mesh)
  cache = None if cache_dir is None else ShardCache.of(cache_dir, max_cache_size)
  ignored = tuple(sorted(kwargs.get("ignore_config_keys", ())))
  begin = _read_ahead if cache is None and (mesh is None or len(processes_of(mesh)) == 1) else None
  with contextlib.suppress(AdapterFoundError):
    return Prepared(_planned(where, mesh, begin, **kwargs), None, mesh, where.progress, cache, ignored)
  where = agree_on_revision(mesh, where, functools.partial(_open, where))
  with together(mesh):
    files = _open(where)
    base = base_of(where, files)
    if kwargs.get("layers") is not None:
      raise ConfigError(f"{files.path} is a LoRA adapter: layers= is for models; load {base.model_id} alone")
  try:
    plan = _planned(base, mesh, begin, **kwargs)
  except (ConfigError, ModelNameError, SourceFilesError) as error:
    raise base_error(files, base.model_id, error) from error
  assert plan.family is not None
  with together(mesh), source_errors():
    adapter = load_peft_adapter(files, plan.family, plan.config)
  _log.warning("%s: a LoRA adapter, merged into its base %s", files.path, plan.checkpoint.files.path)
  return Prepared(plan, adapter, mesh, where.progress, cache, ignored)


def _read_ahead(checkpoint: Checkpoint) -> None:
  """Has the system begin to read a checkpoint's files."""
  tensors = (part for info in checkpoint.tensors.values() for part in info.stored)
  read_ahead(checkpoint.files, list(dict.fromkeys(part.file for part in tensors)))


def _family_of_model(model: Any, config: Any) -> Family:
  family = family_of_config(config, type(model).__name__)
  return score_family(family, model.score.w.shape[0]) if isinstance(model, ScoreModel) else family


def _open(where: Where) -> Files:
  """The files at a place."""
  with source_errors():
    return where.open_files()


def _keywords() -> tuple[str, ...]:
  """Names of all keyword arguments of `from_pretrained` and `plan`, without fields of a configuration."""
  signatures = (inspect.signature(function) for function in (AutoModel.from_pretrained, AutoModel.plan))
  parameters = [parameter for signature in signatures for parameter in signature.parameters.values()]
  return tuple(dict.fromkeys(p.name for p in parameters if p.kind is not p.VAR_KEYWORD))


def as_where(model_id: str | os.PathLike | Where, **arguments: Any) -> Where:
  """Combines a model id and the arguments about its source.

  Raises:
    TypeError: if `model_id` is a Where and an argument sets one of its fields.
  """
  if not isinstance(model_id, Where):
    return Where.of(model_id, **arguments)
  defaults = inspect.signature(Where.of).parameters
  if given := [name for name, value in arguments.items() if value != defaults[name].default]:
    raise TypeError(
      f"{', '.join(given)}: these are fields of the Where already; set them there, with dataclasses.replace"
    )
  return model_id
