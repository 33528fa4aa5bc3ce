"""The `automodel` command.

Each group of commands has a module; `arguments`, `mesh_argument`, `parser` and `output` hold what several commands share.
JAX is imported only by the commands that need it, when they run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from models_automodel.cli import chat, completion, convert, environment, generate, inspect, upload
from models_automodel.cli.messages import is_of_output, message_of
from models_automodel.cli.output import (
  close_output,
  open_missing_streams,
  print_error,
  replace_unprintable,
)
from models_automodel.cli.parser import Parser
from models_automodel.interrupt import end

# Functions that add a command to the parser, in the order of --help.
_COMMANDS = (
  inspect.add_list,
  inspect.add_show,
  inspect.add_plan,
  inspect.add_digest,
  generate.add_generate,
  chat.add_chat,
  convert.add_convert,
  inspect.add_verify,
  upload.add_upload,
  environment.add_env,
  completion.add_completion,
  generate.add_quickstart,
)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    arguments: of the command line; None takes `sys.argv[1:]`.

  Returns:
    The exit status: 0, or 1 for an error, whose message is printed to stderr.
  """
  open_missing_streams()
  replace_unprintable()
  options = argparse.Namespace(command=None, traceback=False)
  try:
    try:
      _parser().parse_args(arguments, options)
    finally:
      # --help and --version end here.
      sys.stdout.flush()
    keep_compiled_programs()
    options.run(options)
    sys.stdout.flush()
  except KeyboardInterrupt:
    if options.traceback:
      raise
    end()
  except BrokenPipeError:
    # The reader of a pipe has closed it, and knows. Python would report it again when it flushes at exit.
    close_output()
    return 1
  except Exception as error:
    message = message_of(error)
    if is_of_output(error):
      close_output()
    if message is None or options.traceback:
      raise
    print_error(f"automodel {options.command}: {message}" if options.command else f"automodel: {message}")
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
  parser = Parser(
    prog="automodel", description="Load, inspect and convert pretrained LLMs as sharded Flax NNX modules."
  )
  parser.add_argument("--version", action="version", version=importlib.metadata.version("models-automodel"))
  parser.add_argument("--traceback", action="store_true", help="print the Python traceback of an error")
  parser.set_defaults(root=parser)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for add in _COMMANDS:
    add(commands)
  return parser
