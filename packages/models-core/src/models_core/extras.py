"""Packages that only some users need: imported when they are used, with the remedy where they are missing."""

import importlib
import types

from models_core.errors import ModelsError


class MissingExtraError(ModelsError, ImportError):
  """A package that an optional feature needs is not installed."""


def require(module: str, remedy: str, purpose: str) -> types.ModuleType:
  """Imports a module of an optional package.

  Args:
    module: its full name.
    remedy: the requirement that installs it, such as "models-core[gguf]".
    purpose: what needs it, as the beginning of a sentence.

  Raises:
    MissingExtraError: where the package is not installed.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    package = module.partition(".")[0]
    if error.name not in (package, module):
      raise
    raise MissingExtraError(
      f'{purpose} needs the package {package}: pip install "{remedy}"', name=package
    ) from error
