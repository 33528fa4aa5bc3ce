"""The members of the workspace: their pyproject.toml files, their git tags, and the bounds between them."""

import pathlib
import subprocess
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

ROOT = pathlib.Path(__file__).parent.parent.resolve()
PROJECTS = {
  project["project"]["name"]: project
  for file in sorted(ROOT.glob("packages/*/pyproject.toml"))
  for project in [tomllib.loads(file.read_text())]
}
# Those that others are built on. A release of one of them is tested with the released packages that need it.
FOUNDATIONS = ["models-core", "models-naming", "models-sources"]


def git(*args: str) -> str:
  """Runs git in this clone and returns what it prints.

  Raises:
    subprocess.CalledProcessError: with git's message on standard error.
  """
  return subprocess.run(["git", *args], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def tag_of(name: str, version: str | Version) -> str:
  """The tag that marks a release."""
  return f"{name}-v{version}"


def tags(*options: str) -> set[str]:
  """The tags of this clone; with `--merged`, those of this branch. None in an archive without git."""
  return set(git("tag", "--list", *options).split()) if (ROOT / ".git").exists() else set()


def released(name: str, *options: str) -> list[Version]:
  """The versions of a member that have a tag, in ascending order; options as those of `tags`."""
  found = []
  for tag in tags(*options):
    package, _, version = tag.rpartition("-v")
    if package == name:
      try:
        found.append(Version(version))
      except InvalidVersion:
        continue
  return sorted(found)


def import_name(name: str) -> str:
  """The import package of a distribution."""
  return name.replace("-", "_")


def version(project: dict) -> str:
  """The version that a pyproject.toml declares."""
  return project["project"]["version"]


def project_at(name: str, at: str) -> dict:
  """Reads a member's pyproject.toml at one version: from its tag, or from this tree if there is no tag.

  Raises:
    ValueError: the version is neither tagged nor this tree's.
  """
  if (tag := tag_of(name, at)) in tags():
    return tomllib.loads(git("show", f"{tag}:packages/{name}/pyproject.toml"))
  if at == version(PROJECTS[name]):
    return PROJECTS[name]
  raise ValueError(f"{name} {at} is neither tagged {tag} nor the version of this tree: fetch the tags")


def siblings(texts: list[str]) -> list[Requirement]:
  """The requirements that name members of this workspace."""
  return [r for text in texts for r in [Requirement(text)] if r.name in PROJECTS]


def extras(project: dict) -> list[str]:
  """The requirements of all extras."""
  return [text for texts in project["project"].get("optional-dependencies", {}).values() for text in texts]


def published(project: dict) -> list[Requirement]:
  """A project's published requirements on its siblings: dependencies and extras."""
  table = project["project"]
  return [r for r in siblings(table.get("dependencies", []) + extras(project)) if r.name != table["name"]]


def with_extras(name: str, project: dict) -> str:
  """A requirement on a member and all of its extras: `models-core[gguf,orbax]`."""
  names = ",".join(project["project"].get("optional-dependencies", {}))
  return f"{name}[{names}]" if names else name


def floor(requirement: Requirement) -> list[str]:
  """The lower bounds that a requirement states."""
  return [s.version for s in requirement.specifier if s.operator in (">=", "~=", "==")]


def caps(requirement: Requirement) -> list[str]:
  """The upper bounds that a requirement states."""
  return [s.version for s in requirement.specifier if s.operator == "<"]


def highest_cap(version: str) -> Version:
  """The highest upper bound on a sibling of this version.

  What a minor version does not deprecate is still there in the next one, and may be gone in the one after it.
  """
  major, minor = Version(version).release[:2]
  return Version(f"{major}.{minor + 2}")


def bounds(tags: set[str], released: str | None = None) -> Iterator[str]:
  """Yields problems with the version bounds between members, which uv does not check.

  A bound must admit the sibling's version in this tree; its floor must be that version or have a tag, and its cap must
  not be above `highest_cap`. For the package that is being released the floor needs a tag, because the sibling must be
  on the index first.
  """
  for name, project in PROJECTS.items():
    for r in published(project):
      here = version(PROJECTS[r.name])
      floors, cap = floor(r), highest_cap(here)
      if not r.specifier.contains(here, prereleases=True):
        yield f"{name}: '{r}' does not admit {r.name} {here} of this workspace: change the bound"
      if len(caps(r)) != 1 or Version(caps(r)[0]) > cap:
        yield f"{name}: '{r}' needs one upper bound, at most <{cap}"
      if len(floors) != 1:
        yield f"{name}: '{r}' needs one lower bound"
      elif (tag := tag_of(r.name, floors[0])) not in tags:
        if name == released:
          yield f"{name}: '{r}' needs {tag}, which is not tagged: release the sibling first"
        elif floors[0] != here:
          yield f"{name}: the floor of '{r}' is neither {here} nor tagged {tag}: raise it to {here}"


def lowest(package: str) -> dict[str, str]:
  """The lowest versions of all siblings that the package and these siblings admit together."""
  test = PROJECTS[package].get("dependency-groups", {}).get("test", [])
  unbounded = [r for r in siblings(test) if not floor(r) and r.name != package]
  queue = [*published(PROJECTS[package]), *(r for r in siblings(test) if floor(r)), *unbounded]
  found: dict[str, str] = {}
  while queue:
    r = queue.pop(0)
    wanted = next(iter(floor(r)), found.get(r.name, version(PROJECTS[r.name])))
    if r.name == package or (r.name in found and Version(wanted) <= Version(found[r.name])):
      continue
    found[r.name] = wanted
    # Before the unbounded requirements, which take the working tree's version unless another one is required.
    queue = [*published(project_at(r.name, wanted)), *queue]
  return found


def dependents(package: str) -> dict[str, str]:
  """The newest released versions of the packages that need this one and admit its version in this tree."""
  found = {}
  for name, versions in ((name, released(name)) for name in PROJECTS if name != package):
    if not versions:
      continue
    newest = str(versions[-1])
    mine = [r for r in published(project_at(name, newest)) if r.name == package]
    if mine and all(r.specifier.contains(version(PROJECTS[package]), prereleases=True) for r in mine):
      found[name] = newest
  return found


def downstream(package: str) -> dict[str, str]:
  """The newest released versions of a package's dependents, and of all that these need besides the package."""
  found = dependents(package)
  queue = [r for name, at in found.items() for r in published(project_at(name, at))]
  while queue:
    name = queue.pop().name
    if name != package and name not in found:
      versions = released(name)
      found[name] = str(versions[-1]) if versions else version(PROJECTS[name])
      queue += published(project_at(name, found[name]))
  return found
