"""JSON beside weights and in headers."""

from __future__ import annotations

import json
from typing import Any


def parse_json(data: bytes) -> Any:
  """JSON in which no object states a key twice.

  Raises:
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
