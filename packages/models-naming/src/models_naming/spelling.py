"""Two spellings of a name: normalised (`llama-3.1-8b`) and standardised (`llama_3p1_8b`, a Python identifier)."""

import re


def normalise(name: str) -> str:
  """Lower-cases a name and shortens `meta-llama-` to `llama-`: `Meta-Llama-3-8B` -> `llama-3-8b`."""
  name = name.lower()
  return name.removeprefix("meta-") if name.startswith("meta-llama-") else name


def standardise(text: str) -> str:
  """Lower-cases a text and replaces `-` by `_` and `.` by `p`: `0.5B-Instruct` -> `0p5b_instruct`."""
  return text.lower().replace("-", "_").replace(".", "p")


def with_points(text: str) -> str:
  """Undoes `standardise`, for every `_` and for a `p` between digits: `0p5b_instruct` -> `0.5b-instruct`."""
  return re.sub(r"(?<=\d)p(?=\d)", ".", text.lower().replace("_", "-"))
