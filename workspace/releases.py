"""Makes the commit and the tag of a release, in a working tree of its own."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from packaging.version import InvalidVersion, Version

from workspace import members, wheels

# What would make git and uv work on another tree than the one that they run in.
_OTHER_TREES = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"}


class ReleaseError(Exception):
  """A release that is refused; the message says what to do."""


def check_version(package: str, new: str) -> None:
  """Refuses a version that is malformed, released already, or lower than one of this branch.

  Another branch may hold higher ones: a fix of an old minor version starts at the tag of that version.

  Raises:
    ReleaseError: with the version that the new one must be above.
  """
  try:
    wanted = Version(new)
  except InvalidVersion as error:
    raise ReleaseError(f"{new!r} is no version: write it as 0.2.0") from error
  if str(wanted) != new:
    raise ReleaseError(f"write {new!r} as {wanted}")
  if (tag := members.tag_of(package, new)) in members.tags():
    raise ReleaseError(f"{tag} is released already: choose another version")
  here = Version(members.version(members.PROJECTS[package]))
  if wanted < here:
    raise ReleaseError(f"{package} is at {here} in this tree, and {new} is lower: choose a higher version")
  if (last := members.released(package, "--merged")) and wanted < last[-1]:
    raise ReleaseError(f"{package} {last[-1]} is released from this branch: choose a version above it")


def with_heading(changelog: str, new: str) -> str:
  """A changelog whose unreleased entries are those of a new version.

  Raises:
    ReleaseError: there are no unreleased entries.
  """
  if not re.search(r"^## Unreleased\n+(?!## )\S", changelog, re.M):
    raise ReleaseError("the changelog has no entry under '## Unreleased': add one")
  return changelog.replace("## Unreleased\n", f"## Unreleased\n\n## {new}\n", 1)


@contextlib.contextmanager
def candidate(package: str, new: str) -> Iterator[pathlib.Path]:
  """The commit of a release, checked out in a temporary working tree, for the checks that the caller runs.

  Version, lock, changelog and table of versions are changed there, and committed with the hooks of this clone. When the
  caller's checks have passed, the commit is tagged and the branch goes forward to it. If anything fails, the clone is as
  before: its working tree is not touched until then.

  Raises:
    ReleaseError: the release is refused, a hook refused the commit, or the branch has moved meanwhile.
  """
  if members.git("status", "--porcelain").strip():
    raise ReleaseError("the working tree has changes: commit or stash them")
  check_version(package, new)
  changelog = pathlib.Path("packages", package, "CHANGELOG.md")
  text = with_heading((members.ROOT / changelog).read_text(), new)
  with _worktree() as tree:
    (tree / changelog).write_text(text)
    _run(tree, wheels.UV, "version", "--quiet", "--package", package, "--no-sync", new)
    _run(tree, sys.executable, "-m", "workspace.compatibility", "--write")
    message = f"{package} {new}"
    _run(tree, "git", "commit", "--quiet", "--all", "--message", message)
    yield tree
    tag = members.tag_of(package, new)
    _run(tree, "git", "tag", "--annotate", tag, "--message", message)
    try:
      _run(members.ROOT, "git", "merge", "--quiet", "--ff-only", tag)
    except ReleaseError:
      members.git("tag", "--delete", tag)
      raise


@contextlib.contextmanager
def _worktree() -> Iterator[pathlib.Path]:
  """A working tree at HEAD, with no branch."""
  with tempfile.TemporaryDirectory(prefix="release-") as folder:
    tree = pathlib.Path(folder).resolve() / "tree"
    members.git("worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    try:
      yield tree
    finally:
      members.git("worktree", "remove", "--force", str(tree))


def _run(tree: pathlib.Path, *command: str) -> None:
  env = {name: value for name, value in os.environ.items() if name not in _OTHER_TREES}
  try:
    subprocess.run(command, cwd=tree, env=env, check=True)
  except subprocess.CalledProcessError as error:
    raise ReleaseError(f"{' '.join(command)} failed with status {error.returncode}: see above") from error
