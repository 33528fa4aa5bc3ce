"""Writing models as directories that `from_pretrained` and transformers load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import tqdm

from models_automodel.finding import is_companion
from models_core.family import Family
from models_core.formats import Files, as_files
from models_core.saving import Shaped, save_parameters


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
  with weights_bar(progress) as bar:
    save_parameters(
      parameters,
      get,
      save_dir,
      max_shard_size,
      family=family,
      config=config,
      base=files,
      companions=companions_of(files),
      dtype=dtype,
      overwrite=overwrite,
      on_total=bar.reset,
      on_bytes=bar.update,
    )


def companions_of(files: Files | None) -> list[str]:
  """Names of the files that come along when a model is saved, whatever its weights become."""
  names = () if files is None else files.names()
  return [n for n in names if is_companion(n) and not n.endswith(".index.json") and n != "config.json"]


def weights_bar(progress: bool) -> tqdm.tqdm:
  """A bar of bytes; `reset` tells it how many there will be."""
  hidden = None if progress else True  # None: bars on a terminal alone.
  return tqdm.tqdm(unit="B", unit_scale=True, desc="weights", disable=hidden)
