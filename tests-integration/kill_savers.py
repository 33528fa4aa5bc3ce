"""Kills saving processes at random moments and looks at what they leave: `python kill_savers.py MOMENTS [SEED]`.

A third of the savers makes a new directory each time, a third replaces one in one step, a third by renames as on
systems without that step. A directory must be missing (new ones alone) or hold one complete save, with the user's
own file in it; the next save must leave nothing else beside it. Before that, one small save of each kind is killed
before each of its system calls in turn.
"""

import collections
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

import numpy as np
import safetensors.numpy

from models_core.formats import LocalFiles, read_safetensors
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import atomic

# Three files of two tensors; a save takes some ten milliseconds.
SHAPES = {f"{name}.w": (300, 200 + 10 * i) for i, name in enumerate("abcdef")}
LIMIT = 600_000
LONGEST = 0.1
KINDS = ("new", "in one step", "by renames")


def save(target: pathlib.Path, number: int) -> None:
  """A save that can be told from others: all of its numbers are the same."""
  state = {name: np.full(shape, number, np.float32) for name, shape in SHAPES.items()}
  save_model_to_safetensors(state, target, LIMIT, overwrite=True)


def keep_saving(kind: str, root: pathlib.Path, ready: int) -> None:
  """Never returns."""
  if kind == "by renames":
    atomic._rename_exchange = lambda a, b: False
  for number in range(1, 10**6):
    save(root / (f"new-{number}" if kind == "new" else "target"), number)
    if number == 1:
      os.write(ready, b"1")


def look(target: pathlib.Path) -> str:
  """What a directory is: "missing" or "complete".

  Raises:
    AssertionError: if it is anything else.
  """
  if not target.exists():
    return "missing"
  checkpoint = read_safetensors(LocalFiles(str(target)))
  assert not checkpoint.problems, checkpoint.problems
  assert {name: info.shape for name, info in checkpoint.tensors.items()} == SHAPES
  found = {}
  for file in {info.file for info in checkpoint.tensors.values()}:
    found |= safetensors.numpy.load_file(target / file)
  numbers = {number for array in found.values() for number in np.unique(array)}
  assert len(numbers) == 1, f"{target} mixes the saves {numbers}"
  return "complete"


def kill_one(kind: str, root: pathlib.Path, moment: float) -> str:
  """Starts a saver, kills it `moment` seconds after its first save, and looks."""
  target = root / "target"
  if kind != "new":
    target.mkdir()
    (target / "notes.txt").write_text("mine")
  reader, writer = os.pipe()
  if (child := os.fork()) == 0:
    try:
      keep_saving(kind, root, writer)
    finally:
      os._exit(1)
  os.read(reader, 1)
  time.sleep(moment)
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  assert os.WTERMSIG(status) == signal.SIGKILL, f"the saver failed before it was killed: {status}"
  os.close(reader)
  os.close(writer)
  left = [name for name in os.listdir(root) if name.startswith(".")]
  if kind == "new":
    assert all(look(path) == "complete" for path in root.glob("new-*"))
    # Hidden names are those of one target: the next save of that one removes them.
    target = root / (left[0].split(".")[1] if left else "new-0")
  else:
    between = not target.exists()
    assert not (between and kind == "in one step"), "the target vanished"
    atomic.recover(str(target))
    assert look(target) == "complete"
    assert (target / "notes.txt").read_text() == "mine"
    if between:
      return "between two renames"
  # The next save, in a process of its own: this one must stay without threads.
  if (child := os.fork()) == 0:
    try:
      save(target, 0)
      assert look(target) == "complete"
      os._exit(0)
    finally:
      os._exit(1)
  assert os.waitpid(child, 0)[1] == 0, "the next save failed"
  assert not [name for name in os.listdir(root) if name.startswith(".")], (
    "something is left beside the target"
  )
  return "while building" if left else "between saves"


CALLS = (
  "mkdir",
  "open",
  "close",
  "write",
  "fsync",
  "rename",
  "link",
  "unlink",
  "rmdir",
  "listdir",
  "scandir",
)


def kill_before_call(kind: str, root: pathlib.Path, number: int) -> bool:
  """Replaces one small directory, kills that before a system call, and looks. False where there are not so many calls."""
  target = root / "target"
  if kind != "new":
    target.mkdir()
    for name in ("a", "b"):
      (target / name).write_text("old")
    (target / "notes.txt").write_text("mine")
  if (child := os.fork()) == 0:
    try:
      _die_before(number, kind)
      with atomic.replace_directory(str(target), overwrite=True, outdated=lambda old: ["a", "b"]) as new:
        for name in ("a", "c"):
          descriptor = os.open(os.path.join(new, name), os.O_WRONLY | os.O_CREAT)
          os.write(descriptor, b"new")
          os.fsync(descriptor)
          os.close(descriptor)
      os._exit(0)
    finally:
      os._exit(1)
  status = os.waitpid(child, 0)[1]
  assert status in (0, signal.SIGKILL), f"the writer failed: {status}"
  atomic.recover(str(target))
  found = {path.name: path.read_text() for path in target.iterdir()} if target.exists() else {}
  old, new = {"a": "old", "b": "old"}, {"a": "new", "c": "new"}
  if kind == "new":
    assert found in ({}, new), found
  else:
    assert found in (old | {"notes.txt": "mine"}, new | {"notes.txt": "mine"}), found
  with atomic.replace_directory(str(target), overwrite=True):
    pass
  assert os.listdir(root) == ["target"], os.listdir(root)
  return status != 0


def _die_before(number: int, kind: str) -> None:
  left = number

  def counted(call):
    def wrapper(*args, **kwargs):
      nonlocal left
      left -= 1
      if not left:
        os.kill(os.getpid(), signal.SIGKILL)
      return call(*args, **kwargs)

    return wrapper

  for name in CALLS:
    setattr(os, name, counted(getattr(os, name)))
  exchange = atomic._rename_exchange if kind == "in one step" else lambda a, b: False
  atomic._rename_exchange = counted(exchange)


def main(moments: int, seed: int) -> None:
  """Prints how many savers were killed in which state."""
  for kind in KINDS:
    calls = 1
    while True:
      with tempfile.TemporaryDirectory() as root:
        if not kill_before_call(kind, pathlib.Path(root), calls):
          break
      calls += 1
    print(f"{calls - 1:4} {kind}: killed before each system call")
  rng = random.Random(seed)
  counts: collections.Counter[tuple[str, str]] = collections.Counter()
  for number in range(moments):
    kind = KINDS[number % len(KINDS)]
    with tempfile.TemporaryDirectory() as root:
      counts[kind, kill_one(kind, pathlib.Path(root), rng.uniform(0, LONGEST))] += 1
  for (kind, state), count in sorted(counts.items()):
    print(f"{count:4} {kind}: killed {state}")


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
