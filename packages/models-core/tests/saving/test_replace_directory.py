"""A directory is the old one or the new one, and nobody's files are lost."""

import errno
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from models_core.errors import SaveError
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import atomic as module
from models_core.saving.atomic import recover, replace_directory


@pytest.fixture(params=["in one step", "by renames"])
def either_way(request, monkeypatch):
  """The exchange that the system has, and the one for systems that have none."""
  if request.param == "by renames":
    monkeypatch.setattr(module, "_rename_exchange", lambda a, b: False)
  elif sys.platform != "linux":
    pytest.skip("a step of Linux")


def fill(directory, **files):
  for name, text in files.items():
    pathlib.Path(directory, name).write_text(text)


def texts(directory):
  return {path.name: path.read_text() for path in sorted(pathlib.Path(directory).iterdir()) if path.is_file()}


@pytest.mark.parametrize("there", ["missing", "empty", "below missing"])
def test_a_new_directory(there, tmp_path):
  target = tmp_path / ("a/b" if there == "below missing" else "target")
  if there == "empty":
    target.mkdir()
  with replace_directory(str(target)) as directory:
    assert not target.exists() or not os.listdir(target)
    fill(directory, a="1")
  assert texts(target) == {"a": "1"}
  assert os.listdir(target.parent) == [target.name]


def test_what_exists_is_not_replaced_unless_asked_for(tmp_path):
  (tmp_path / "target").mkdir()
  fill(tmp_path / "target", a="old")
  with pytest.raises(SaveError, match="overwrite=True"), replace_directory(str(tmp_path / "target")):
    pytest.fail("nothing is written")
  (tmp_path / "file").write_text("text")
  with (
    pytest.raises(SaveError, match="is not a directory"),
    replace_directory(str(tmp_path / "file"), overwrite=True),
  ):
    pytest.fail("nothing is written")
  assert sorted(os.listdir(tmp_path)) == ["file", "target"]
  assert texts(tmp_path / "target") == {"a": "old"}


def test_replacing_keeps_what_is_not_outdated(either_way, tmp_path):
  target = tmp_path / "target"
  (target / "runs" / "1").mkdir(parents=True)
  fill(target, weights="old", config="old", notes="mine")
  fill(target / "runs" / "1", log="mine")
  (target / "link").symlink_to("notes")
  target.chmod(0o700)
  inode = (target / "notes").stat().st_ino
  with replace_directory(str(target), overwrite=True, outdated=lambda old: ["weights"]) as directory:
    fill(directory, config="new", shard="new")
    assert texts(target)["config"] == "old"
  assert texts(target) == {"config": "new", "shard": "new", "notes": "mine", "link": "mine"}
  assert (target / "notes").stat().st_ino == inode
  assert (target / "link").is_symlink()
  assert (target / "runs" / "1" / "log").read_text() == "mine"
  assert target.stat().st_mode & 0o777 == 0o700
  assert os.listdir(tmp_path) == ["target"]


def test_a_file_that_appears_in_the_last_moment_stays(either_way, tmp_path, monkeypatch):
  target = tmp_path / "target"
  target.mkdir()
  fill(target, weights="old")
  exchange = module._exchange

  def late(building, where):
    fill(target, late="mine")
    exchange(building, where)

  monkeypatch.setattr(module, "_exchange", late)
  with replace_directory(str(target), overwrite=True, outdated=lambda old: ["weights"]) as directory:
    fill(directory, weights="new")
  assert texts(target) == {"weights": "new", "late": "mine"}
  assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_or_interrupt_leaves_everything_as_it_was(error, exists, tmp_path):
  target = tmp_path / "target"
  if exists:
    target.mkdir()
    fill(target, a="old")

  def fail():
    with replace_directory(str(target), overwrite=True) as directory:
      fill(directory, a="new")
      raise error

  with pytest.raises(error):
    fail()
  assert os.listdir(tmp_path) == (["target"] if exists else [])
  assert not exists or texts(target) == {"a": "old"}


def test_a_link_to_a_directory_stays_a_link(either_way, tmp_path):
  (tmp_path / "real").mkdir()
  fill(tmp_path / "real", a="old")
  (tmp_path / "link").symlink_to("real")
  with replace_directory(str(tmp_path / "link"), overwrite=True) as directory:
    fill(directory, a="new")
  assert (tmp_path / "link").is_symlink()
  assert texts(tmp_path / "real") == {"a": "new"}


def test_two_writers_of_one_target(tmp_path):
  with replace_directory(str(tmp_path / "target")) as directory:
    with (
      pytest.raises(SaveError, match="another process is writing"),
      replace_directory(str(tmp_path / "target")),
    ):
      pytest.fail("nothing is written")
    fill(directory, a="1")
  assert texts(tmp_path / "target") == {"a": "1"}
  assert os.listdir(tmp_path) == ["target"]


