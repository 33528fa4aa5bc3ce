"""Messages of errors, as the command says them: with its options in place of Python's keyword arguments."""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import TypeGuard

from models_core.errors import ModelsError

# Numbers of errors of a full, broken or closed device; those of connections are others.
_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
# Options that have the name of a keyword argument.
_SAME = "file|subfolder|variant|revision|dtype"
# What Python's callers read, and what users of the command read.
_SPOKEN = (
  (r"pass ignore_config_keys=\[([^\]]*)\] to AutoModel", lambda found: f"pass {_repeated(found[1])}"),
  (r",? or pass config=(?!\w)", lambda found: ""),
  (r"\boverwrite=True\b", lambda found: "--overwrite"),
  (r"\bjax_enable_x64: enable it", lambda found: "64 bits enabled: set JAX_ENABLE_X64=1"),
  (rf"\b({_SAME})='([^']*)'", lambda found: f"--{found[1]} {found[2]}"),
  (rf"\b({_SAME})=(?!\w)", lambda found: f"--{found[1]}"),
)


def _repeated(keys: str) -> str:
  return " ".join(f"--ignore-config-key {key}" for key in re.findall(r"'([^']*)'", keys))


def spoken(message: str) -> str:
  """A message with the command's options in place of keyword arguments."""
  for pattern, option in _SPOKEN:
    message = re.sub(pattern, option, message)
  return message


def is_of_output(error: Exception) -> TypeGuard[OSError]:
  """Whether standard output cannot be written: such an error names no file."""
  return isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT


def message_of(error: Exception) -> str | None:
  """The message of an error that a user can cause; None for all others, of which the traceback says more."""
  # The messages of these hold the remedy.
  if isinstance(error, (ModelsError, TypeError, ImportError)):
    return spoken(str(error))
  if is_of_output(error):
    return f"the output cannot be written: {error.strerror}"
  if isinstance(error, OSError):
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
  if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in (text := str(error)):
    line = text.strip().splitlines()[0].rpartition("RESOURCE_EXHAUSTED: ")[2]
    return f"not enough memory: {line.rstrip('.')}; choose a smaller --dtype, a --mesh of more devices, or fewer tokens"
  return missing_backend()


def missing_backend() -> str | None:
  """What is wrong with the platform that JAX is told to use; None if it is there, or JAX is not in use."""
  if "jax" not in sys.modules:
    return None
  import jax

  try:
    jax.devices()
  # JAX asserts that one of the known platforms is there.
  except (RuntimeError, AssertionError) as error:
    why = f" ({text.splitlines()[0]})" if (text := str(error).strip()) else ""
    wanted = os.environ.get("JAX_PLATFORMS") or "JAX's backend"
    return f"{wanted} is not available here{why}: install JAX for it, or set JAX_PLATFORMS=cpu"
  return None
