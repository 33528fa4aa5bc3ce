"""Writes the table of COMPATIBILITY.md: which core works with which family and which jax.

`python -m workspace.compatibility --write` writes the table into the file; without `--write` it is printed. A row is a
release, or the version of this tree. A release's row says what its own pyproject.toml and uv.lock say.
"""

import sys
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from workspace import members

FILE = members.ROOT / "COMPATIBILITY.md"
BEGIN, END = "<!-- table: python -m workspace.compatibility --write -->\n", "<!-- end of the table -->\n"
_HEADING = (
  "| package | Python | jax | flax | tested with jax | naming, core, sources |\n|---|---|---|---|---|---|\n"
)


def table() -> str:
  """The table, newest versions first."""
  rows = []
  for name, project in members.PROJECTS.items():
    versions = {*members.released(name, "--merged"), Version(members.version(project))}
    rows += [_row(name, str(version)) for version in sorted(versions, reverse=True)]
  return _HEADING + "".join(rows)


def _row(name: str, version: str) -> str:
  project = members.project_at(name, version)["project"]
  needed = {r.name: str(r.specifier) for r in map(Requirement, project["dependencies"])}
  foundations = ", ".join(
    f"{r.removeprefix('models-')} {needed[r]}" for r in members.FOUNDATIONS if r in needed
  )
  jax = needed.get("jax", "–")
  tested = "–" if jax == "–" else ", ".join([jax.removeprefix(">="), *_locked(name, version, "jax")])
  cells = [f"{name} {version}", project["requires-python"], jax, needed.get("flax", "–"), tested]
  return f"| {' | '.join([*cells, foundations or '–'])} |\n"


def _locked(name: str, version: str, package: str) -> list[str]:
  """The versions of a package in the uv.lock of a release."""
  tag = members.tag_of(name, version)
  text = (
    members.git("show", f"{tag}:uv.lock") if tag in members.tags() else (members.ROOT / "uv.lock").read_text()
  )
  found = {entry["version"] for entry in tomllib.loads(text)["package"] if entry["name"] == package}
  return [str(v) for v in sorted(map(Version, found))]


def with_table(text: str) -> str:
  """The text of COMPATIBILITY.md with the current table.

  Raises:
    ValueError: the text lacks the marks around the table.
  """
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise ValueError(f"{FILE.name} needs the lines {BEGIN.strip()} and {END.strip()}")
  return f"{before}{begin}\n{table()}\n{end}{after}"


if __name__ == "__main__":
  if "--write" in sys.argv[1:]:
    FILE.write_text(with_table(FILE.read_text()))
  else:
    print(table(), end="")
