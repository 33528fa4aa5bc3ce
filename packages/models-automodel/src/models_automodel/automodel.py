"""From a model id or a directory to a model on a mesh."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import functools
import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from jax.sharding import Mesh

import models_naming
import models_sources
from models_automodel import intermediate
from models_automodel.errors import ModelNameError, name_errors, source_errors
from models_automodel.families import (
  check_installed,
  family_module,
  family_of_config,
  family_of_model_type,
  installed,
  load_family,
)
from models_automodel.overrides import cut, override
from models_automodel.revision import agree_on_revision
from models_core.abstract import abstract_model
from models_core.checkpoint import Checkpoint, Files, RangeFiles, as_files
from models_core.errors import CheckpointError, ConfigError, ModelsError
from models_core.family import Family
from models_core.gguf import gguf_config, read_gguf
from models_core.loader import load
from models_core.orbax_checkpoint import find_orbax, read_orbax
from models_core.plan import LoadPlan, plan_load
from models_core.processes import together
from models_core.reading import files_of_process
from models_core.replace_directory import recover
from models_core.safetensors_headers import parse_json, read_safetensors
from models_core.safetensors_saver import flatten, save_parameters
from models_core.save_plan import Shaped


class ModelSource(enum.Enum):
  """Where a checkpoint lies."""

  HUGGINGFACE = "huggingface"
  KAGGLE = "kaggle"
  GCS = "gcs"
  S3 = "s3"
  INTERNAL = "internal"
  LOCAL = "local"


class ModelModule(enum.Enum):
  """A module of an architecture's package."""

  MODEL = "model"
  PARAMS = "params"
  PARAMS_SAFETENSORS = "params_safetensors"


# What belongs to a model besides its weights: whoever gets the directory finds them there.
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
               "vocab.json", "merges.txt", "added_tokens.json", "*.safetensors.index.json", "preprocessor_config.json",
               "processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")  # fmt: skip


def _is_companion(name: str) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in _COMPANIONS)


