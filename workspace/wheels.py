"""Wheels of members, built from this tree and from tags."""

import io
import os
import pathlib
import subprocess
import tarfile

from workspace import members

UV = os.environ.get("UV", "uv")  # set by `uv run`, which need not be on PATH


def tree_at(name: str, at: str, folder: pathlib.Path) -> pathlib.Path:
  """The whole workspace as a member's version has it: extracted from its tag, or this tree if there is no tag.

  Args:
    name: the member.
    at: its version.
    folder: where the files of a tag are put, each tag in a folder of its own.

  Raises:
    ValueError: the version is neither tagged nor this tree's.
  """
  members.project_at(name, at)
  tag = members.tag_of(name, at)
  if tag not in members.tags():
    return members.ROOT
  place = folder / tag
  if not place.exists():
    command = ["git", "archive", "--format=tar", tag]
    archive = subprocess.run(command, cwd=members.ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
      tar.extractall(place, filter="tar")  # keeps the links to LICENSE
  return place


def build(name: str, tree: pathlib.Path, dist: pathlib.Path) -> pathlib.Path:
  """Builds a member's wheel from a tree and returns its path."""
  command = [UV, "build", "--quiet", "--wheel", "--out-dir", str(dist), str(tree / "packages" / name)]
  subprocess.run(command, cwd=tree, check=True)
  return max(dist.glob(f"{members.import_name(name)}-*.whl"), key=lambda wheel: wheel.stat().st_mtime_ns)


def at_versions(versions: dict[str, str], folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Builds the wheel of each member at a version, from its tag wherever the tag exists."""
  return {name: build(name, tree_at(name, at, folder), folder / "dist") for name, at in versions.items()}


def for_floors(package: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Builds a package's wheel from this tree, and those of its siblings at the lowest versions that it admits."""
  return at_versions(members.lowest(package), folder) | {
    package: build(package, members.ROOT, folder / "own")
  }


def for_downstream(package: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Builds a package's wheel from this tree, and those of the newest released packages that need it."""
  return at_versions(members.downstream(package), folder) | {
    package: build(package, members.ROOT, folder / "own")
  }


def constraints(wheels: dict[str, pathlib.Path]) -> str:
  """Lines for `uv pip install --constraints` that bind each member to its wheel."""
  return "".join(f"{name} @ {wheel.as_uri()}\n" for name, wheel in wheels.items())
