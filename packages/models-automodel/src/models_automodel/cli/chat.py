"""`automodel chat`: a conversation at the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from models_automodel.cli.answering import Answer, model_of, sampling_arguments
from models_automodel.cli.arguments import Commands, mesh_arguments, model_arguments
from models_automodel.cli.output import print_error
from models_core.errors import ConfigError

if TYPE_CHECKING:
  from models_automodel.text import TextModel, TextSettings
  from models_core.generation import Session

_HELP = """\
/help           this text
/clear          forget the conversation, but not the system message
/system TEXT    begin a new conversation with this system message
/exit           end; so does Ctrl-D"""
# Tokens that a conversation may have if the checkpoint states no context.
_CONTEXT = 4096


def add_chat(commands: Commands) -> None:
  """Adds `automodel chat`."""
  parser = commands.add_parser(
    "chat",
    parents=[model_arguments(), mesh_arguments(), sampling_arguments()],
    help="talk to a model; each line is a message, and /help lists commands",
  )
  parser.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> None:
  # Gives input() a line editor with a history.
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401

  messages = _beginning(options.system)
  first_call = {"prompt": [*messages, {"role": "user", "content": "Hello!"}], "in_session": True}
  model = model_of(options, lambda settings: first_call, _tokens)
  session = model.session()
  if sys.stdin.isatty():
    print_error("Each line is a message; /help lists commands, Ctrl-D ends.")
  while (line := _line()) is not None:
    name, _, rest = line.strip().partition(" ")
    if name == "/exit":
      return
    if name == "/help":
      print(_HELP)
    elif name == "/clear":
      messages = _beginning(options.system)
    elif name == "/system":
      options.system = rest.strip() or None
      messages = _beginning(options.system)
    elif name.startswith("/"):
      print_error(f"{name} is no command: /help lists them")
    elif name:
      messages = _answered(model, session, [*messages, {"role": "user", "content": line}], options)


def _tokens(settings: TextSettings) -> int:
  """Checks that there is a chat template, and returns how many tokens the KV cache may need."""
  if not settings.tokenizer.chat_templates:
    raise ConfigError(
      "the checkpoint has no chat template (a base model?): `automodel generate` continues texts"
    )
  return min(settings.context or _CONTEXT, _CONTEXT)


def _beginning(system: str | None) -> list[dict[str, str]]:
  return [] if system is None else [{"role": "system", "content": system}]


def _line() -> str | None:
  """The next message, or None at the end."""
  try:
    return input("> " if sys.stdin.isatty() else "")
  except EOFError:
    return None


def _answered(
  model: TextModel, session: Session, messages: list[dict[str, str]], options: argparse.Namespace
) -> list[dict[str, Any]]:
  """Prints the answer, and returns the conversation with it. What cannot be answered is said, and left out."""
  try:
    answer = Answer(model, messages, options, session)
  except ConfigError as error:
    print_error(f"automodel chat: {error}; /clear forgets the conversation")
    return messages[:-1]
  answer.print()
  return [*messages, {"role": "assistant", "content": answer.text}]
