"""What the command prints: text for people, JSON for programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
  """Adds `--json`."""
  parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def print_json(value: Any) -> None:
  """Prints a value as one line of JSON."""
  print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_flushed() -> None:
  """Writes what has been printed, so that an error of a full disk is one of the command and not of its end."""
  try:
    sys.stdout.flush()
  except OSError:
    # Python would report it again at exit.
    with contextlib.suppress(OSError):
      sys.stdout.close()
    raise


def print_error(message: str) -> None:
  """Prints a message to stderr; without a stderr, nothing."""
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)


def replace_unprintable() -> None:
  """Lets a terminal that cannot show a character show a question mark in its place."""
  for stream in (sys.stdout, sys.stderr):
    if callable(reconfigure := getattr(stream, "reconfigure", None)):
      reconfigure(errors="replace")


@contextlib.contextmanager
def status(text: str) -> Any:
  """Shows a line on a terminal while a block runs, and removes it; yields a function that does so earlier."""
  shown = sys.stderr.isatty()

  def clear() -> None:
    nonlocal shown
    if shown:
      print("\r\033[K", end="", file=sys.stderr, flush=True)
      shown = False

  if shown:
    print(text, end="", file=sys.stderr, flush=True)
  try:
    yield clear
  finally:
    clear()
