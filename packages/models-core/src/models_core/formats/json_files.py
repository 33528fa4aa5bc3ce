"""JSON in headers and in files beside the weights."""

from __future__ import annotations

import errno
import json
from typing import Any

from models_core.errors import ConfigError
from models_core.formats.files import Files
from models_core.formats.kinds import FIRST, strangeness


def parse_json(data: bytes) -> Any:
  """Parses JSON, in which no object may have the same key twice.

  Raises:
    RecursionError: if the data is nested too deeply.
    ValueError: if the data is not valid JSON in UTF-8, or an object has the same key twice.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
      seen: set[str] = set()
      repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
      raise ValueError(f"the key {repeated!r} occurs twice")
    return result

  return json.loads(data.decode("utf-8"), object_pairs_hook=unique)


def read_json(files: Files, name: str) -> dict[str, Any]:
  """Reads a file that holds a JSON object, in which no object may have the same key twice.

  Args:
    files: that the file belongs to.
    name: of the file.

  Raises:
    ConfigError: if the file cannot be read, or holds anything else, such as a Git LFS pointer.
    OSError: if there is no such file.
  """
  where = f"{files.path}/{name}"
  try:
    data = files.read(name, 0, files.size(name))
  except OSError as error:
    # Errors of sources have no number: they say more than this would.
    if error.errno in (None, errno.ENOENT):
      raise
    raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
  if what := strangeness(data[:FIRST]):
    raise ConfigError(f"{where} {what}")
  try:
    value = parse_json(data)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{where} is not valid JSON: {error}") from None
  if not isinstance(value, dict):
    raise ConfigError(f"{where} holds a value of type {type(value).__name__}, expected a JSON object")
  return value
