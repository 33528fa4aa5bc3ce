"""All errors of this package: those of core, and those of names and sources, which have the same root."""

import contextlib
from collections.abc import Iterator

import models_naming
import models_sources
from models_core.errors import CacheError, CheckpointError, ConfigError, ModelsError, SaveError, ShardingError
from models_core.extras import MissingExtraError

__all__ = [
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
  """A model id that is unknown, or names what cannot be loaded."""


class SourceFilesError(ModelsError, OSError):
  """Files that cannot be had from a source."""


class MissingFamilyError(ModelsError, ImportError):
  """A model whose architecture's package is not installed, or speaks another contract."""


@contextlib.contextmanager
def name_errors() -> Iterator[None]:
  """Turns a naming error into a ModelNameError."""
  try:
    yield
  except models_naming.NamingError as error:
    raise ModelNameError(str(error)) from error


@contextlib.contextmanager
def source_errors() -> Iterator[None]:
  """Turns a source's error into a SourceFilesError, and a missing client of it into a MissingExtraError."""
  try:
    yield
  except models_sources.MissingClientError as error:
    raise MissingExtraError(str(error), name=error.name) from error
  except models_sources.SourceError as error:
    raise SourceFilesError(str(error)) from error
