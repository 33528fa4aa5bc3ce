"""The errors of this package: core's, and those of names and sources under core's root `ModelsError`."""

import contextlib
from collections.abc import Iterator

import models_naming
import models_sources
from models_core.errors import (
  AdapterError,
  CacheError,
  CheckpointError,
  ConfigError,
  ModelsError,
  SaveError,
  ShardingError,
)
from models_core.extras import MissingExtraError, install_command

__all__ = [
  "AdapterError",
  "CacheError",
  "CheckpointError",
  "ConfigError",
  "MissingFamilyError",
  "ModelNameError",
  "ModelsError",
  "SaveError",
  "ShardingError",
  "SourceFilesError",
  "name_errors",
  "source_errors",
]


class ModelNameError(ModelsError, ValueError):
  """A model id that is unknown, or that names a model which cannot be loaded."""


class SourceFilesError(ModelsError, OSError):
  """Files that a source cannot provide."""


class MissingFamilyError(ModelsError, ImportError):
  """A model whose architecture's package is not installed or broken, or has another version of the family contract."""


@contextlib.contextmanager
def name_errors() -> Iterator[None]:
  """Turns a NamingError into a ModelNameError."""
  try:
    yield
  except models_naming.NamingError as error:
    raise ModelNameError(str(error)) from error


@contextlib.contextmanager
def source_errors() -> Iterator[None]:
  """Turns a SourceError into a SourceFilesError, and a MissingClientError into a MissingExtraError."""
  try:
    yield
  except models_sources.MissingClientError as error:
    message = f"{error.need}: {install_command(error.requirement)}"
    raise MissingExtraError(message, name=error.name) from error
  except models_sources.SourceError as error:
    raise SourceFilesError(str(error)) from error
