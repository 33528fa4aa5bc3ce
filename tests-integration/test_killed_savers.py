"""Whenever a saver is killed, a directory is the old or the new checkpoint."""

import os
import pathlib
import subprocess
import sys

import pytest

MOMENTS = 18


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange in one step is Linux's")
def test_killed_savers():
  """In a process that has no threads before it forks. The script itself looks at what is left."""
  script = pathlib.Path(__file__).with_name("kill_savers.py")
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, script, str(MOMENTS)],
    capture_output=True,
    text=True,
    env=environment | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  counts = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
  assert sum(int(count) for count, what in counts if "system call" not in what) == MOMENTS
  assert all(int(count) > 15 for count, what in counts if "system call" in what)
