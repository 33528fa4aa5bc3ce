"""The `automodel` command.

A module for each group of commands; `arguments` and `mesh_argument` hold what several commands share. JAX is imported
by the commands that need it, when they run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from models_automodel.cli import convert, generate, inspect
from models_core.errors import ModelsError

# What adds a command to the parser, in the order of --help.
_COMMANDS = (
  inspect.add_list,
  inspect.add_show,
  inspect.add_plan,
  inspect.add_digest,
  generate.add_generate,
  convert.add_convert,
  inspect.add_verify,
  generate.add_quickstart,
)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    arguments: of the command line; None takes those of this process.

  Returns:
    The exit status: 1 for an error, which goes to stderr in one message.
  """
  options = _parser().parse_args(arguments)
  try:
    options.run(options)
  # These errors name the remedy, which a traceback would hide.
  except (ModelsError, TypeError, ImportError) as error:
    if options.traceback:
      raise
    print(f"automodel {options.command}: {error}", file=sys.stderr)
    return 1
  except BrokenPipeError:
    # The reader left. Python would complain once more when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="automodel", description="Pretrained LLMs as sharded Flax NNX modules."
  )
  parser.add_argument("--version", action="version", version=importlib.metadata.version("models-automodel"))
  parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
  commands = parser.add_subparsers(dest="command", required=True)
  for add in _COMMANDS:
    add(commands)
  return parser
