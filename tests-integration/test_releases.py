"""Releases in throw-away clones: which ones hold, and which ones the sessions of the noxfile refuse.

The clones hold the files of this tree. The checks build real wheels from tags; what a wheel imports is tried in a fresh
interpreter, in front of what is installed here.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FAMILIES = ["models_llama.llama3", "models_qwen.qwen3"]

pytestmark = pytest.mark.skipif(
  not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a clone and git"
)


class Clone:
  """A repository with the files of this tree, in which each member is released as it stands."""

  def __init__(self, path):
    self.path = path
    self.names = sorted(p.name for p in (ROOT / "packages").iterdir() if (p / "pyproject.toml").exists())

  def __truediv__(self, name):
    return self.path / name

  def git(self, *args):
    return self.run("git", "-c", "user.name=x", "-c", "user.email=x@example.org", *args).stdout

  def run(self, *command, check=True, **options):
    done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, **options)
    if check and done.returncode:
      raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
    return done

  def commit(self, message="a change"):
    self.git("commit", "--quiet", "--all", "--no-verify", "--message", message)

  def tag(self, name, version):
    self.git("tag", "--annotate", f"{name}-v{version}", "--message", "released")

  def edit(self, file, old, new):
    text = (self / file).read_text()
    assert old in text
    (self / file).write_text(text.replace(old, new))

  def set_version(self, name, version):
    self.edit(f"packages/{name}/pyproject.toml", 'version = "0.1.0"', f'version = "{version}"')

  def decide(self, program, check=True):
    """Runs a program on the clone's own workspace package."""
    heading = "from workspace import members, public_names, releases, wheels; import pathlib\n"
    return self.run(sys.executable, "-c", heading + program, check=check)

  def import_wheels(self, function, package, modules, folder):
    """What goes wrong when modules are imported from the wheels that a function of `workspace.wheels` builds."""
    folder.mkdir()
    printed = self.decide(f"print(*wheels.{function}({package!r}, pathlib.Path({str(folder)!r})).values())")
    unpacked = folder / "unpacked"
    for wheel in printed.stdout.split():
      zipfile.ZipFile(wheel).extractall(unpacked)
    program = f"import models_core, {', '.join(modules)}; print(models_core.__file__)"
    done = self.run(sys.executable, "-c", program, check=False, env=_path(unpacked))
    assert done.returncode or str(unpacked) in done.stdout
    return done.stderr.strip().splitlines()[-1] if done.returncode else None

  def problems(self, package, folder):
    program = f"print(*public_names.problems({package!r}, pathlib.Path({str(folder)!r})), sep=chr(10))"
    return self.decide(program).stdout.strip().splitlines()

  def bounds(self, released=None):
    printed = self.decide(f"print(*members.bounds(members.tags(), {released!r}), sep=chr(10))").stdout
    return [line for line in printed.splitlines() if line]


def _path(folder):
  return {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "PATH": ""}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  """The clone before a test changes it."""
  clone = Clone(tmp_path_factory.mktemp("pristine"))
  listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
  for name in names:
    if name and (ROOT / name).is_file() and not name.startswith(("tests-", "benchmarks/")):
      (clone / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, clone / name, follow_symlinks=False)
  # The root's pyproject.toml names this folder as a member.
  (clone / "tests-integration").mkdir()
  shutil.copy(ROOT / "tests-integration" / "pyproject.toml", clone / "tests-integration")
  clone.git("init", "--quiet", "--initial-branch", "main")
  clone.git("config", "user.name", "x")
  clone.git("config", "user.email", "x@example.org")
  clone.git("add", "--all")
  clone.git("commit", "--quiet", "--message", "first")
  for name in clone.names:
    clone.set_version(name, "0.1.0")
    clone.tag(name, "0.1.0")
  return clone


@pytest.fixture
def clone(pristine, tmp_path):
  shutil.copytree(pristine.path, tmp_path / "clone", symlinks=True)
  return Clone(tmp_path / "clone")


def use_new_function(clone):
  """Llama uses a function that core does not have in its release."""
  with (clone / "packages/models-core/src/models_core/dtypes.py").open("a") as file:
    file.write("\n\ndef brand_new() -> int:\n  return 1\n")
  llama = clone / "packages/models-llama/src/models_llama/llama3/model.py"
  llama.write_text(llama.read_text() + "\n\nfrom models_core.dtypes import brand_new  # noqa: E402, F401\n")
  clone.set_version("models-llama", "0.2.0")


