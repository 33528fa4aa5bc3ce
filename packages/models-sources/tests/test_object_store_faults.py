"""What goes wrong with stores, disks and processes: each ends with the right bytes or with one clear error."""

import hashlib
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from models_sources import (
  ConnectionFailedError,
  CorruptFilesError,
  FilesNotFoundError,
  SourceError,
  get_source,
)
from models_sources.testing import StoreServer

from .checkpoint import CONFIG, WEIGHTS

DATA = WEIGHTS * 10
KEY = "bucket/m/model.safetensors"


@pytest.fixture
def files(store):
  store.put(KEY, DATA)
  store.put("bucket/m/config.json", CONFIG)
  store.address = f"{store.scheme}://bucket/m"
  return open_files(store.address)


def open_files(address, **options):
  return get_source("gcs" if address.startswith("gs") else "s3").open_files(address, **options)


# What takes seconds is tried with one of the two: the code is the same.
slow = pytest.mark.parametrize("store", ["gs"], indirect=True)


# Listing.


@pytest.mark.parametrize(
  "fault",
  [
    {"status": 503},
    {"status": 429, "headers": {"Retry-After": "1"}},
    {"status": 500},
    {"reset": True},
    {"cut": 20},
    {"cut": 20, "reset": True},
  ],
  ids=str,
)
def test_a_listing_that_fails_is_asked_for_again(store, files, store_waits, fault):
  store.fail("GET /bucket$", times=3, **fault)
  assert open_files(store.address).names() == ["config.json", "model.safetensors"]
  assert store_waits == [0.5, 1.0, 2.0]


def test_permanent_failures_are_not_tried_again(store, files, store_waits):
  for status in (400, 403, 404, 418):
    store.requests.clear()
    store.fail("GET /bucket$", status=status)
    with pytest.raises(SourceError) as caught:
      open_files(store.address)
    assert not isinstance(caught.value, ConnectionFailedError)
    assert len(store.requests) == 1
  assert store_waits == []


def test_a_bucket_of_another_region(store, files, store_waits):
  store.fail("GET /bucket$", status=301)
  with pytest.raises(
    SourceError, match=r"says that .*://bucket/m is elsewhere: .*(AWS_REGION|STORAGE_EMULATOR_HOST)"
  ):
    open_files(store.address)
  assert store_waits == []


def test_a_listing_that_is_none(store, files, store_waits):
  store.fail("GET /bucket$", alter=lambda body: b"<html>", times=99)
  with pytest.raises(SourceError, match=f"about {store.address} is not that of an object store"):
    open_files(store.address)
  assert store_waits == []


# Ranges.


@pytest.mark.parametrize(
  "fault",
  [
    {"status": 503},
    {"status": 429, "headers": {"Retry-After": "1"}},
    {"reset": True},
    {"cut": 0},
    {"cut": 70_000},
    {"cut": 70_000, "reset": True},
    {"alter": lambda body: body[:70_000]},
  ],
  ids=str,
)
def test_a_range_that_fails_goes_on(store, files, store_waits, fault):
  store.fail("GET .*safetensors", times=3, **fault)
  assert files.read("model.safetensors", 100, 2_900_000) == DATA[100:2_900_000]
  assert len(store_waits) == 3


def test_names_do_not_decide_what_an_error_means(store, store_waits):
  name = "redirect AssumeRole etag certificate status code: 404 .safetensors"
  store.put(f"bucket/computeMetadata/{name}", DATA)
  files = open_files(f"{store.scheme}://bucket/computeMetadata")
  store.fail("GET .*safetensors", times=2, reset=True)
  assert files.read(name, 0, 1000) == DATA[:1000]
  assert len(store_waits) == 2
  store.put(f"bucket/computeMetadata/{name}", DATA[::-1])
  with pytest.raises(CorruptFilesError, match="was replaced"):
    files.read(name, 0, 1000)
  store.remove(f"bucket/computeMetadata/{name}")
  with pytest.raises(FilesNotFoundError, match="was removed"):
    files.read(name, 0, 1000)


def test_a_cut_range_goes_on_where_it_ended(store, files):
  store.fail("GET .*safetensors", cut=2 << 20)
  assert files.read("model.safetensors", 0, len(DATA)) == DATA
  ranges = [request.range for request in store.requests if request.range]
  assert ranges[0] == f"bytes=0-{len(DATA) - 1}"
  assert int(ranges[1].removeprefix("bytes=").partition("-")[0]) >= 1 << 20


