"""What commands that generate text have in common: their arguments, how they load a model, and how they print answers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from models_automodel.cli.arguments import token_count, where_of
from models_automodel.cli.compiling import working
from models_automodel.cli.fastest import by_speed
from models_automodel.cli.memory import MemoryBoundError, check_memory
from models_automodel.cli.mesh_argument import make_mesh
from models_automodel.cli.output import print_error, print_json

if TYPE_CHECKING:
  from models_automodel.text import Prompt, TextModel, TextSettings
  from models_core.generation import Sampling, Session
  from models_core.loading import LoadPlan

# Field of Sampling -> type and help of the option.
_SAMPLING: dict[str, tuple[type, str]] = {
  "temperature": (float, "divides the logits before sampling; 0 always takes the most likely token"),
  "top_k": (int, "sample from this many most likely tokens; 0 means all"),
  "top_p": (float, "sample from the fewest most likely tokens that together have this probability"),
  "min_p": (float, "sample from tokens with at least this part of the probability of the most likely one"),
  "repetition_penalty": (float, "make tokens that were there before less likely by this factor; 1 does not"),
}


def sampling_arguments() -> argparse.ArgumentParser:
  """A parent parser with the arguments of generation."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument("--system", help="system message that the conversation begins with")
  parser.add_argument(
    "--max-new-tokens",
    type=token_count,
    help="stop an answer after this many tokens (default: 256, or where the context ends)",
  )
  parser.add_argument(
    "--stop",
    metavar="TEXT",
    action="append",
    default=[],
    help="end an answer before this text; may be repeated",
  )
  for name, (kind, text) in _SAMPLING.items():
    parser.add_argument(
      f"--{name.replace('_', '-')}",
      type=kind,
      help=f"{text} (default: what the checkpoint's generation_config.json says)",
    )
  parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
  parser.add_argument(
    "--cache-dir",
    help="directory that keeps the loaded weights as they lie on the devices, for a faster start next time",
  )
  parser.add_argument(
    "--no-memory-check", action="store_true", help="load even if the model seems not to fit into memory"
  )
  return parser


def sampling_of(options: argparse.Namespace, settings: TextSettings) -> Sampling:
  """The checkpoint's sampling with the options in place of its numbers.

  Raises:
    ConfigError: if a number is outside its range.
  """
  given = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
  return dataclasses.replace(settings.sampling, **given)


def load_model(
  options: argparse.Namespace,
  where: Any,
  mesh: Any,
  first_call: Callable[[TextSettings], dict[str, Any]],
  tokens_of: Callable[[TextSettings], int],
  **kwargs: Any,
) -> TextModel:
  """Loads a model with its tokenizer.

  Without a dtype, it is loaded in the one that is fastest here of those that fit into memory.

  Args:
    options: of the command.
    where: the place of the checkpoint.
    mesh: of the model, or None.
    first_call: the arguments of `TextSettings.planned` that the options do not tell: the first prompt, or one like it. What
      it runs is compiled while the weights are read.
    tokens_of: checks the prompt, and returns how many tokens the KV cache needs, before any weights are read.
    **kwargs: of `load_text_model`.

  Raises:
    MemoryBoundError: if the model does not fit.
  """
  from models_automodel.text_models import load_text_model

  times = by_speed() if kwargs["dtype"] is None else {kwargs["dtype"]: 0.0}

  def check(plan: LoadPlan, settings: TextSettings) -> None:
    sampling = sampling_of(options, settings)
    tokens = tokens_of(settings)
    if not options.no_memory_check:
      check_memory(plan, tokens)
    if sampling.temperature == 0:
      _say_without_effect(options)
    if len(times) > 1:
      _say_dtype(str(plan.parameters[0].dtype), times)

  def call(settings: TextSettings) -> dict[str, Any]:
    return {**first_call(settings), **asked(options, settings)}

  def load(dtype: Any) -> TextModel:
    return load_text_model(where, mesh, before_weights=check, first_call=call, **{**kwargs, "dtype": dtype})

  *faster, last = times
  for dtype in faster:
    with contextlib.suppress(MemoryBoundError):
      return load(dtype)
  return load(last)


def _say_without_effect(options: argparse.Namespace) -> None:
  filters = [name for name in ("top_k", "top_p", "min_p") if getattr(options, name) is not None]
  if filters:
    names = ", ".join(f"--{name.replace('_', '-')}" for name in filters)
    print_error(f"{names}: no effect at temperature 0, which always takes the most likely token")


def _say_dtype(chosen: str, times: dict[str, float]) -> None:
  fastest = next(iter(times))
  why = "the fastest here" if chosen == fastest else f"since {fastest}, the fastest here, does not fit"
  measured = ", ".join(f"{dtype} {ms:.1f} ms" for dtype, ms in times.items())
  print_error(f"dtype: {chosen}, {why} ({measured} a product); --dtype chooses another")


def asked(options: argparse.Namespace, settings: TextSettings) -> dict[str, Any]:
  """What the options ask of each call of `TextModel.stream`."""
  return {
    "max_new_tokens": options.max_new_tokens,
    "stop": options.stop,
    "sampling": sampling_of(options, settings),
  }


def model_of(
  options: argparse.Namespace,
  first_call: Callable[[TextSettings], dict[str, Any]],
  tokens_of: Callable[[TextSettings], int],
) -> TextModel:
  """Loads the model that the options name."""
  return load_model(
    options,
    where_of(options),
    make_mesh(options.mesh),
    first_call,
    tokens_of,
    dtype=options.dtype,
    ignore_config_keys=options.ignore_config_key,
    cache_dir=options.cache_dir,
  )


class Answer:
  """An answer that is printed as it arrives, with its time."""

  def __init__(
    self, model: TextModel, prompt: Prompt, options: argparse.Namespace, session: Session | None = None
  ):
    """Takes what `TextModel.stream` needs."""
    self._session = session
    self.text = ""
    self._tokens, self._first = 0, 0.0
    self._start = time.perf_counter()
    self._texts = model.stream(
      prompt, seed=options.seed, session=session, on_tokens=self._count, **asked(options, model.settings)
    )

  def _count(self, tokens: int) -> None:
    if not self._tokens:
      self._first = time.perf_counter()
    self._tokens += tokens

  def _pieces(self) -> Iterator[str]:
    with working("reading the prompt ...") as clear:
      for text in self._texts:
        clear()
        self.text += text
        yield text

  def print(self) -> None:
    """Prints the text, and to a terminal how fast it came."""
    for text in self._pieces():
      print(text, end="", flush=True)
    print(flush=True)
    if sys.stderr.isatty():
      print_error(f"\033[2m[{self._numbers()}]\033[0m")

  def _numbers(self) -> str:
    reused = 0 if self._session is None else self._session.reused
    kept = f"; {reused} tokens from the KV cache" if reused else ""
    if not self._tokens:
      return f"no token{kept}"
    waited = self._first - self._start
    return f"{self._tokens} tokens: {waited:.1f} s to the first, then {self.rate():.1f} tokens/s{kept}"

  def print_json(self) -> None:
    """Prints a line of JSON for each piece of text, and one with the numbers."""
    for text in self._pieces():
      print_json({"text": text})
    first = round(self._first - self._start, 3) if self._tokens else None
    print_json(
      {
        "new_tokens": self._tokens,
        "seconds_to_first_token": first,
        "tokens_per_second": round(self.rate(), 2),
      }
    )

  def rate(self) -> float:
    """Tokens per second after the first, which waits for the prompt and for compilation."""
    seconds = time.perf_counter() - self._first
    return (self._tokens - 1) / seconds if self._tokens > 1 and seconds > 0 else 0.0
