"""Optional packages: imported on first use; the error for a missing one says how to install it."""

import importlib
import types

from models_core.errors import ModelsError


class MissingExtraError(ModelsError, ImportError):
  """A package that an optional feature needs is not installed."""


def require(module: str, remedy: str, purpose: str) -> types.ModuleType:
  """Imports a module of an optional package.

  Args:
    module: full name of the module.
    remedy: the requirement that installs the package, such as "models-core[gguf]".
    purpose: what needs the package, as the beginning of a sentence, such as "Writing an Orbax checkpoint".

  Returns:
    The imported module.

  Raises:
    MissingExtraError: if the package is not installed.
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
