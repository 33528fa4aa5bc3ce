"""Loads that are kept: what a later load takes from them, what it does not, and that nothing that fails matters."""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from models_core.loading import load
from models_core.shard_cache import ShardCache


@pytest.mark.parametrize("shape", [None, (2, 2), (4, 1), (1, 2)])
def test_a_second_load_makes_nothing(shape, toys, meshes, notes):
  tensors = toys.write(0)
  mesh = None if shape is None else meshes("auto", shape, ("fsdp", "tp"))
  first, second = toys.load(mesh), toys.load(mesh)
  assert (toys.made, notes()) == (1, [])
  for model in (first, second):
    toys.check(model, tensors)
  for name in tensors:
    a, b = getattr(first, name)[...], getattr(second, name)[...]
    assert (a.sharding, a.dtype) == (b.sharding, b.dtype)
    for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
      np.testing.assert_array_equal(np.asarray(one.data), np.asarray(other.data))


def test_explicit_axes(toys, meshes):
  tensors = toys.write(0)
  mesh = meshes("explicit", (2, 2), ("fsdp", "tp"))
  toys.load(mesh)
  toys.check(toys.load(mesh), tensors)
  assert toys.made == 1


def test_a_cpu_uses_the_mapped_file(toys):
  tensors = toys.write(0)
  toys.load()
  model = toys.load()
  address = model.both[...].unsafe_buffer_pointer()
  maps = [line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
  held = [
    line[-1] for line in maps if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)
  ]
  assert held == [str(toys.entries[0] / "shards.safetensors")]
  # It stays when the entry is removed.
  for file in toys.entries[0].iterdir():
    file.unlink()
  toys.check(model, tensors)


def test_what_decides_the_numbers_decides_the_entry(toys, meshes):
  toys.write(0)
  one, other = (meshes("auto", shape, ("fsdp", "tp")) for shape in ((2, 2), (4, 1)))
  for loads in range(2):
    for number, changes in enumerate(
      ({}, {"dtype": np.float16}, {"mesh": one}, {"mesh": other}, {"also": b"x"})
    ):
      toys.load(**changes)
      assert toys.made == (number + 1 if loads == 0 else 5)


