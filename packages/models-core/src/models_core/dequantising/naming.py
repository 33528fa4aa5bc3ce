"""Names beside quantised weights: what is left out, and which modules a list means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from typing import Any

_ACTIVATIONS = "the scale of quantised activations, which are not quantised here"
_CACHE = "the scale of a quantised KV cache, which is not quantised here"
# Ends of names that no weight needs -> why.
IGNORED: Mapping[str, str] = {
  **dict.fromkeys(
    (
      ".input_scale",
      ".input_global_scale",
      ".activation_scale",
      ".input_scale_ub",
      ".input_zero_point",
      ".output_scale",
    ),
    _ACTIVATIONS,
  ),
  **dict.fromkeys((".self_attn.k_zero_point", ".self_attn.v_zero_point", ".self_attn.q_scale"), _CACHE),
}

# Keys of configurations that list modules which are not quantised.
_SKIP_LISTS = (
  "modules_to_not_convert",
  "ignored_layers",
  "ignore",
  "exclude_modules",
  "llm_int8_skip_modules",
)


def skip_lists(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields the entries of lists of modules that are not quantised, each with its key."""
  for key in _SKIP_LISTS:
    entries = said.get(key)
    if isinstance(entries, (list, tuple)):
      yield from ((key, entry) for entry in entries if isinstance(entry, str) and entry)


def is_skipped(module: str, entry: str) -> bool:
  """Whether an entry of such a list means a module.

  Args:
    module: name of the module.
    entry: some whole parts of its name; with a star, a wildcard for all of it; after `re:`, a regular expression.
  """
  if entry.startswith("re:"):
    return matches(entry.removeprefix("re:"), module)
  if "*" in entry:
    return fnmatch.fnmatchcase(module, entry)
  return f".{entry}." in f".{module}."


def matches(pattern: str, module: str) -> bool:
  """Whether a regular expression of a configuration matches the beginning of a module's name.

  Raises:
    ValueError: if it is none.
  """
  try:
    return re.match(pattern, module) is not None
  except re.error as error:
    raise ValueError(f"the configuration has {pattern!r}, which is no regular expression: {error}") from None
