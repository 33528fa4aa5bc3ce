"""Optional packages: imported on first use; the error for a missing one says how to install it."""

import importlib
import importlib.metadata
import json
import types
from typing import Any

from models_core.errors import ModelsError

# Whoever has AutoModel installs extras through it: its extras name those of the other packages.
_FRONT = "models-automodel"


class MissingExtraError(ModelsError, ImportError):
  """A package that an optional feature needs is not installed."""


def require(module: str, requirement: str, purpose: str) -> types.ModuleType:
  """Imports a module of an optional package.

  Args:
    module: full name of the module.
    requirement: the extra that brings the package, such as "models-core[gguf]".
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
      f"{purpose} needs the package {package}: {install_command(requirement)}", name=package
    ) from error


def install_command(requirement: str) -> str:
  """The command that adds an extra to this installation, from where the installation came: an index, git, or a folder.

  Args:
    requirement: an extra of an installed package, such as "models-core[gguf]". If AutoModel is installed and has an
      extra of that name, the command names AutoModel's.

  Returns:
    A command for a shell, such as `uv pip install --editable "/clone/packages/models-automodel[gguf]"`.
  """
  name, _, extra = requirement.removesuffix("]").partition("[")
  if name.startswith("models-") and extra in _extras(_FRONT):
    name = _FRONT
  wanted = f"{name}[{extra}]"
  origin, installer = _origin(name)
  url = origin.get("url", "")
  if vcs := origin.get("vcs_info"):
    folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
    # uv finds the other packages of the same commit; pip would look for them on an index.
    return f'uv pip install "{wanted} @ {vcs["vcs"]}+{url}@{vcs["commit_id"]}{folder}"'
  if (directory := origin.get("dir_info")) is not None:
    from urllib.request import (
      url2pathname,
    )  # takes longer to import than all else that `automodel --help` does

    path = url2pathname(url.removeprefix("file://"))
    editable = "--editable" if directory.get("editable") else "--no-editable"
    return f'uv pip install {editable} "{path}[{extra}]"'
  return f'{installer} install "{wanted} @ {url}"' if url else f'{installer} install "{wanted}"'


def _extras(distribution: str) -> list[str]:
  try:
    return importlib.metadata.metadata(distribution).get_all("Provides-Extra") or []
  except importlib.metadata.PackageNotFoundError:
    return []


def _origin(distribution: str) -> tuple[dict[str, Any], str]:
  """Where a distribution was installed from, as its direct_url.json says, `{}` for an index; and by what."""
  try:
    found = importlib.metadata.distribution(distribution)
  except importlib.metadata.PackageNotFoundError:
    return {}, "pip"
  installer = (found.read_text("INSTALLER") or "").strip()
  return json.loads(found.read_text("direct_url.json") or "{}"), "uv pip" if installer == "uv" else "pip"
