"""The parser of the command line, which says what may have been meant."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '?(?P<given>[^']*?)'? \(choose from (?P<known>.*)\)")


class Parser(argparse.ArgumentParser):
  """A parser whose errors about unknown commands, choices and options name the nearest known one.

  Subcommands get parsers of this kind, too.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **{"allow_abbrev": False, **kwargs})

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    """Parses, and refuses an option that is unknown to this parser, where it is known which others it has."""
    options, unknown = super().parse_known_args(args, namespace)
    if unknown:
      self.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, unknown

  def _print_message(self, message: str, file: Any = None) -> None:
    """Prints help and versions, and raises OSError where argparse keeps silent: on a full disk, or a closed pipe."""
    if file is sys.stdout:
      file.write(message)
    else:
      super()._print_message(message, file)

  def error(self, message: str) -> NoReturn:
    """Prints the message, and what may have been meant, and exits with status 2."""
    if choice := _CHOICE.search(message):
      meant = _nearest(choice["given"], re.findall(r"[^\s,']+", choice["known"]))
    elif message.startswith("unrecognized arguments: "):
      given = message.removeprefix("unrecognized arguments: ").split()
      known = self._option_string_actions
      meant = next((m for name in given if (m := _nearest(name.partition("=")[0], known))), "")
    else:
      meant = ""
    super().error(f"{message}{meant}")


def _nearest(given: str, known: Iterable[str]) -> str:
  found: Sequence[str] = difflib.get_close_matches(given, list(known), n=1)
  return f"; did you mean {found[0]}?" if found else ""
