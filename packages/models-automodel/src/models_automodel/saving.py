"""Shared by saving and converting: which companions are copied, and the progress bar."""

from __future__ import annotations

import tqdm

from models_automodel.finding import is_companion
from models_core.formats import Files


def companions_of(files: Files | None) -> list[str]:
  """Names of the companions that are copied when a model is saved, in whatever format its weights are written."""
  names = () if files is None else files.names()
  return [n for n in names if is_companion(n) and not n.endswith(".index.json") and n != "config.json"]


def weights_bar(progress: bool) -> tqdm.tqdm:
  """A progress bar that counts bytes; `reset` sets their total."""
  hidden = None if progress else True  # None shows bars on a terminal only.
  return tqdm.tqdm(unit="B", unit_scale=True, desc="weights", disable=hidden)
