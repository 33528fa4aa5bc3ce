"""Saves a model's parameters as a directory of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from models_core.family import Family
from models_core.formats import SAFETENSORS, Files, OnBytes
from models_core.saving import Base, Place, flatten, save_parameters_to_safetensors


def save_model_to_safetensors(
  state_dict: Mapping[Any, Any],
  save_dir: Place,
  max_shard_size: int | str = "5GB",
  *,
  family: Family | None = None,
  config: Any = None,
  base: str | os.PathLike | Files | None = None,
  dtype: Any = None,
  overwrite: bool = False,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
  more: Mapping[str, bytes] | None = None,
) -> None:
  """Writes a state dictionary. The write is atomic: `save_dir` is either unchanged or holds the complete checkpoint.

  Without a family, the tensors have the parameters' own names and shapes, and no config.json is written. With a family,
  they have Hugging Face's names and layouts, and transformers can read the directory. Under several processes all must
  call this, with the same arguments.

  Args:
    state_dict: nested or flat dictionary of arrays, such as `nnx.state(model, nnx.Param)` or its `to_pure_dict()`.
    save_dir: directory to write, or a target that a source provides; it may be missing or empty.
    max_shard_size: most bytes of tensor data in one file, as a number or a string such as "5GB", "200MB" or "2GiB".
    family: family of the model.
    config: configuration of the model; required with a family.
    base: the safetensors checkpoint that the model was loaded from; it requires a family. It decides what the family
      leaves open: which tensors are fused, the prefix of their names, whether a tied head is stored. Tensors that the
      model does not have, such as those of a vision tower, and fields of config.json that `config` does not have are
      copied from it.
    dtype: dtype in which floating-point parameters are written; None keeps the dtype of each.
    overwrite: whether `save_dir` may hold files. Weights and files of the same names are replaced, all others stay.
    on_total: called once with the number of bytes that this process will write.
    on_bytes: called with the number of bytes of each write, from several threads.
    more: contents of further files, by name.

  Raises:
    CheckpointError: if `base` is broken or of another architecture.
    ConfigError: if the parameters have other names or shapes than the configuration gives a model, config.json cannot
      express the configuration, or `family`, `config` and `base` are not given
      together.
    SaveError: if `save_dir` holds files and `overwrite` is false, another process is writing it, a value does not fit
      `dtype`, or the file system refuses the write.
    TypeError: if a value of the dictionary is not an array, or `dtype` is not a floating-point type.
    ValueError: if `max_shard_size` is not a size.
  """
  arrays = flatten(state_dict)
  save_parameters_to_safetensors(
    arrays,
    arrays.__getitem__,
    save_dir,
    family=family,
    config=config,
    base=None if base is None else Base.of(base, SAFETENSORS),
    dtype=dtype,
    overwrite=overwrite,
    on_total=on_total,
    on_bytes=on_bytes,
    more=more,
    max_shard_size=max_shard_size,
  )