def test_leftovers_are_removed_and_nobody_elses(tmp_path):
  ours = [f".target.{stage}-{'0123456789abcdef'}" for stage in ("saving", "complete", "replaced")]
  others = [
    ".target.saving-notes",
    ".other.saving-0123456789abcdef",
    ".target.saving-0123456789abcdef0",
    "target2",
  ]
  (tmp_path / "target").mkdir()
  for name in ours + others:
    (tmp_path / name).mkdir()
  (tmp_path / f".target.saving-{'f' * 16}").write_text("a file, which we never make")
  with replace_directory(str(tmp_path / "target")) as directory:
    fill(directory, a="1")
  assert sorted(os.listdir(tmp_path)) == sorted([*others, f".target.saving-{'f' * 16}", "target"])


@pytest.mark.parametrize(
  ("left", "expected"),
  [
    ({"complete": "new", "replaced": "old"}, "new"),
    ({"replaced": "old"}, "old"),
    ({"complete": "new", "replaced": "old", "saving": "half"}, "new"),
    ({"saving": "half"}, None),
    ({}, None),
  ],
  ids=str,
)
def test_recovery(left, expected, tmp_path):
  for stage, text in left.items():
    directory = tmp_path / f".target.{stage}-0123456789abcdef"
    directory.mkdir()
    fill(directory, a=text)
  recover(str(tmp_path / "target"))
  assert os.listdir(tmp_path) == (["target"] if expected else [])
  assert not expected or texts(tmp_path / "target") == {"a": expected}


def test_recovery_touches_nothing_that_is_there(tmp_path):
  (tmp_path / "target").mkdir()
  (tmp_path / ".target.saving-0123456789abcdef").mkdir()
  recover(str(tmp_path / "target"))
  recover("no/such/place")
  assert len(os.listdir(tmp_path)) == 2


# Savers


STATE = {"a": np.arange(300_000, dtype=np.float32), "b": np.arange(300_000, dtype=np.float32) + 1}


def test_saving_over_files_that_are_mapped(tmp_path):
  save_model_to_safetensors(STATE, tmp_path / "target", 10**6)
  first = sorted((tmp_path / "target").glob("*.safetensors"))[0]
  mapped = np.memmap(first, np.uint8, "r")
  before = bytes(mapped)
  (tmp_path / "target" / "notes.txt").write_text("mine")
  save_model_to_safetensors({"a": -STATE["a"]}, tmp_path / "target", overwrite=True)
  assert bytes(mapped) == before
  assert sorted(os.listdir(tmp_path / "target")) == ["model.safetensors", "notes.txt"]
  found = safetensors.numpy.load_file(tmp_path / "target" / "model.safetensors")
  np.testing.assert_array_equal(found["a"], -STATE["a"])


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(exists, tmp_path):
  """A limit of the file's size stands for the disk's: the same call fails at the same place."""
  target = tmp_path / "target"
  if exists:
    save_model_to_safetensors({"a": np.zeros(3)}, target)
  before = texts_of_bytes(target)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
  try:
    with pytest.raises(SaveError, match="cannot be written: File too large") as caught:
      save_model_to_safetensors(STATE, target, overwrite=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert caught.value.errno == errno.EFBIG
  assert texts_of_bytes(target) == before
  assert os.listdir(tmp_path) == (["target"] if exists else [])


def texts_of_bytes(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


def test_a_place_where_nothing_can_be_made(tmp_path):
  if os.geteuid() == 0:
    place = pathlib.Path("/proc/1/fd/target")
  else:
    tmp_path.chmod(0o500)
    place = tmp_path / "target"
  try:
    with pytest.raises(SaveError, match="cannot be written"):
      save_model_to_safetensors(STATE, place)
  finally:
    tmp_path.chmod(0o700)


def test_an_interrupt_leaves_everything_as_it_was(tmp_path, interrupt):
  save_model_to_safetensors({"a": np.zeros(3)}, tmp_path / "target")
  before = texts_of_bytes(tmp_path / "target")
  with pytest.raises(KeyboardInterrupt):
    save_model_to_safetensors(STATE, tmp_path / "target", overwrite=True, on_bytes=interrupt)
  assert texts_of_bytes(tmp_path / "target") == before
  assert os.listdir(tmp_path) == ["target"]


def test_a_killed_saver_s_directory_goes_with_the_next_save(tmp_path):
  script = f"""
import os, signal, numpy as np
from models_core.safetensors_saver import save_model_to_safetensors
kill = lambda count: os.kill(os.getpid(), signal.SIGKILL)
save_model_to_safetensors({{"a": np.zeros(9)}}, {str(tmp_path / "target")!r}, on_bytes=kill)
"""
  killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "JAX_PLATFORMS": "cpu"})
  assert killed.returncode == -9
  assert len(os.listdir(tmp_path)) == 2  # what it was building, and its lock
  save_model_to_safetensors(STATE, tmp_path / "target")
  assert os.listdir(tmp_path) == ["target"]
