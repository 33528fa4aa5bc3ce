"""What is on the disk when a directory takes its name: a power cut never leaves a name without its content."""

import errno
import os
import pathlib
import stat
import sys

import jax
import numpy as np
import pytest

from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import atomic
from models_core.saving.atomic import recover, replace_directory
from models_core.saving.orbax_writer import write_tree
from models_core.saving.plan import plan_state

STATE = {name: np.arange(100, dtype=np.float32) + place for place, name in enumerate("abc")}


class Trace:
  """What was put on the disk and what was renamed, in this order: `("sync", inode, entries)`, `("rename", inode)`."""

  def __init__(self):
    self.steps = []

  def synced(self, descriptor):
    found = os.fstat(descriptor)
    # What is written, or added, afterwards is not on the disk.
    content = sorted(os.listdir(descriptor)) if stat.S_ISDIR(found.st_mode) else found.st_size
    self.steps.append(("sync", found.st_ino, content))

  def renamed(self, path):
    self.steps.append(("rename", os.stat(path).st_ino))

  def around(self, path):
    """What was put on the disk before a path got its name, and what after."""
    named = max(i for i, step in enumerate(self.steps) if step == ("rename", os.stat(path).st_ino))
    return tuple(
      [step[1:] for step in part if step[0] == "sync"] for part in (self.steps[:named], self.steps[named:])
    )


def state_of(path):
  """As `Trace` notes it."""
  return path.stat().st_ino, sorted(os.listdir(path)) if path.is_dir() else path.stat().st_size


@pytest.fixture
def trace(monkeypatch):
  """Of the real calls, which are made as well."""
  found = Trace()
  fsync, rename, exchange = os.fsync, os.rename, atomic._rename_exchange

  def noted_fsync(descriptor):
    fsync(descriptor)
    found.synced(descriptor)

  def noted_rename(source, target):
    found.renamed(source)
    rename(source, target)

  def noted_exchange(a, b):
    if done := exchange(a, b):
      found.renamed(b)
    return done

  monkeypatch.setattr(os, "fsync", noted_fsync)
  monkeypatch.setattr(os, "rename", noted_rename)
  monkeypatch.setattr(atomic, "_rename_exchange", noted_exchange)
  return found


@pytest.fixture(params=["a new one", "in one step", "by renames"])
def target(request, tmp_path, trace, monkeypatch):
  """A directory that is not there, or one that is exchanged in each of the two ways."""
  directory = tmp_path / "target"
  if request.param == "a new one":
    return directory
  if request.param == "by renames":
    monkeypatch.setattr(atomic, "_rename_exchange", lambda a, b: False)
  elif sys.platform != "linux":
    pytest.skip("a step of Linux")
  (directory / "runs").mkdir(parents=True)
  (directory / "runs" / "log").write_text("mine")
  return directory


def assert_durable(trace, target, *, linked=True):
  """Every file and folder that is new was on the disk before the rename, and the name itself after it."""
  # Under its second name: nothing was written into it, unless it had to be copied.
  old = {target / "runs" / "log"} if linked else set()
  everything = {target, *target.rglob("*")} - old
  before, after = trace.around(target)
  missing = [str(path.relative_to(target)) for path in everything if state_of(path) not in before]
  assert not missing
  assert target.parent.stat().st_ino in [inode for inode, _ in after]


def test_files_of_safetensors(target, trace):
  save_model_to_safetensors(STATE, target, 400, overwrite=True)
  assert len(list(target.glob("*.safetensors"))) == 3
  assert (target / "model.safetensors.index.json").exists()
  assert_durable(trace, target)


def test_what_stays_is_copied_where_there_are_no_hard_links(target, trace, monkeypatch):
  def refuse(source, target):
    raise OSError(errno.EPERM, "no links here", source)

  monkeypatch.setattr(os, "link", refuse)
  save_model_to_safetensors(STATE, target, overwrite=True)
  assert_durable(trace, target, linked=False)


def test_several_devices_hold_what_is_saved(target, trace):
  mesh = jax.make_mesh((4,), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  save_model_to_safetensors(jax.device_put(STATE, sharding), target, overwrite=True)
  assert_durable(trace, target)


def test_texts_beside_a_tree(tmp_path, trace):
  """TensorStore puts its own files on the disk; we put what we write, and the names of all."""
  tree = tmp_path / "tree"
  tree.mkdir()
  write_tree(str(tree), plan_state(STATE), STATE.__getitem__)
  synced = [step[1:] for step in trace.steps]
  folders = [path for path in tree.rglob("*") if path.is_dir()]
  texts = [tree / name for name in ("_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt")]
  for path in [tree, *folders, *texts]:
    assert state_of(path) in synced, path


def test_each_rename_of_an_exchange_is_on_the_disk_before_the_next(tmp_path, trace, monkeypatch):
  """A cut between them leaves a complete directory, old or new, and no state in which neither has a name."""
  monkeypatch.setattr(atomic, "_rename_exchange", lambda a, b: False)
  target = tmp_path / "target"
  target.mkdir()
  old = target.stat().st_ino
  with replace_directory(str(target)) as directory:
    (pathlib.Path(directory) / "a").write_text("new")
  new, parent = target.stat().st_ino, tmp_path.stat().st_ino
  steps = [(step[0], step[1]) for step in trace.steps]
  assert steps == [
    ("sync", new),
    ("rename", new),  # to `complete`
    ("sync", parent),
    ("rename", old),  # to `replaced`
    ("rename", new),  # to the target
    ("sync", parent),
    ("rename", old),
  ]


def test_what_recovery_finishes_is_on_the_disk(tmp_path, trace):
  left = tmp_path / ".target.complete-0123456789abcdef"
  left.mkdir()
  recover(str(tmp_path / "target"))
  assert (tmp_path / "target").is_dir()
  assert [inode for inode, _ in trace.around(tmp_path / "target")[1]] == [tmp_path.stat().st_ino]


def test_a_failed_save_renames_nothing(tmp_path, trace):
  with pytest.raises(ZeroDivisionError), replace_directory(str(tmp_path / "target")):
    raise ZeroDivisionError
  assert not [step for step in trace.steps if step[0] == "rename"]