def test_a_lasting_503_is_an_error_that_names_the_object(store, files, store_waits):
  store.fail("GET .*safetensors", status=503, times=99)
  with pytest.raises(ConnectionFailedError, match=rf"answers 503 about {store.scheme}://{KEY}: try later"):
    files.read("model.safetensors", 0, 8)
  assert store_waits == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


@slow
def test_a_stalled_connection_is_left(store, monkeypatch, store_waits):
  monkeypatch.setenv("MODELS_SOURCES_TIMEOUT", "0.3")
  store.put(KEY, DATA)
  files = open_files(f"{store.scheme}://bucket/m")
  store.fail("GET .*safetensors", stall=1.5)
  start = time.monotonic()
  assert files.read("model.safetensors", 0, 1000) == DATA[:1000]
  assert time.monotonic() - start < 1.4
  store.fail("GET .*safetensors", stall=1.5, times=99)
  with pytest.raises(ConnectionFailedError, match="timed out"):
    files.read("model.safetensors", 0, 1000)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_limit_that_is_no_number_of_seconds(store, monkeypatch, text):
  monkeypatch.setenv("MODELS_SOURCES_TIMEOUT", text)
  with pytest.raises(
    SourceError, match=f"MODELS_SOURCES_TIMEOUT is '{text}': set it to a positive number of seconds"
  ):
    open_files(f"{store.scheme}://bucket/m")


@slow
def test_a_slow_answer_comes(store, monkeypatch, store_waits):
  monkeypatch.setenv("MODELS_SOURCES_TIMEOUT", "0.3")
  store.put(KEY, DATA)
  files = open_files(f"{store.scheme}://bucket/m")
  store.fail("GET .*safetensors", drip=0.05)  # Longer in all than the limit between two bytes.
  start = time.monotonic()
  assert files.read("model.safetensors", 0, 20_000) == DATA[:20_000]
  assert time.monotonic() - start > 0.9
  assert store_waits == []


@pytest.mark.parametrize(
  "fault",
  [
    {"ignore_range": True},
    {"ignore_range": True, "alter": lambda body: body[:50]},
    {"shift": 1},
    {"headers": {"Content-Range": ""}},
    {"headers": {"Content-Range": "bytes 0-6/3000710"}},
    {"headers": {"Content-Range": "bytes 0-99/999"}},
    {"headers": {"ETag": '"other"'}},
  ],
  ids=str,
)
def test_an_answer_to_another_question_is_an_error(store, files, store_waits, fault):
  store.fail("GET .*safetensors", **fault)
  with pytest.raises(SourceError, match=rf"{store.scheme}://{KEY}"):
    files.read("model.safetensors", 0, 100)


def test_more_than_was_asked_for_is_an_error(store, files):
  store.fail("GET .*safetensors", alter=lambda body: body + b"more")
  with pytest.raises(SourceError, match="the answer has more bytes than were requested"):
    files.read("model.safetensors", 0, 100)


@pytest.mark.parametrize(
  "other", [DATA[::-1], DATA[:-1], DATA + b"x", b""], ids=["same size", "shorter", "longer", "empty"]
)
def test_an_object_that_is_replaced_between_two_ranges(store, files, store_waits, other):
  assert files.read("model.safetensors", 0, 1000) == DATA[:1000]
  store.put(KEY, other)
  with pytest.raises(CorruptFilesError, match=rf"{store.scheme}://{KEY} was replaced while it was read"):
    files.read("model.safetensors", len(DATA) - 1000, len(DATA))
  assert store_waits == []


def test_a_weak_etag_is_that_of_the_same_version(store, files, store_waits):
  """Proxies that touch an answer mark its ETag as weak: it has `W/` in front then."""
  tag = hashlib.md5(DATA, usedforsecurity=False).hexdigest()
  store.fail("GET .*safetensors", headers={"ETag": f'W/"{tag}"'})
  assert files.read("model.safetensors", 100, 2000) == DATA[100:2000]
  store.fail("GET .*safetensors", headers={"ETag": f'W/"{tag[::-1]}"'})
  with pytest.raises(CorruptFilesError, match="was replaced while it was read"):
    files.read("model.safetensors", 100, 2000)
  assert store_waits == []


def test_an_object_that_is_replaced_within_a_cut_range(store, files, store_waits):
  store.fail("GET .*safetensors", cut=2 << 20, alter=lambda body: (store.put(KEY, DATA[::-1]), body)[1])
  with pytest.raises(CorruptFilesError, match="was replaced while it was read"):
    files.read("model.safetensors", 0, len(DATA))


def test_an_object_that_is_removed(store, files, store_waits):
  store.remove(KEY)
  with pytest.raises(FilesNotFoundError, match="was removed after it was listed"):
    files.read("model.safetensors", 0, 1000)
  assert store_waits == []


