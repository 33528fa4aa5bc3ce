"""`automodel completion`: what a shell needs to complete the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from models_automodel.cli.arguments import Commands

# Arguments that are paths.
_PATHS = {"directory", "target", "download_path", "checksums"}
# Fills in names of published models, and files; in each shell's own language.
_MODEL_FUNCTION = "_automodel_models"
_MODELS = {
  "bash": _MODEL_FUNCTION + '() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}',
  "zsh": _MODEL_FUNCTION + "() {{\n  _alternative 'models:published model:({names})' 'files:file:_files'\n}}",
}


def add_completion(commands: Commands) -> None:
  """Adds `automodel completion`."""
  parser = commands.add_parser("completion", help="print what makes a shell complete this command")
  parser.set_defaults(run=_completion)
  parser.add_argument(
    "shell",
    choices=("bash", "fish", "zsh"),
    help='bash: add `eval "$(automodel completion bash)"` to ~/.bashrc',
  )


def _completion(options: argparse.Namespace) -> None:
  import shtab

  import models_naming
  import models_sources

  functions = {"bash": _MODEL_FUNCTION, "zsh": _MODEL_FUNCTION}
  for action in _arguments(options.root):
    if action.dest == "model":
      action.complete = shtab.FILE | functions  # type: ignore[attr-defined]
    elif action.dest in _PATHS:
      action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.dest == "source":
      action.choices = models_sources.source_names()
  names = " ".join(name for ids in models_naming.known_model_ids().values() for name in ids)
  preamble = _MODELS.get(options.shell, "").format(names=names)
  print(shtab.complete(options.root, options.shell, preamble=preamble))


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
  """The arguments of a parser and of its subcommands."""
  for action in parser._actions:
    yield action
    if isinstance(action, argparse._SubParsersAction):
      for inner in action.choices.values():
        yield from _arguments(inner)