class AutoModel:
  """Pretrained models of every installed family."""

  @classmethod
  def from_pretrained(
    cls,
    model_id: str,
    mesh: Mesh | None = None,
    *,
    model_source: ModelSource | str = ModelSource.HUGGINGFACE,
    model_path: str | os.PathLike | None = None,
    model_download_path: str | None = None,
    intermediate_ckpt_dir: str | os.PathLike | None = None,
    rng_seed: int | None = None,
    **kwargs: Any,
  ) -> tuple[nnx.Module, str]:
    """Loads a model.

    Args:
      model_id: of the hub, a Kaggle handle such as "google/gemma-2/flax/gemma2-2b-it", an address of an object store such
        as "gs://bucket/dir", or a local directory or GGUF file.
      mesh: of either kind; None is one device.
      model_source: where the checkpoint lies. A local path and an address of a store need none.
      model_path: a local directory or GGUF file, or an address of the source, to load instead.
      model_download_path: the source's cache directory. Without it a checkpoint in a store is read where it lies, and
        nothing is written to the disk.
      intermediate_ckpt_dir: directory that keeps the loaded model as safetensors: made by the first call, loaded by
        later ones instead of the source. Never overwritten.
      rng_seed: has no effect: nothing of a pretrained model is random.
      **kwargs: as listed below, or fields of the model's configuration.
        dtype: of the parameters, such as "bfloat16"; None keeps each as it is stored.
        revision: branch, tag or commit.
        token: of the hub.
        config: a configuration to use instead of the checkpoint's.
        layers: `range(n)` loads the first n layers alone, and reads nothing else: for bringing a large model up.
        strict_sharding: raise where the mesh cannot hold a sharding instead of replicating that axis.
        progress: show progress bars on a terminal.

    Returns:
      The model and the path of its files: a directory, or the address in a store.

    Raises:
      CheckpointError: with all that is missing, unexpected, doubled or mis-shaped, before weights are read.
      ConfigError: if the configuration is incomplete, contradicts itself or asks for what is not implemented.
      MissingFamilyError: if the architecture's package is not installed.
      ModelNameError: for a model that is unknown or not supported.
      SourceFilesError: if the source cannot give the files.
      TypeError: for a keyword argument that is none of these.
    """
    progress = kwargs.get("progress", True)
    if intermediate_ckpt_dir is not None:
      intermediate.check_alone()
      kept, origin = os.fspath(intermediate_ckpt_dir), _origin(model_id, model_source, model_path, kwargs)
      if intermediate.is_kept(kept, origin):
        local = {key: value for key, value in kwargs.items() if key not in ("revision", "token")}
        return cls.from_pretrained(kept, mesh, model_source=ModelSource.LOCAL, **local)
    plan = cls.plan(
      model_id,
      mesh,
      model_source=model_source,
      model_path=model_path,
      model_download_path=model_download_path,
      **kwargs,
    )
    files = plan.checkpoint.files
    hidden = None if progress else True  # None: bars on a terminal alone.
    with source_errors():
      with together(mesh):
        if not isinstance(files, RangeFiles):
          wanted = files_of_process(plan)
          files.fetch([name for name in files.names() if name in wanted or _is_companion(name)])
      with tqdm.tqdm(
        total=plan.stored_nbytes, unit="B", unit_scale=True, desc="weights", disable=hidden
      ) as bar:
        model: Any = load(plan, on_bytes=bar.update)
    if intermediate_ckpt_dir is not None:
      intermediate.keep(kept, model, family_of_config(model.config, model_id), model.config, origin)
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
    save(arrays, arrays.__getitem__, save_dir, family=family, config=config, base=base,
         max_shard_size=max_shard_size, dtype=dtype, overwrite=overwrite, progress=progress)  # fmt: skip

  @classmethod
  def plan(
    cls,
    model_id: str,
    mesh: Mesh | None = None,
    *,
    model_source: ModelSource | str = ModelSource.HUGGINGFACE,
    model_path: str | os.PathLike | None = None,
    model_download_path: str | None = None,
    dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    config: Any = None,
    layers: range | None = None,
    strict_sharding: bool = False,
    progress: bool = True,
    **fields: Any,
  ) -> LoadPlan:
    """What `from_pretrained` would do, from the configuration and the headers alone. Same arguments and errors."""
    place = functools.partial(
      find,
      model_id,
      model_source=model_source,
      model_path=model_path,
      model_download_path=model_download_path,
      token=token,
      config=config,
      progress=progress,
    )
    revision = agree_on_revision(mesh, revision, lambda: place(revision=revision).files)
    with together(mesh):
      return cls._plan(place(revision=revision), mesh, dtype, layers, strict_sharding, fields)

  @staticmethod
  def _plan(
    found: Found,
    mesh: Mesh | None,
    dtype: Any,
    layers: range | None,
    strict_sharding: bool,
    fields: dict[str, Any],
  ) -> LoadPlan:
    known = (
      "dtype",
      "revision",
      "token",
      "config",
      "layers",
      "strict_sharding",
      "progress",
      "model_path",
      "model_source",
    )
    final = cut(override(found.config, fields, known), layers)
    model = abstract_model(found.family.model_class, final, mesh, strict=strict_sharding)
    with source_errors():
      checkpoint = found.checkpoint or read_safetensors(found.files)
    table = found.family.weights.get(checkpoint.dialect)
    if table is None:
      raise ConfigError(
        f"{found.files.path}: the family {found.family.name} does not read the {checkpoint.dialect} dialect"
      )
    return plan_load(
      checkpoint, model, table, dtype=_dtype(dtype), layers=None if layers is None else len(layers)
    )


def save(
  parameters: Mapping[str, Shaped],
  get: Callable[[str], Any],
  save_dir: str | os.PathLike,
  *,
  family: Family,
  config: Any,
  base: str | os.PathLike | Files | None,
  max_shard_size: int | str,
  dtype: Any,
  overwrite: bool,
  progress: bool,
) -> None:
  """As `AutoModel.save_pretrained`, of parameters that are made when they are needed: `get(name)`."""
  files = None if base is None else as_files(base)
  companions = [] if files is None else [name for name in files.names() if _is_companion(name)]
  hidden = None if progress else True  # None: bars on a terminal alone.
  with tqdm.tqdm(unit="B", unit_scale=True, desc="weights", disable=hidden) as bar:
    save_parameters(
      parameters,
      get,
      save_dir,
      max_shard_size,
      family=family,
      config=config,
      base=files,
      companions=[name for name in companions if not name.endswith(".index.json") and name != "config.json"],
      dtype=_dtype(dtype),
      overwrite=overwrite,
      on_bytes=bar.update,
    )