def test_a_changed_file_is_read(toys, notes):
  before = toys.write(0)
  toys.check(toys.load(), before)
  was = toys.path.stat()
  after = toys.write(1)
  os.utime(toys.path, ns=(was.st_atime_ns, was.st_mtime_ns))
  assert (toys.path.stat().st_size, toys.path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
  toys.check(toys.load(), after)
  assert (toys.made, notes()) == (2, [])


def test_changes_in_quick_succession(toys):
  for seed in range(8):
    tensors = toys.write(seed)
    toys.check(toys.load(), tensors)
    toys.check(toys.load(), tensors)
  assert toys.made == 8


def test_what_changed_during_a_load_is_not_kept(toys, notes):
  toys.write(0)

  def meanwhile(plan):
    model = load(plan)
    toys.write(1)
    return model

  toys.load(make=meanwhile)
  assert notes() == ["the load is not kept: a file of the checkpoint changed while it was loaded"]
  assert toys.entries == []


def test_a_file_from_the_future_is_not_kept(toys, notes, monkeypatch):
  tensors = toys.write(0)
  now = toys.path.stat().st_ctime_ns
  monkeypatch.setattr("time.time_ns", lambda: now - 10**9)
  toys.check(toys.load(), tensors)
  (note,) = notes()
  assert "changed in the future, by the clock of this machine" in note
  assert toys.entries == []


def damaged(toys):
  """Each way to damage an entry, as (file, what is done to its bytes)."""
  shards = toys.entries[0] / "shards.safetensors"
  size = shards.stat().st_size
  for position in (3, 60, 300, size // 2, size - 1):
    yield shards, lambda data, at=position: data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
  yield shards, lambda data: data[: size // 2]
  yield shards, lambda data: data[:10]
  yield shards, lambda data: data + b"\0"
  yield shards, lambda data: data[: size - 4096] + bytes(4096)
  record = toys.entries[0] / "record.json"
  for position in (0, 64, 200, -1):
    yield (
      record,
      lambda data, at=position: (
        data[:at] + bytes([data[at] ^ 1]) + data[len(data) + at + 1 if at < 0 else at + 1 :]
      ),
    )
  yield record, lambda data: b""
  yield record, lambda data: data[:-1]


def test_a_damaged_entry_is_noticed_and_made_anew(toys, notes):
  tensors = toys.write(0)
  toys.load()
  ways = len(list(damaged(toys)))
  for way in range(ways):
    file, damage = list(damaged(toys))[way]
    was = file.read_bytes()
    file.write_bytes(damage(was))
    toys.check(toys.load(), tensors)
    (note,) = notes()
    assert note.startswith("an entry is broken, and is made anew: "), way
    assert (toys.made, file.read_bytes()) == (way + 2, was)


@pytest.mark.parametrize("name", ["record.json", "shards.safetensors"])
def test_an_entry_without_one_of_its_files(name, toys):
  tensors = toys.write(0)
  toys.load()
  (toys.entries[0] / name).unlink()
  toys.check(toys.load(), tensors)
  toys.load()
  assert toys.made == 2


def test_a_disk_that_is_full(toys, notes):
  tensors = toys.write(0)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
  try:
    toys.check(toys.load(), tensors)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  (note,) = notes()
  assert "cannot be written: File too large" in note
  assert list(pathlib.Path(toys.cache.directory).iterdir()) == []
  toys.load()
  toys.load()
  assert toys.made == 2


def test_a_place_that_cannot_be_written(toys, notes, tmp_path):
  tensors = toys.write(0)
  (tmp_path / "cache").write_text("a file")
  toys.check(toys.load(), tensors)
  (note,) = notes()
  assert note.startswith("the load is not kept: ")
  assert (tmp_path / "cache").read_text() == "a file"


KILLED = """
import os, signal, sys
from models_core.saving import replace_directory
with replace_directory(sys.argv[1]) as building:
  open(os.path.join(building, "shards.safetensors"), "wb").write(bytes(100))
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer(toys, tmp_path):
  tensors = toys.write(0)
  toys.load()
  (entry,) = toys.entries
  other = entry.with_name("0" * 32)
  for file in entry.iterdir():
    file.unlink()
  entry.rmdir()
  # One of the same load, and one of another.
  for target in (entry, other):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
  assert len(list((tmp_path / "cache").glob(".*.saving-*"))) == 2
  toys.check(toys.load(), tensors)
  assert list((tmp_path / "cache").glob(".*.saving-*")) == []
  assert toys.entries == [entry]
  toys.check(toys.load(), tensors)
  assert toys.made == 2


def test_two_writers_at_once(toys):
  tensors = toys.write(0)
  both, models = threading.Barrier(2), []

  def make(plan):
    both.wait(60)
    return load(plan)

  threads = [threading.Thread(target=lambda: models.append(toys.load(make=make))) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for model in (*models, toys.load()):
    toys.check(model, tensors)
  assert (len(models), toys.made, len(toys.entries)) == (2, 2, 1)


def test_what_was_not_used_for_longest_makes_room(toys, tmp_path):
  toys.write(0)
  toys.load(also=b"0")
  size = sum(file.stat().st_size for file in toys.entries[0].iterdir())
  (tmp_path / "cache" / "my notes").mkdir()
  (tmp_path / "cache" / "my notes" / "text").write_bytes(bytes(10 * size))
  toys.cache = ShardCache(toys.cache.directory, 2 * size + 100)
  for number in range(1, 6):
    toys.load(also=b"%d" % number)
    toys.load(also=b"0")
  # The first stays, because each other load uses it.
  assert (toys.made, len(toys.entries)) == (6, 3)
  toys.load(also=b"5")
  assert toys.made == 6
  assert (tmp_path / "cache" / "my notes" / "text").exists()


def test_a_disk_that_fills_up_bounds_the_cache(toys, notes, monkeypatch):
  toys.write(0)
  toys.load(also=b"0")
  toys.load(also=b"1")
  size = sum(file.stat().st_size for file in toys.entries[0].iterdir())
  # A part of an entry fits, then nothing: each time, one entry makes room.
  for free, made in ((size // 2, 3), (0, 4)):
    monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
    toys.load(also=b"%d" % made)
    assert (toys.made, len(toys.entries), notes()) == (made, 2, [])
  for entry in toys.entries:
    shutil.rmtree(entry)
  toys.load(also=b"5")
  (note,) = notes()
  assert note.endswith("bytes are needed on the disk, and 0 are free or held by other entries")


def test_what_is_larger_than_the_limit(toys, notes):
  tensors = toys.write(0)
  toys.cache = ShardCache.of(toys.cache.directory, "10KB")
  toys.check(toys.load(), tensors)
  (note,) = notes()
  assert "max_cache_size is 10,000: raise it" in note
  assert toys.entries == []


@pytest.mark.parametrize(("dtype", "helps"), [(np.float32, True), (np.float16, False)])
def test_files_that_a_cpu_maps_need_no_second_copy(dtype, helps, save, toys, notes):
  toys.write(0)
  toys.path = save({name: toys.write(0)[name] for name in toys.write(0)}, data_start=0) / "model.safetensors"
  found = toys.cache.helps(toys.plan(dtype=dtype))
  said = notes()
  assert found is helps
  assert len(said) == (not helps)