def test_a_store_that_ignores_conditions_is_noticed(store, files, monkeypatch):
  answer = StoreServer._answer

  def unconditional(server, request, query, body):
    request.headers.pop("if-match", None)
    return answer(server, request, query, body)

  monkeypatch.setattr(StoreServer, "_answer", unconditional)
  store.put(KEY, DATA[::-1])
  with pytest.raises(CorruptFilesError, match="was replaced"):
    files.read("model.safetensors", 0, 1000)


# The cache.


def blobs(root):
  return sorted(path.name for path in pathlib.Path(root).glob("*/blobs/*"))


@pytest.mark.parametrize("fault", [{"status": 503}, {"reset": True}, {"cut": 100_000}], ids=str)
def test_a_download_that_fails_goes_on(store, files, tmp_path, fault):
  store.fail("GET .*safetensors", times=3, **fault)
  where = open_files(store.address, download_path=str(tmp_path / "c")).fetch(["model.safetensors"])
  assert pathlib.Path(where, "model.safetensors").read_bytes() == DATA


def test_a_download_that_cannot_be_had_leaves_nothing(store, files, tmp_path):
  cached = open_files(store.address, download_path=str(tmp_path / "c"))
  store.put(KEY, DATA[::-1])
  with pytest.raises(CorruptFilesError, match="was replaced while it was read"):
    cached.fetch(["model.safetensors"])
  assert blobs(tmp_path / "c") == []
  assert os.listdir(cached.path) == []
  again = open_files(store.address, download_path=str(tmp_path / "c"))
  assert pathlib.Path(again.fetch(["model.safetensors"]), "model.safetensors").read_bytes() == DATA[::-1]


def child(program, *arguments, **options):
  """A process of its own that has `open_files` and its arguments."""
  head = "import sys; from models_sources import get_source, source_of_address\n"
  head += "def open_files(a, **o): return get_source(source_of_address(a)).open_files(a, **o)\n"
  command = [sys.executable, "-c", head + textwrap.dedent(program), *arguments]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


FETCH = "print(open_files(sys.argv[1], download_path=sys.argv[2]).fetch(['model.safetensors']))"


@slow
def test_a_full_disk_is_an_error_of_the_disk_and_leaves_nothing(store, files, tmp_path):
  def limit():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

  process = child(FETCH, store.address, str(tmp_path / "c"), preexec_fn=limit)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  message = errors.strip().splitlines()[-1]
  assert message.startswith(
    f"models_sources.errors.DiskError: {tmp_path}/c/gs--bucket cannot be written: File too large"
  )
  assert (
    "gs://bucket/m needs 3,000,710 bytes there, and a file may have 1,048,576: raise the limit" in message
  )
  assert blobs(tmp_path / "c") == []
  where = open_files(store.address, download_path=str(tmp_path / "c")).fetch(["model.safetensors"])
  assert pathlib.Path(where, "model.safetensors").read_bytes() == DATA


@slow
def test_two_processes_download_once(store, files, tmp_path):
  store.fail("GET .*safetensors", stall=0.5)
  store.requests.clear()
  both = [child(FETCH, store.address, str(tmp_path / "c")) for _ in range(2)]
  places = [process.communicate(timeout=60)[0].strip() for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert places[0] == places[1]
  assert pathlib.Path(places[0], "model.safetensors").read_bytes() == DATA
  assert store.received(KEY) == len(DATA)


@slow
def test_a_download_that_was_killed_is_made_again(store, files, tmp_path):
  store.fail("GET .*safetensors", drip=0.2)
  process = child(FETCH, store.address, str(tmp_path / "c"))
  deadline = time.monotonic() + 30
  while not store.received(KEY) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.kill()
  process.communicate()
  assert len(blobs(tmp_path / "c")) == 1
  assert blobs(tmp_path / "c")[0].endswith(".part")
  where = open_files(store.address, download_path=str(tmp_path / "c")).fetch(["model.safetensors"])
  assert pathlib.Path(where, "model.safetensors").read_bytes() == DATA
  assert [name.endswith(".part") for name in blobs(tmp_path / "c")] == [False]


def test_many_threads_read_at_once(store, files):
  size, results = 50_000, {}

  def read(start):
    results[start] = files.read("model.safetensors", start, start + size)

  threads = [threading.Thread(target=read, args=(start,)) for start in range(0, len(DATA) - size, size)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert all(data == DATA[start : start + size] for start, data in results.items())
  assert len(results) == len(threads)