class TestNewFunctionOfCore:
  """The scenario: a family uses what core's release does not have."""

  def test_without_a_version_the_floors_fail(self, clone, tmp_path):
    use_new_function(clone)
    clone.commit()
    assert clone.bounds("models-llama") == []
    problem = clone.import_wheels("for_floors", "models-llama", ["models_llama.llama3"], tmp_path / "wheels")
    assert re.match(r"ImportError: cannot import name 'brand_new' from 'models_core.dtypes'", problem)

  def test_with_a_version_it_waits_for_core_and_then_holds(self, clone, tmp_path):
    use_new_function(clone)
    clone.set_version("models-core", "0.2.0")
    clone.edit("packages/models-llama/pyproject.toml", "models-core>=0.1.0,<0.3", "models-core>=0.2.0,<0.4")
    clone.commit()
    assert clone.bounds() == []
    (problem,) = clone.bounds("models-llama")
    assert "needs models-core-v0.2.0, which is not tagged: release the sibling first" in problem
    clone.tag("models-core", "0.2.0")
    assert clone.bounds("models-llama") == []
    imported = clone.import_wheels("for_floors", "models-llama", ["models_llama.llama3"], tmp_path / "wheels")
    assert imported is None


def rename(clone, old, new):
  """Renames a name in all packages, as a careful author does."""
  for file in (clone / "packages").rglob("*.py*"):
    if file.suffix in (".py", ".pyi") and old in (text := file.read_text()):
      file.write_text(re.sub(rf"\b{old}\b", new, text))


class TestRenameInCore:
  """The scenario: core renames a function, and all families of the tree follow."""

  def test_released_families_fail(self, clone, tmp_path):
    rename(clone, "split_heads", "divide_heads")
    clone.commit()
    in_tree = [str(p) for p in (clone / "packages").glob("*/src")]
    tree = clone.run(sys.executable, "-c", f"import {', '.join(FAMILIES)}", env=_path(":".join(in_tree)))
    assert tree.returncode == 0
    problem = clone.import_wheels("for_downstream", "models-core", FAMILIES, tmp_path / "wheels")
    assert "'split_heads'" in problem
    (public,) = clone.problems("models-core", tmp_path)
    assert public.startswith("models-core: models_core.layers.split_heads is gone, but 0.1.0 has it")

  def test_a_deprecated_name_stays_for_one_minor_version(self, clone, tmp_path):
    rename(clone, "split_heads", "divide_heads")
    core = clone / "packages/models-core/src/models_core/layers"
    with (core / "attention.py").open("a") as file:
      file.write(
        "\n\ndef split_heads(x: jax.Array, num_heads: int) -> jax.Array:\n  return divide_heads(x, num_heads)\n"
      )
    clone.edit(
      "packages/models-core/src/models_core/layers/__init__.pyi",
      "  divide_heads,\n",
      "  divide_heads,\n  split_heads,\n",
    )
    clone.edit(
      "packages/models-core/src/models_core/layers/__init__.pyi",
      '"divide_heads",',
      '"divide_heads",\n  "split_heads",',
    )
    clone.edit(
      "packages/models-core/CHANGELOG.md",
      "## Unreleased\n",
      "## Unreleased\n\n- Deprecated: `models_core.layers.split_heads`.\n",
    )
    clone.set_version("models-core", "0.2.0")
    clone.commit()
    assert clone.import_wheels("for_downstream", "models-core", FAMILIES, tmp_path / "wheels") is None
    assert clone.problems("models-core", tmp_path) == []
    clone.tag("models-core", "0.2.0")
    rename(clone, "split_heads", "gone_heads")
    (problem,) = clone.problems("models-core", tmp_path)
    assert "0.2.0 only deprecates it: raise the minor version" in problem
    clone.edit("packages/models-core/pyproject.toml", 'version = "0.2.0"', 'version = "0.3.0"')
    assert clone.problems("models-core", tmp_path) == []
    # Released families do not admit that version: an installer keeps 0.2 for them.
    assert clone.decide("print(members.dependents('models-core'))").stdout == "{}\n"
    assert any(
      "'models-core<0.3,>=0.1.0' does not admit models-core 0.3.0" in line for line in clone.bounds()
    )

  def test_a_parameter_is_renamed(self, clone, tmp_path):
    clone.edit("packages/models-core/src/models_core/layers/attention.py", "num_heads: int", "heads: int")
    problems = clone.problems("models-core", tmp_path)
    assert problems
    assert all("split_heads(" in line for line in problems)


RELEASE = "with releases.candidate({package!r}, {version!r}) as tree:\n  {checks}"


