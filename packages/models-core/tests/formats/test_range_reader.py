"""Reading files in place: which ranges are requested, how many at a time, and what an error does."""

import collections
import contextlib
import threading

import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError
from models_core.formats import byte_reader
from models_core.formats.byte_reader import LocalReader, RangeReader
from models_core.formats.files import LocalFiles, RangeFiles
from models_core.formats.reader import Extent
from models_core.formats.safetensors import read_safetensors
from models_core.loading.abstract import abstract_model
from models_core.loading.loader import load_arrays
from models_core.loading.plan import plan_load
from models_core.weights.table import Tied, WeightTable

BF16 = np.dtype(ml_dtypes.bfloat16)


class Remote:
  """Files that are never fetched. Notes the ranges of data that are asked for."""

  def __init__(self, path):
    self.local, self.path = LocalFiles(path), path
    self.names, self.size, self.read = self.local.names, self.local.size, self.local.read
    self.ranges = []
    self.before = lambda start: None

  def fetch(self, names):
    raise AssertionError("nothing is to be downloaded")

  def read_into(self, name, start, buffer):
    self.ranges.append((name, start, start + len(buffer)))
    self.before(start)
    buffer[:] = self.read(name, start, start + len(buffer))


@pytest.fixture
def small_ranges(monkeypatch):
  monkeypatch.setattr(byte_reader, "RANGE", 64)
  monkeypatch.setattr(RangeReader, "chunk", 64)


@pytest.fixture
def remote(save):
  return lambda tensors: Remote(str(save(tensors)))


def plan(toy, files, parameters, table, mesh=None, **options):
  return plan_load(read_safetensors(files), abstract_model(toy, parameters, mesh), table, **options)


def times_read(files):
  """How often each byte of the data was asked for, by the number of times."""
  size = files.size("model.safetensors")
  count = np.zeros(size, np.int64)
  for _, start, stop in files.ranges:
    count[start:stop] += 1
  data = min(t.start for t in read_safetensors(files).tensors.values())
  return dict(collections.Counter(count[data:].tolist()))


def test_files_that_offer_ranges_are_read_by_ranges(remote, save, rng):
  x = rng.normal(size=(4, 4)).astype(np.float32)
  files = remote({"x": x})
  assert isinstance(files, RangeFiles)
  for place, kind in ((files, RangeReader), (LocalFiles(files.path), LocalReader)):
    opened = read_safetensors(place).open(["model.safetensors"])
    assert type(opened) is kind
    opened.close()


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "tp"), P("fsdp", "tp")], ids=str)
@pytest.mark.parametrize("dtype", [None, BF16], ids=["as stored", "cast"])
def test_every_byte_is_asked_for_once(toy, remote, rng, mesh, spec, dtype, small_ranges):
  x = rng.normal(size=(40, 32)).astype(np.float32)
  files = remote({"x": x})
  made = plan(toy, files, {"x": (x.shape, spec)}, WeightTable(("x", "x", "v d")), mesh, dtype=dtype)
  array = load_arrays(made)["x"]
  np.testing.assert_array_equal(np.asarray(array), x if dtype is None else x.astype(dtype))
  assert times_read(files) == {1: x.nbytes}
  assert max(stop - start for _, start, stop in files.ranges) == 64


def test_what_is_not_wanted_is_not_asked_for(toy, remote, rng, small_ranges):
  x = rng.normal(size=(40, 8)).astype(np.float32)
  files = remote({"a": x, "unused": x, "b": x})
  checkpoint = read_safetensors(files)
  opened = checkpoint.open(["model.safetensors"])
  part = np.empty((10, 8), np.float32)
  opened.read_into(checkpoint.tensors["b"], 20 * 8, part)
  opened.close()
  np.testing.assert_array_equal(part, x[20:30])
  assert times_read(files) == {0: 3 * x.nbytes - part.nbytes, 1: part.nbytes}


def test_a_large_read_is_many_ranges_at_a_time(remote, rng, small_ranges):
  x = rng.integers(0, 255, 64 * 8, np.uint8)
  files = remote({"x": x})
  checkpoint = read_safetensors(files)
  opened = checkpoint.open(["model.safetensors"])
  together = threading.Barrier(8)  # Broken, unless all eight are under way at a time.
  files.before = lambda start: together.wait(10)
  target = np.empty_like(x)
  opened.read_into(checkpoint.tensors["x"], 0, target)
  opened.close()
  np.testing.assert_array_equal(target, x)
  assert len(files.ranges) == 8


