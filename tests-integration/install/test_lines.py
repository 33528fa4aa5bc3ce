"""The installation lines of the READMEs, run as they are written, each in an environment that holds nothing else.

`URL` is a clone of this repository on this machine. After the installation the clone is moved away: nothing may need it.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
UV = os.environ.get("UV", "uv")
SECTION = (ROOT / "README.md").read_text().partition("## Install it\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```sh\n(.*?)^```", SECTION, re.M | re.S)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
OF_PACKAGES = {
  line
  for file in ROOT.glob("packages/*/README.md")
  for line in re.findall(r'`(uv pip install "[^`]*)`', file.read_text())
}

pytestmark = pytest.mark.skipif(
  "INSTALL_LINES" not in os.environ,
  reason="runs in the session `install`: it asks an index for all dependencies",
)

# What chooses another environment than the user's; nox sets some of them.
CHOICES = ("UV_PROJECT_ENVIRONMENT", "UV_PYTHON", "PYTHONPATH")


class Machine:
  """A clone, an environment and a project of a user."""

  def __init__(self, folder):
    self.clone, self.venv, self.project = folder / "clone", folder / "venv", folder / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)
    subprocess.run([UV, "venv", "--quiet", "--seed", "--python", sys.executable, str(self.venv)], check=True)
    path = os.pathsep.join([str(self.venv / "bin"), str(pathlib.Path(UV).parent), os.environ["PATH"]])
    ours = {"VIRTUAL_ENV": str(self.venv), "PATH": path, "URL": self.clone.as_uri()}
    self.env = {k: v for k, v in os.environ.items() if k not in CHOICES} | ours

  def run(self, line, where=None):
    done = subprocess.run(
      ["bash", "-c", line], cwd=where or self.clone, env=self.env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout

  def python(self, program, where="/"):
    return self.run(f"python -c '{program}'", where)

  def move_clone(self):
    self.clone.rename(self.clone.with_name("elsewhere"))


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def test_lines_are_found():
  assert len(LINES) == 7
  assert len(OF_PACKAGES) >= 4


@pytest.mark.parametrize("line", [line for line in LINES if "uv add" not in line and "jax[" not in line])
def test_an_installation_needs_no_clone(machine, line):
  machine.run(line)
  machine.move_clone()
  machine.python("from models_automodel import AutoModel; import models_llama.llama3")
  program = "import models_core, models_llama; print(models_core.__file__, models_llama.__file__)"
  assert all(str(machine.venv) in file for file in machine.python(program).split())


def test_dependencies_of_a_project(machine):
  machine.project.mkdir()
  del machine.env["VIRTUAL_ENV"]
  machine.run(f"uv init --quiet --bare --python {sys.executable}", machine.project)
  for line in LINES:
    if line.startswith("uv add"):
      machine.run(line, machine.project)
  machine.move_clone()
  program = "from models_automodel import AutoModel; import models_llama.llama3, models_gemma.gemma3"
  machine.run(f"uv run --no-sync python -c '{program}'", machine.project)


@pytest.mark.parametrize("line", [line for line in LINES if "jax[" in line])
def test_jax_for_accelerators_fits(machine, line):
  """Resolved only: the packages for an accelerator take gigabytes."""
  machine.run(f"{line} --dry-run")


@pytest.mark.parametrize("line", sorted(OF_PACKAGES))
def test_lines_of_the_packages(machine, line):
  machine.run(f"{line} --dry-run")


COMMAND = "from models_core.extras import install_command; print(install_command('models-core[gguf]'))"


@pytest.mark.parametrize(
  "line", [LINES[0], 'uv pip install --editable "./packages/models-automodel[llama]"', LINES[3]]
)
def test_the_command_of_an_error_works(machine, line):
  machine.run(line)
  command = machine.run(f'python -c "{COMMAND}"')
  assert "models-automodel[gguf]" in command
  machine.run(command)
  machine.python("import gguf, models_llama.llama3")
  assert machine.run(f'python -c "{COMMAND}"') == command
