"""A model's parameters as a directory of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from models_core.family import Family
from models_core.formats import SAFETENSORS, Files, OnBytes
from models_core.saving import Base, flatten, save_parameters_to_safetensors


def save_model_to_safetensors(
  state_dict: Mapping[Any, Any],
  save_dir: str | os.PathLike,
  max_shard_size: int | str = "5GB",
  *,
  family: Family | None = None,
  config: Any = None,
  base: str | os.PathLike | Files | None = None,
  companions: Sequence[str] = (),
  dtype: Any = None,
  overwrite: bool = False,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
) -> None:
  """Writes a state dictionary, at once complete: `save_dir` is what it was, or holds the whole checkpoint.

  Without a family the tensors have the parameters' own names and shapes, and there is no config.json. With a family
  they have Hugging Face's, and transformers reads the directory. Under several processes all must call it, with the
  same arguments.

  Args:
    state_dict: nested or flat dictionary of arrays, as `nnx.state(model, nnx.Param)` or its `to_pure_dict()`.
    save_dir: may be missing or empty.
    max_shard_size: bytes of tensor data in a file, as a number or like "5GB", "200MB", "2GiB".
    family: of the model.
    config: of the model; with a family.
    base: the safetensors checkpoint that the model came from, with a family. What is open without it is as it has
      it: the forms of fused tensors, the prefix of names, a tied head that is stored, parts that the model has not
      such as a vision tower, and the fields of config.json that are no part of `config`.
    companions: names of files of `base` that are copied, where they are there.
    dtype: that floating-point parameters are written in; None keeps each as it is.
    overwrite: whether `save_dir` may hold something. Weights and files of the same names are replaced, others stay.
    on_total: called once with the number of bytes that this process is going to write.
    on_bytes: called with the number of bytes that were written, from several threads.

  Raises:
    CheckpointError: if `base` is broken or of another architecture.
    ConfigError: if config.json cannot state the configuration, or a family has none.
    SaveError: if `save_dir` exists, is being written, or the file system refuses.
    TypeError: if the dictionary holds something else than arrays, or `dtype` is no floating-point type.
    ValueError: if `max_shard_size` is no size.
  """
  arrays = flatten(state_dict)
  save_parameters_to_safetensors(
    arrays,
    arrays.__getitem__,
    save_dir,
    family=family,
    config=config,
    base=None if base is None else Base.of(base, SAFETENSORS),
    companions=companions,
    dtype=dtype,
    overwrite=overwrite,
    on_total=on_total,
    on_bytes=on_bytes,
    max_shard_size=max_shard_size,
  )