def test_neighbours_are_one_request_where_they_fit_into_one(remote, rng, small_ranges):
  stored = {
    name: rng.integers(0, 255, size, np.uint8)
    for name, size in zip("abcdef", [10, 20, 50, 70, 3, 9], strict=True)
  }
  files = remote(stored)
  checkpoint = read_safetensors(files)
  with contextlib.closing(checkpoint.open(["model.safetensors"])) as opened:
    del files.ranges[:]
    # All but e, so that f is a request of its own.
    extents = [Extent(checkpoint.tensors[name], 0, np.zeros_like(stored[name])) for name in "abcdf"]
    opened.read_extents(extents)
  for extent in extents:
    np.testing.assert_array_equal(extent.buffer, stored[extent.info.name])
  first = checkpoint.tensors["a"].start
  bounds = sorted((start - first, stop - first) for _, start, stop in files.ranges)
  assert bounds == [(0, 64), (64, 128), (128, 150), (153, 162)]


def test_a_failed_range_fails_the_read_after_the_others_are_done(remote, rng, small_ranges):
  x = rng.integers(0, 255, 64 * 8, np.uint8)
  files = remote({"x": x})
  checkpoint = read_safetensors(files)
  begun, ended = [], []

  def before(start):
    if start == checkpoint.tensors["x"].start:
      raise ConnectionError("cut")
    begun.append(start)
    threading.Event().wait(0.05)
    ended.append(start)

  files.before = before
  opened = checkpoint.open(["model.safetensors"])
  with pytest.raises(ConnectionError, match="cut"):
    opened.read_into(checkpoint.tensors["x"], 0, np.empty_like(x))
  assert sorted(begun) == sorted(ended)
  opened.close()


def test_bytes_are_counted_and_threads_end(toy, remote, rng, mesh, small_ranges):
  x = rng.normal(size=(40, 32)).astype(np.float32)
  counts = []
  made = plan(toy, remote({"x": x}), {"x": (x.shape, P(None, "tp"))}, WeightTable(("x", "x", "v d")), mesh)
  load_arrays(made, on_bytes=counts.append)
  assert sum(counts) == x.nbytes
  assert not [thread for thread in threading.enumerate() if thread.name.startswith("ranges")]


def test_headers_of_many_files_are_read_at_a_time(save_sharded, rng):
  x = rng.normal(size=4).astype(np.float32)
  files = Remote(str(save_sharded({f"m-{i}.safetensors": {f"t{i}": x} for i in range(8)})))
  together, read = threading.Barrier(8), files.read

  def read_together(name, start, stop):
    if name.endswith(".safetensors"):
      together.wait(10)  # Broken, unless all eight are under way at a time.
    return read(name, start, stop)

  files.read = read_together
  assert sorted(read_safetensors(files).tensors) == [f"t{i}" for i in range(8)]


def test_twins_are_compared_by_ranges(toy, remote, rng, small_ranges):
  x = rng.normal(size=(8, 4)).astype(np.float32)
  table = WeightTable(("emb", "embed", "v d"), tied=[Tied("head", "embed")])
  parameters = {"emb": ((8, 4), P())}
  assert list(load_arrays(plan(toy, remote({"embed": x, "head": x}), parameters, table))) == ["emb"]
  other = x.copy()
  other[-1, -1] += 1
  with pytest.raises(CheckpointError, match="head differs from embed"):
    load_arrays(plan(toy, remote({"embed": x, "head": other}), parameters, table))


def test_empty_and_scalar_tensors(toy, remote):
  tensors = {"none": np.zeros((0, 4), np.float32), "one": np.float32(3).reshape(())}
  table = WeightTable(("none", "none", "v d"), ("one", "one", ""))
  arrays = load_arrays(plan(toy, remote(tensors), {"none": ((0, 4), P()), "one": ((), P())}, table))
  assert arrays["none"].shape == (0, 4)
  assert arrays["one"] == 3
