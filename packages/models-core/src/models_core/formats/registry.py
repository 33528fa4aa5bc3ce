"""The formats that are read, in the order in which they are preferred where a folder holds several."""

from __future__ import annotations

from collections.abc import Iterator, Set

from models_core.formats.checkpoint import Format
from models_core.formats.files import Files
from models_core.formats.gguf import GGUF
from models_core.formats.orbax import ORBAX
from models_core.formats.safetensors import SAFETENSORS

FORMATS = (SAFETENSORS, GGUF, ORBAX)


def formats_in(files: Files) -> Iterator[Format]:
  """The formats in which files hold a checkpoint, the preferred one first; the others are sought when they are asked for.

  Raises:
    CheckpointError: for several trees beside one another.
  """
  return (format for format in FORMATS if format.is_in(files))


def weight_files(files: Files) -> list[str]:
  """Names of the files that a format owns by their names."""
  return [name for name in files.names() if any(format.owns(name) for format in FORMATS)]


def checkpoint_entries(directory: str) -> Set[str]:
  """Names of the files and folders in a directory that a new checkpoint takes the place of."""
  return frozenset().union(*(format.entries(directory) for format in FORMATS))
