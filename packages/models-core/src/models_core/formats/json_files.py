"""JSON beside weights and in headers."""

from __future__ import annotations

import json
from typing import Any

from models_core.errors import ConfigError
from models_core.formats.checkpoint import Files


def parse_json(data: bytes) -> Any:
  """JSON in which no object states a key twice.

  Raises:
    RecursionError: if it is nested too deeply.
    ValueError: if it is not that.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
      seen: set[str] = set()
      double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
      raise ValueError(f"{double!r} is doubled")
    return result

  return json.loads(data.decode("utf-8"), object_pairs_hook=unique)


def read_json(files: Files, name: str) -> dict[str, Any]:
  """The JSON object of a file, in which no object states a key twice.

  Args:
    files: that the file belongs to.
    name: of the file.

  Raises:
    ConfigError: naming the file, if it holds anything else.
    OSError: if there is no such file.
  """
  where = f"{files.path}/{name}"
  try:
    value = parse_json(files.read(name, 0, files.size(name)))
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{where} is not valid JSON: {error}") from None
  if not isinstance(value, dict):
    raise ConfigError(f"{where} is {type(value).__name__}, expected an object")
  return value
