"""What the command prints: text for people, JSON for programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
  """Adds `--json`."""
  parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def print_json(value: Any) -> None:
  """Prints a value as one line of JSON."""
  print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def close_output() -> None:
  """Closes standard output without a word of what could not be written, which Python would report again at exit."""
  with contextlib.suppress(OSError):
    sys.stdout.close()


def print_error(message: str) -> None:
  """Prints a message to stderr; without a stderr, nothing."""
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)


def open_missing_streams() -> None:
  """Opens the null device in place of standard streams that are closed, which Python shows as None."""
  for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends


def replace_unprintable() -> None:
  """Lets a terminal that cannot show a character show a question mark in its place."""
  for stream in (sys.stdout, sys.stderr):
    if callable(reconfigure := getattr(stream, "reconfigure", None)):
      reconfigure(errors="replace")
