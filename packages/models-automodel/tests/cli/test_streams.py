"""Standard streams that are full, closed, or of few characters."""

import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "models_automodel"]
# Without and with rich, with argparse alone, and with JAX.
PRINTING = {
  "list": ["list"],
  "json": ["list", "--json"],
  "help": ["--help"],
  "drawing": ["show", "llama-3.2-1b", "--mesh", "tp=2", "--sharding"],
}


def run(arguments, stdout):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  # Python writes through where this is set, and otherwise when it flushes.
  environment.pop("PYTHONUNBUFFERED", None)
  return subprocess.run(
    [*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
  )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
def test_a_full_disk(arguments):
  with open("/dev/full", "w") as full:
    done = run(arguments, stdout=full)
  name = "" if arguments[0].startswith("-") else f" {arguments[0]}"
  said = f"automodel{name}: the output cannot be written: No space left on device\n"
  assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
def test_a_closed_pipe(arguments):
  reading, writing = os.pipe()
  os.close(reading)
  done = run(arguments, stdout=writing)
  os.close(writing)
  assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
def test_streams_that_are_closed(arguments):
  done = subprocess.run(
    ["sh", "-c", 'exec "$@" <&- >&-', "sh", *COMMAND, *arguments],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_ascii_terminal():
  code = "from models_automodel.cli import main; import models_naming; "
  code += "models_naming.known_model_ids = lambda: {'llama3p1': ['caf\\u00e9']}; main(['list'])"
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
    capture_output=True,
    text=True,
  )
  assert "caf?" in done.stdout, done.stderr
