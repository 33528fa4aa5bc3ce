"""Compares the public names of this tree with those of the last release: `python -m workspace.public_names`.

A package or room with `__all__` is public by that list; any other module by what it defines without a leading
underscore. COMPATIBILITY.md holds the promise.
"""

import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator

import griffe
from packaging.version import Version

from workspace import members, wheels

# Modules that users import by their own names, beside a package's `__all__`; in a family's package, of each architecture.
BESIDE_ALL = {"models_automodel": ["convert", "verify"], "models_sources": ["testing", "testing_kaggle"]}
OF_ARCHITECTURE = ["model", "params"]


def read(name: str, tree: pathlib.Path) -> griffe.Module:
  """Reads a member's source; nothing is imported."""
  sources = [str(tree / "packages" / name / "src")]
  module = griffe.load(
    members.import_name(name), search_paths=sources, allow_inspection=False, resolve_aliases=True
  )
  assert isinstance(module, griffe.Module)
  return module


def public_names(module: griffe.Module) -> dict[str, griffe.Object | griffe.Alias]:
  """Public names as users import them, `models_core.layers.attend`, and what they name."""
  if module.exports is not None:
    found = {f"{module.path}.{n}": module[str(n)] for n in module.exports if str(n) in module.members}
    inside = BESIDE_ALL.get(module.path, OF_ARCHITECTURE) + [
      n for n, m in module.modules.items() if m.exports is not None
    ]
  else:
    found = {
      f"{module.path}.{n}": member
      for n, member in module.members.items()
      if not n.startswith("_") and not member.is_alias and not member.is_module
    }
    inside = [n for n in module.modules if not n.startswith("_")]
  for name in inside:
    if name in module.modules:
      found |= public_names(module.modules[name])
  return found


def breakages(old: griffe.Module, new: griffe.Module) -> Iterator[tuple[str, str]]:
  """Yields each public name that is gone or no longer takes what it took, and a sentence that says so."""
  before, after = public_names(old), public_names(new)
  for name in sorted(before.keys() - after.keys()):
    yield name, f"{name} is gone"
  # Compared under the names that users import, so that a definition may move to another module.
  flat_old, flat_new, owners = griffe.Module("public"), griffe.Module("public"), {}
  for name in sorted(before.keys() & after.keys()):
    was, now = _definition(before[name]), _definition(after[name])
    if was is not None and now is not None:
      key = name.replace(".", "/")
      flat_old.members[key] = griffe.Alias(key, was, parent=flat_old)
      flat_new.members[key] = griffe.Alias(key, now, parent=flat_new)
      owners[was.canonical_path] = name
  for breakage in griffe.find_breaking_changes(flat_old, flat_new):
    path = re.sub(r"\(.*", "", breakage.obj.canonical_path)
    name = next((n for owner, n in owners.items() if path == owner or path.startswith(f"{owner}.")), path)
    yield name, re.sub(r"\x1b\[\d+m", "", breakage.explain(griffe.ExplanationStyle.ONE_LINE)).strip()


def _definition(named: griffe.Object | griffe.Alias) -> griffe.Object | None:
  """What a name stands for; None if griffe does not see it, as a constant that is unpacked from a tuple."""
  try:
    return named.final_target if isinstance(named, griffe.Alias) else named
  except griffe.AliasResolutionError:
    return None


def deprecated(changelog: str) -> set[str]:
  """The names in a changelog's lines ``- Deprecated: `NAME` ``."""
  return {
    n
    for line in re.findall(r"^- Deprecated: (.*)$", changelog, re.M)
    for n in re.findall(r"`([\w.]+)`", line)
  }


def problems(name: str, folder: pathlib.Path) -> Iterator[str]:
  """Yields the changes of a member's public names since its last release that the promise forbids.

  Args:
    name: the member.
    folder: where the files of the last release are put.
  """
  if not (versions := members.released(name, "--merged")):
    return
  last, here = versions[-1], Version(members.version(members.PROJECTS[name]))
  tree = wheels.tree_at(name, str(last), folder)
  announced = deprecated((tree / "packages" / name / "CHANGELOG.md").read_text())
  for changed, text in breakages(read(name, tree), read(name, members.ROOT)):
    if changed not in announced:
      yield f"{name}: {text}, but {last} has it: keep the old name and add a line 'Deprecated' to the changelog"
    elif here.release[:2] == last.release[:2]:
      yield f"{name}: {text}, but {last} only deprecates it: raise the minor version of {name}"


if __name__ == "__main__":
  with tempfile.TemporaryDirectory(prefix="released-") as place:
    found = [line for name in members.PROJECTS for line in problems(name, pathlib.Path(place))]
  sys.exit("\n".join(found) or None)