class TestCommitAndTag:
  """What `nox -s release` does around its checks."""

  def release(self, clone, package, version, checks="pass"):
    return clone.decide(RELEASE.format(package=package, version=version, checks=checks), check=False)

  def state(self, clone):
    worktrees = clone.git("worktree", "list")
    return clone.git("rev-parse", "HEAD"), clone.git("tag"), clone.git("status", "--porcelain"), worktrees

  def test_a_right_release(self, clone):
    head = clone.git("rev-parse", "HEAD").strip()
    check = "assert '0.2.0' in (tree / 'packages/models-naming/pyproject.toml').read_text()"
    done = self.release(clone, "models-naming", "0.2.0", check)
    assert done.returncode == 0, done.stderr
    assert clone.git("rev-parse", "HEAD~1").strip() == head
    assert clone.git("rev-parse", "HEAD") == clone.git("rev-list", "-n1", "models-naming-v0.2.0")
    assert clone.git("symbolic-ref", "HEAD").strip() == "refs/heads/main"
    assert clone.git("status", "--porcelain") == ""
    changed = set(clone.git("diff", "--name-only", "HEAD~1").split())
    folder = "packages/models-naming"
    assert changed == {"COMPATIBILITY.md", "uv.lock", f"{folder}/CHANGELOG.md", f"{folder}/pyproject.toml"}
    assert "| models-naming 0.2.0 |" in (clone / "COMPATIBILITY.md").read_text()
    assert "| models-naming 0.1.0 |" in (clone / "COMPATIBILITY.md").read_text()
    assert re.search(r"## Unreleased\n\n## 0.2.0\n\n- ", (clone / folder / "CHANGELOG.md").read_text())

  def test_versions_that_are_refused(self, clone):
    before = self.state(clone)
    reasons = {
      "0.0.9": "is at 0.1.0 in this tree, and 0.0.9 is lower",
      "0.1.0": "models-naming-v0.1.0 is released already",
      "0.02": "write '0.02' as 0.2",
      "next": "'next' is no version",
    }
    for version, reason in reasons.items():
      assert reason in self.release(clone, "models-naming", version).stderr
    assert self.state(clone) == before

  def test_a_fix_of_an_old_version(self, clone):
    assert self.release(clone, "models-naming", "0.2.0").returncode == 0
    assert "is at 0.2.0 in this tree" in self.release(clone, "models-naming", "0.1.1").stderr
    clone.git("switch", "--quiet", "--create", "fix", "models-naming-v0.1.0")
    done = self.release(clone, "models-naming", "0.1.1")
    assert done.returncode == 0, done.stderr
    assert "| models-naming 0.2.0 |" not in (clone / "COMPATIBILITY.md").read_text()

  def test_a_failed_check_leaves_everything_as_before(self, clone):
    before = self.state(clone)
    done = self.release(clone, "models-naming", "0.2.0", "raise SystemExit('a test fails')")
    assert "a test fails" in done.stderr
    assert self.state(clone) == before

  @pytest.mark.parametrize("hook", ["pre-commit", "commit-msg"])
  def test_a_failed_hook_leaves_everything_as_before(self, clone, hook):
    script = clone / ".git/hooks" / hook
    script.parent.mkdir(exist_ok=True)
    script.write_text("#!/bin/sh\necho new > made-by-the-hook; echo 'no such commits here' >&2; exit 1\n")
    script.chmod(0o755)
    before = self.state(clone)
    done = self.release(clone, "models-naming", "0.2.0")
    assert "no such commits here" in done.stderr
    assert "git commit" in done.stderr
    assert self.state(clone) == before

  def test_a_branch_that_moved_gets_no_tag(self, clone):
    before = self.state(clone)
    check = "members.git('commit', '--quiet', '--allow-empty', '--message', 'meanwhile')"
    done = self.release(clone, "models-naming", "0.2.0", check)
    assert "git merge" in done.stderr
    assert self.state(clone)[1:3] == before[1:3]

  def test_changes_and_missing_notes_are_refused(self, clone):
    (clone / "note.txt").write_text("mine")
    assert "the working tree has changes" in self.release(clone, "models-naming", "0.2.0").stderr
    assert (clone / "note.txt").read_text() == "mine"
    (clone / "note.txt").unlink()
    changelog = clone / "packages/models-naming/CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0\n\n- First version.\n")
    clone.commit()
    assert "no entry under '## Unreleased'" in self.release(clone, "models-naming", "0.2.0").stderr


def test_bounds_of_siblings_have_caps(clone):
  clone.edit("packages/models-llama/pyproject.toml", "models-core>=0.1.0,<0.3", "models-core>=0.1.0")
  (problem,) = clone.bounds()
  assert problem == "models-llama: 'models-core>=0.1.0' needs one upper bound, at most <0.3"
  clone.edit("packages/models-llama/pyproject.toml", "models-core>=0.1.0", "models-core>=0.1.0,<0.4")
  (problem,) = clone.bounds()
  assert problem == "models-llama: 'models-core<0.4,>=0.1.0' needs one upper bound, at most <0.3"
