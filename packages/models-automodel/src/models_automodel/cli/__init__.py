"""The `automodel` command.

Each group of commands has a module; `arguments` and `mesh_argument` hold what several commands share. JAX is imported
only by the commands that need it, when they run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from models_automodel.cli import convert, generate, inspect, upload
from models_core.errors import ModelsError

# Functions that add a command to the parser, in the order of --help.
_COMMANDS = (
  inspect.add_list,
  inspect.add_show,
  inspect.add_plan,
  inspect.add_digest,
  generate.add_generate,
  convert.add_convert,
  inspect.add_verify,
  upload.add_upload,
  generate.add_quickstart,
)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    arguments: of the command line; None takes `sys.argv[1:]`.

  Returns:
    The exit status: 0, or 1 for an error, whose message is printed to stderr.
  """
  options = _parser().parse_args(arguments)
  keep_compiled_programs()
  try:
    options.run(options)
  # The messages of these errors hold the remedy, which a traceback would hide.
  except (ModelsError, TypeError, ImportError) as error:
    if options.traceback:
      raise
    print(f"automodel {options.command}: {error}", file=sys.stderr)
    return 1
  except BrokenPipeError:
    # The reader of a pipe has closed it; without this, Python would report it again when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  return 0


def keep_compiled_programs() -> None:
  """Has JAX keep compiled programs in the user's cache, unless JAX is in use already or the environment says where.

  `JAX_COMPILATION_CACHE_DIR` names another directory; `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
  """
  if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(cache, "automodel", "compiled")
  # The programs of a small model compile in less than the second from which on JAX keeps them by default.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="automodel", description="Load, inspect and convert pretrained LLMs as sharded Flax NNX modules."
  )
  parser.add_argument("--version", action="version", version=importlib.metadata.version("models-automodel"))
  parser.add_argument("--traceback", action="store_true", help="print the Python traceback of an error")
  commands = parser.add_subparsers(dest="command", required=True)
  for add in _COMMANDS:
    add(commands)
  return parser
