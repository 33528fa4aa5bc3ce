"""The supported formats, in order of preference where a folder holds checkpoints in several of them."""

from __future__ import annotations

from collections.abc import Iterator, Set

from models_core.formats.checkpoint import Format
from models_core.formats.files import Files
from models_core.formats.gguf import GGUF
from models_core.formats.orbax import ORBAX
from models_core.formats.safetensors import SAFETENSORS

FORMATS = (SAFETENSORS, GGUF, ORBAX)


def formats_in(files: Files) -> Iterator[Format]:
  """The formats in which the files include a checkpoint, the preferred one first.

  Each format is checked only when the iterator reaches it, since a check may read files.

  Raises:
    CheckpointError: from the iterator, if there are several Orbax trees side by side.
  """
  return (format for format in FORMATS if format.is_in(files))


def weight_files(files: Files) -> list[str]:
  """Names of the files that hold weights, as their names show, such as `model.safetensors`."""
  return [name for name in files.names() if any(format.owns(name) for format in FORMATS)]


def checkpoint_entries(directory: str) -> Set[str]:
  """Names of the files and folders in a directory that a new checkpoint, saved to it, replaces."""
  return frozenset().union(*(format.entries(directory) for format in FORMATS))