# What of a call does not change the numbers of its model.
_NO_MATTER = ("progress", "token", "strict_sharding")


def _origin(
  model_id: str, source: ModelSource | str, path: str | os.PathLike | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """What a call asks for, in words that can be compared."""
  place = {
    "model_id": model_id,
    "model_source": source.value if isinstance(source, ModelSource) else source,
    "model_path": None if path is None else os.fspath(path),
  }
  asked = {key: str(value) for key, value in arguments.items() if key not in _NO_MATTER and value is not None}
  if "dtype" in asked:
    asked["dtype"] = str(_dtype(arguments["dtype"]))
  return place | dict(sorted(asked.items()))


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint that was identified, of which at most the configuration and a GGUF's or Orbax tree's headers were read."""

  files: Files
  family: Family
  config: Any
  checkpoint: Checkpoint | None


def find(
  model_id: str,
  *,
  model_source: ModelSource | str = ModelSource.HUGGINGFACE,
  model_path: str | os.PathLike | None = None,
  model_download_path: str | None = None,
  revision: str | None = None,
  token: str | bool | None = None,
  config: Any = None,
  progress: bool = True,
) -> Found:
  """Identifies files, family and configuration. Arguments and errors as `from_pretrained`."""
  check_installed(model_id)
  with source_errors():
    files = _open_files(model_id, model_source, model_path, model_download_path, revision, token, progress)
    names = set(files.names())
    checkpoint = None
    if "config.json" in names:
      raw = _read_config_json(files)
    elif any(name.endswith(".gguf") for name in names):
      checkpoint = read_gguf(files)
      raw = gguf_config(checkpoint)
    else:
      raw = None
    if checkpoint is None and not any(name.endswith(".safetensors") for name in names) and has_orbax(files):
      checkpoint = read_orbax(files)
  if config is not None:
    return Found(files, family_of_config(config, model_id), config, checkpoint)
  if raw is None and checkpoint is not None:
    return Found(files, *preset_of(model_id, checkpoint), checkpoint)
  if raw is None:
    category, config = _by_name(model_id, files.path)
    return Found(files, load_family(category, model_id), config, None)
  model_type = raw.get("model_type")
  if not isinstance(model_type, str):
    raise ConfigError(f"{files.path}/config.json has no model_type: add it, or pass config=")
  family = family_of_model_type(model_type, model_id)
  return Found(files, family, family.read_config(raw), checkpoint)


def _open_files(
  model_id: str,
  model_source: ModelSource | str,
  model_path: str | os.PathLike | None,
  download_path: str | None,
  revision: str | None,
  token: str | bool | None,
  progress: bool,
) -> Files:
  # A string may name a source that another package announces.
  source = model_source.value if isinstance(model_source, ModelSource) else model_source
  place = os.fspath(model_path) if model_path is not None else model_id
  if (named := models_sources.source_of_address(place)) is not None:
    source = named
  elif source == "kaggle" and model_path is None:
    with name_errors():
      place = models_naming.kaggle_handle(model_id)
  elif not os.path.exists(os.path.expanduser(place)):
    # A saver that was killed may have left a directory between two renames.
    recover(place)
  if source == "huggingface" and (model_path is not None or os.path.exists(os.path.expanduser(place))):
    source = "local"
  module = models_sources.get_source(source)
  return module.open_files(
    place, revision=revision, token=token, download_path=download_path, progress=progress
  )


def has_orbax(files: Files) -> bool:
  """Whether an Orbax tree lies among the files."""
  return find_orbax(files) is not None


def preset_of(model_id: str, checkpoint: Checkpoint) -> tuple[Family, Any]:
  """Family and configuration of a checkpoint that has none: its name's preset, else the one that its shapes fit.

  Raises:
    ConfigError: if the name is unknown and no preset, or more than one, fits.
    MissingFamilyError: if the architecture's package is not installed.
  """
  try:
    category, config = _by_name(model_id, checkpoint.files.path)
    family = load_family(category, model_id)
    # Where the sizes differ, the plan says how.
    return family, _fit(family, config, checkpoint) or config
  except ModelNameError:
    pass
  # A model of one's own: its name says nothing, but all published sizes have shapes of their own.
  fitting: list[tuple[Family, str, Any]] = []
  tried: list[str] = []
  for category in installed():
    family = load_family(category, model_id)
    for name in presets(family.config_class) if checkpoint.dialect in family.weights else ():
      config = _fit(family, getattr(family.config_class, name)(), checkpoint)
      tried.append(name)
      if config is None or any(config == known for _, _, known in fitting):
        continue
      if _fits(family, config, checkpoint):
        fitting.append((family, name, config))
  if len(fitting) == 1:
    ((family, _, config),) = fitting
    return family, config
  found = (
    f"{', '.join(name for _, name, _ in fitting)} all have" if fitting else f"none of {', '.join(tried)} has"
  )
  raise ConfigError(
    f"{checkpoint.files.path} has no config.json, {model_id!r} names no known model, and {found} its shapes: pass config="
  )


def _fit(family: Family, config: Any, checkpoint: Checkpoint) -> Any:
  return family.fit_config(config, checkpoint.tensors) if family.fit_config else config


def _fits(family: Family, config: Any, checkpoint: Checkpoint) -> bool:
  try:
    plan_load(checkpoint, abstract_model(family.model_class, config), family.weights[checkpoint.dialect])
  except CheckpointError:
    return False
  return True


def _read_config_json(files: Files) -> Mapping[str, Any]:
  where = f"{files.path}/config.json"
  try:
    raw = parse_json(files.read("config.json", 0, files.size("config.json")))
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{where} is not valid JSON: {error}") from None
  if not isinstance(raw, dict):
    raise ConfigError(f"{where} is {type(raw).__name__}, expected an object")
  return raw


def _by_name(model_id: str, where: str) -> tuple[str, Any]:
  """Category and preset of a checkpoint that has no configuration."""
  try:
    with name_errors():
      naming = models_naming.ModelNaming(model_id=model_id)
    return naming.model_config_category, call_model_config(naming.model_name)
  except ModelNameError as error:
    raise ModelNameError(f"{where} has no config.json, so the name must do, but {error}") from error


def get_model_module(model_name: str, module_type: ModelModule) -> ModuleType:
  """A module of the package that holds a model's architecture, such as `models_llama.llama3.model`.

  Raises:
    MissingFamilyError: an ImportError with the command that installs it.
    ModelNameError: if the name is unknown.
  """
  with name_errors():
    category = models_naming.get_model_config_category(model_name)
  package = family_module(category, model_name)
  return importlib.import_module(f"{package.__name__}.{module_type.value}")


# Variants of a size whose numbers are the size's own unless they have a preset.
_QAT = ("_it_qat_q4_0_unquantized", "_it_qat_int4_unquantized")
_VARIANTS = ("_instruct", "_it", "_base", "_pt", "_jpn_it", *_QAT)


def call_model_config(model_name: str) -> Any:
  """The preset of a model's name: "llama-3.1-8b" -> `ModelConfig.llama3p1_8b()`.

  Raises:
    ModelNameError: for a size that has no preset, with those that have one.
  """
  with name_errors():
    config_id = models_naming.get_model_config_id(model_name)
  config_class = get_model_module(model_name, ModelModule.MODEL).ModelConfig
  candidates = [config_id, *(config_id.removesuffix(v) for v in _VARIANTS if config_id.endswith(v))]
  for candidate in candidates:
    if preset := getattr(config_class, candidate, None):
      return preset()
  raise ModelNameError(
    f"{model_name}: {config_class.__module__}.ModelConfig has no preset {config_id}; it has "
    f"{', '.join(presets(config_class))}. A checkpoint with a config.json loads whatever its name"
  )


def presets(config_class: type) -> list[str]:
  """Names of a configuration's presets."""
  return [name for name, member in vars(config_class).items() if isinstance(member, classmethod)]


def _dtype(dtype: Any) -> np.dtype | None:
  if dtype is None:
    return None
  try:
    return jnp.dtype(dtype)
  except TypeError:
    raise TypeError(f"dtype={dtype!r} is no data type; use jnp.bfloat16, 'float32', ...") from None
