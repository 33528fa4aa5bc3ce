"""What comes along when a model is saved, and how far its weights are."""

from __future__ import annotations

import tqdm

from models_automodel.finding import is_companion
from models_core.formats import Files


def companions_of(files: Files | None) -> list[str]:
  """Names of the files that come along when a model is saved, whatever its weights become."""
  names = () if files is None else files.names()
  return [n for n in names if is_companion(n) and not n.endswith(".index.json") and n != "config.json"]


def weights_bar(progress: bool) -> tqdm.tqdm:
  """A bar of bytes; `reset` tells it how many there will be."""
  hidden = None if progress else True  # None: bars on a terminal alone.
  return tqdm.tqdm(unit="B", unit_scale=True, desc="weights", disable=hidden)
