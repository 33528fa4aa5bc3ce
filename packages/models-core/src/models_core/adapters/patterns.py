"""Patterns of module paths, by which qwix and others choose the modules to change.

qwix joins the names on the way to a module by slashes, as in `layers/0/attn/q_proj`, and changes the modules whose
whole path matches a regular expression. It says nothing if no path does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flax import nnx

from models_core.errors import AdapterError

# Names of modules elsewhere -> the modules here that do the same, tried for names that the model does not have.
_NAMES: Mapping[str, Sequence[str]] = {
  "q_einsum": ("q_proj",),
  "k_einsum": ("k_proj",),
  "v_einsum": ("v_proj",),
  "kv_einsum": ("k_proj", "v_proj"),
  "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
  "attn_vec_einsum": ("o_proj",),
  "gating_einsum": ("gate_proj", "up_proj"),
  "linear": ("down_proj",),
  "gate_proj": ("experts",),
  "up_proj": ("experts",),
  "down_proj": ("experts",),
  "self_attn": ("attn",),
  "embed_tokens": ("embedder",),
}
_QUANTIFIERS = ("*", "+", "?", "{")


def match_modules(model: nnx.Module, pattern: str) -> list[str]:
  """Paths of the modules that hold matrices and whose whole path matches a pattern.

  Norms hold only vectors, and do not count. All matrices of a layer's experts are in one module. An embedding counts,
  although only a tied head multiplies by it.

  Args:
    model: any Flax NNX module.
    pattern: a regular expression, as for `qwix.LoraProvider(module_path=...)`.

  Returns:
    Paths such as "layers/0/attn/q_proj", in the order of `nnx.state`.

  Raises:
    AdapterError: if the pattern is not a regular expression.
  """
  compiled = _compiled(pattern)
  return [path for path in _paths(model) if compiled.fullmatch(path)]


def unmatched(model: nnx.Module, pattern: str) -> dict[str, tuple[str, ...]]:
  """The alternatives of a pattern that match no module with matrices.

  Example: for a Llama, `unmatched(model, ".*kv_einsum|.*up_proj")` is `{".*kv_einsum": (".*k_proj", ".*v_proj")}`.

  Args:
    model: any Flax NNX module.
    pattern: a regular expression, as for `qwix.LoraProvider(module_path=...)`.

  Returns:
    For each such alternative the patterns that may be meant, each of which matches a module; none if nothing is close.

  Raises:
    AdapterError: if the pattern is not a regular expression.
  """
  _compiled(pattern)
  paths = list(_paths(model))
  return {
    alternative: tuple(_suggestions(alternative, paths))
    for alternative in _alternatives(pattern)
    if not _matches_any(alternative, paths)
  }


def _compiled(pattern: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise AdapterError(f"the pattern {pattern!r} is not a regular expression: {error}") from None


def _paths(model: nnx.Module) -> Iterable[str]:
  """Paths of the modules that hold matrices."""
  modules = {path for path, _ in nnx.iter_modules(model)}
  found: dict[str, None] = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if isinstance(variable, nnx.LoRAParam) or len(variable.get_value().shape) < 2:
      continue
    # The arrays of a quantised weight lie below its name, which is no module.
    steps = next(path[:n] for n in range(len(path) - 1, -1, -1) if path[:n] in modules)
    found["/".join(map(str, steps))] = None
  return found


def _matches_any(pattern: str, paths: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, path) for path in paths)


def _alternatives(pattern: str) -> list[str]:
  """All alternatives of a pattern, also those in groups: "a(b|c)|d" -> ["ab", "ac", "d"].

  A group stays as it is if it is repeated, or not a plain one; so do all groups if a backreference counts them.
  """
  flags = re.match(r"\(\?[aimsux]+\)", pattern)
  prefix = flags[0] if flags else ""
  return list(dict.fromkeys(prefix + one for one in _expanded(pattern.removeprefix(prefix))))


def _expanded(pattern: str) -> Iterator[str]:
  bars, groups = _structure(pattern)
  if bars:
    for start, stop in zip([-1, *bars], [*bars, len(pattern)], strict=True):
      yield from _expanded(pattern[start + 1 : stop])
    return
  if not re.search(r"\\[1-9]|\(\?P[=<]", pattern):
    for start, stop in groups:
      before, body, after = pattern[:start], pattern[start + 1 : stop], pattern[stop + 1 :]
      body = body.removeprefix("?:")
      if "|" in body and not body.startswith("?") and not after.startswith(_QUANTIFIERS):
        for option in _expanded(body):
          yield from _expanded(before + option + after)
        return
  yield pattern


def _structure(pattern: str) -> tuple[list[int], list[tuple[int, int]]]:
  """Places of the bars outside of groups, and first and last places of the outermost groups."""
  bars: list[int] = []
  groups: list[tuple[int, int]] = []
  opened: list[int] = []
  # An escaped character, a class of characters, or any other character.
  for token in re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL):
    if token[0] == "(":
      opened.append(token.start())
    elif token[0] == ")":
      start = opened.pop()
      if not opened:
        groups.append((start, token.start()))
    elif token[0] == "|" and not opened:
      bars.append(token.start())
  return bars, groups


def _suggestions(alternative: str, paths: Sequence[str]) -> Iterator[str]:
  """Patterns that differ little from one that matches nothing, or use our names, and match something."""
  slashed = alternative.replace(r"\.", "/")
  whole = (slashed, f".*{slashed}", f"{slashed}/.*")
  tries = [one for one in whole if _matches_any(one, paths)][:1]
  parts = {part for path in paths for part in path.split("/") if not part.isdigit()}
  # Letters after a backslash, as in `\d`, are no words.
  for word in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", re.sub(r"\\.", " ", alternative))):
    if word not in parts:
      names = _NAMES.get(word) or difflib.get_close_matches(word, sorted(parts), n=2, cutoff=0.85)
      tries += [re.sub(rf"\b{word}\b", name, slashed) for name in names]
  yield from dict.fromkeys(one for one in tries if _matches_any(one, paths))
