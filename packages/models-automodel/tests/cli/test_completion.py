import shutil
import subprocess

import pytest

from models_automodel.cli import main

SHELL = """
source {script}
words=({line}); [[ '{line}' == *' ' ]] && words+=('')
COMP_WORDS=("${{words[@]}}"); COMP_CWORD=$(( ${{#words[@]}} - 1 ))
_shtab_automodel automodel "${{words[-1]}}" ""
echo "${{COMPREPLY[*]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
  path = tmp_path_factory.mktemp("shell") / "automodel.bash"
  from contextlib import redirect_stdout

  with path.open("w") as file, redirect_stdout(file):
    assert main(["completion", "bash"]) == 0
  return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="runs bash")
@pytest.mark.parametrize(
  ("line", "completed"),
  [
    ("automodel pl", "plan"),
    ("automodel plan --strict", "--strict-sharding"),
    ("automodel plan x --dtype b", "bfloat16"),
    ("automodel plan x --source k", "kaggle"),
    ("automodel convert x y --to ", "huggingface orbax maxtext"),
    ("automodel show meta-llama/Llama-3.2-1", "meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct"),
    ("automodel verify /dev/nul", "/dev/null"),
  ],
)
def test_bash_completes(script, line, completed):
  done = subprocess.run(
    ["bash", "-c", SHELL.format(script=script, line=line)], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == completed, done.stderr


@pytest.mark.parametrize(
  ("shell", "holds"), [("zsh", "#compdef automodel"), ("fish", "complete -c automodel")]
)
def test_other_shells(shell, holds, capsys):
  assert main(["completion", shell]) == 0
  assert holds in capsys.readouterr().out
