import os
import pathlib

import pytest
from huggingface_hub import constants

from models_sources import ConnectionFailedError, CorruptFilesError, DiskError, SourceError, get_source

from .checkpoint import CONFIG, FILES, REPO, WEIGHTS, flipped

open_files = get_source("huggingface").open_files


@pytest.fixture
def files(hub, commit):
  return open_files(REPO)


@pytest.fixture
def commit(hub):
  return hub.add(REPO, FILES)


def blobs(files):
  return {path.name for path in (files.cache.folder / "blobs").glob("*")}


def content(directory, name):
  return (pathlib.Path(directory) / name).read_bytes()


# Opening.


def test_a_burst_of_503_is_waited_out(hub, commit, waits):
  hub.fail("api", status=503, times=3)
  assert open_files(REPO).names() == sorted(FILES)
  assert waits == [0.5, 1.0, 2.0]


def test_a_lasting_503_is_an_error(hub, commit, waits):
  hub.fail("api", status=503, times=99)
  with pytest.raises(
    ConnectionFailedError, match="answers 503 about the list of files of org/name: try later"
  ):
    open_files(REPO)
  assert len(waits) == 4


def test_retry_after_is_honoured(hub, commit, waits):
  hub.fail("api", status=429, headers={"Retry-After": "7"})
  hub.fail("api", status=429, headers={"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"})
  open_files(REPO)
  assert waits == [7.0, 0.0]


def test_a_long_retry_after_is_an_error_at_once(hub, commit, waits):
  hub.fail("api", status=429, headers={"Retry-After": "3600"})
  with pytest.raises(ConnectionFailedError, match="answers 429"):
    open_files(REPO)
  assert waits == []


def test_permanent_failures_are_not_retried(hub, commit, waits):
  hub.fail("api", status=418, times=9)
  with pytest.raises(SourceError, match="answers 418"):
    open_files(REPO)
  assert len(hub.requests) == 1
  assert waits == []


@pytest.mark.parametrize("fault", [{"reset": True}, {"cut": 20}, {"cut": 20, "reset": True}])
def test_a_broken_connection_is_made_again(hub, commit, waits, fault):
  hub.fail("api", **fault)
  assert open_files(REPO).names() == sorted(FILES)
  assert len(waits) == 1


def test_nobody_listens(hub, waits, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9/")
  with pytest.raises(
    ConnectionFailedError, match=r"no connection to http://127.0.0.1:9 for .* of org/name \(ConnectError\)"
  ) as caught:
    open_files(REPO)
  assert "password" not in str(caught.value)
  assert len(waits) == 4


def test_an_endpoint_that_is_no_address(hub, waits, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "ftp://127.0.0.1:9")
  with pytest.raises(SourceError, match="HF_ENDPOINT"):
    open_files(REPO)
  assert waits == []


def test_a_server_that_is_no_hub(hub, commit, waits):
  hub.fail("api", alter=lambda body: body.replace(b'"sha"', b'"no"'))
  with pytest.raises(SourceError, match="states no commit for org/name: check HF_ENDPOINT"):
    open_files(REPO)
  hub.fail("api", alter=lambda body: b"<html>")
  with pytest.raises(SourceError, match="is not that of a Hugging Face hub"):
    open_files(REPO)


# Reading ranges.


@pytest.mark.parametrize(
  "fault",
  [
    {"status": 503},
    {"status": 429, "headers": {"Retry-After": "0"}},
    {"reset": True},
    {"cut": 30},
    {"cut": 30, "reset": True},
    {"alter": lambda body: body[:30]},
  ],
)
def test_a_range_that_fails_is_read_again(hub, files, waits, fault):
  hub.fail("storage GET", times=2, **fault)
  assert files.read("model.safetensors", 8, 100_000) == WEIGHTS[8:100_000]
  assert len(waits) == 2


def test_a_stalled_range_is_read_again(hub, files, waits, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
  hub.fail("storage GET", stall=0.6)
  assert files.read("model.safetensors", 0, 8) == WEIGHTS[:8]
  assert len(waits) == 1


@pytest.mark.parametrize("start", [0, 8, 70_000])
def test_a_server_without_ranges_is_left_once_the_bytes_are_here(hub, commit, start):
  # More than the sockets of both sides take in.
  big = os.urandom(1 << 20) * 40
  hub.add(REPO, {"model.safetensors": big})
  files = open_files(REPO)
  hub.fail("storage GET", ignore_range=True)
  assert files.read("model.safetensors", start, start + 100) == big[start : start + 100]
  assert hub.requests[-1].sent < len(big)


def test_a_server_without_ranges_and_the_end_of_the_file(hub, files):
  hub.fail("hub GET", ignore_range=True)
  assert files.read("config.json", 5, 1000) == CONFIG[5:]


@pytest.mark.parametrize(
  "fault",
  [
    {"shift": 1},
    {"headers": {"Content-Range": "bytes 0-7/999"}},
    {"headers": {"Content-Range": ""}},
    {"headers": {"Content-Range": "bytes 0-6/300071"}},
    {"headers": {"Content-Encoding": "gzip"}},
    {"ignore_range": True, "alter": lambda body: body + b"more"},
  ],
)
def test_an_answer_to_another_question_is_an_error(hub, files, waits, fault):
  hub.fail("storage GET", **fault)
  with pytest.raises(SourceError):
    files.read("model.safetensors", 0, 8)
  assert waits == []


def test_redirects_do_not_go_on_for_ever(hub, files):
  hub.fail("hub GET", status=302, headers={"Location": "/org/name/resolve/main/config.json"}, times=99)
  with pytest.raises(SourceError, match="redirects"):
    files.read("config.json", 0, 8)


def test_a_whole_file_is_checked(hub, files):
  hub.fail("hub GET", alter=flipped)
  assert files.read("config.json", 0, len(CONFIG)) == CONFIG
  hub.fail("hub GET", alter=flipped, times=2)
  with pytest.raises(CorruptFilesError, match=r"config.json of org/name .* was downloaded twice"):
    files.read("config.json", 0, len(CONFIG))


# Fetching.


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_fetched_again(hub, files, name):
  hub.fail("GET /(blobs|org)", alter=flipped)
  assert content(files.fetch([name]), name) == FILES[name]


def test_a_lasting_flipped_bit_leaves_nothing_behind(hub, files):
  files.fetch(["config.json"])
  kept = blobs(files)
  hub.fail("storage GET", alter=flipped, times=99)
  with pytest.raises(
    CorruptFilesError,
    match=r"model.safetensors of org/name .* was downloaded twice, and neither copy matches",
  ):
    files.fetch(["model.safetensors", "config.json"])
  assert blobs(files) == kept
  assert os.listdir(files.path) == ["config.json"]
  assert hub.lines("storage").count(hub.lines("storage")[0]) == 2


def test_a_file_that_was_in_the_cache_is_neither_checked_nor_removed(hub, files):
  path = pathlib.Path(files.fetch(["model.safetensors"])) / "model.safetensors"
  path.write_bytes(flipped(WEIGHTS))
  files.fetch(["model.safetensors"])
  assert path.read_bytes() == flipped(WEIGHTS)


@pytest.mark.parametrize("fault", [{"status": 503}, {"reset": True}, {"cut": 100_000, "reset": True}])
def test_a_download_that_fails_is_begun_again(hub, files, waits, fault, monkeypatch):
  monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client library's own waits
  hub.fail("storage GET", times=2, **fault)
  assert content(files.fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS
  assert len(waits) <= 2


def test_a_cut_download_is_continued(hub, files, monkeypatch):
  monkeypatch.setattr("time.sleep", lambda seconds: None)
  hub.fail("storage GET", cut=100_000)
  assert content(files.fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS


def test_a_burst_of_503_at_the_hub(hub, files, monkeypatch):
  monkeypatch.setattr("time.sleep", lambda seconds: None)
  hub.fail("HEAD", status=503, times=3)
  assert content(files.fetch(["config.json"]), "config.json") == CONFIG


def test_all_or_nothing(hub, files, waits, monkeypatch):
  monkeypatch.setattr("time.sleep", lambda seconds: None)
  hub.fail("storage GET", status=503, times=999)
  with pytest.raises(ConnectionFailedError, match=r"answers 503 about model.safetensors of org/name"):
    files.fetch(["config.json", "model.safetensors"])
  assert not (pathlib.Path(files.path) / "model.safetensors").exists()
  assert not (files.cache.folder / "refs").exists()


def test_a_full_disk_is_no_failure_of_the_hub(hub, files, waits, monkeypatch):
  # A folder where the file would go stands for every error of the disk.
  (pathlib.Path(files.path) / "config.json" / "x").mkdir(parents=True)
  with pytest.raises(DiskError, match=r"cannot be written: .*org/name needs \d+ bytes there"):
    files.fetch(["config.json"])
  assert waits == []


def test_size_by_head_where_the_list_has_none(hub, commit):
  hub.fail("api", alter=lambda body: body.replace(b'"size"', b'"sise"').replace(b'"lfs"', b'"lsf"'))
  files = open_files(REPO)
  assert files.size("config.json") == len(CONFIG)
  assert files.size("model.safetensors") == len(WEIGHTS)
  assert [r.method for r in hub.requests] == ["GET", "HEAD", "HEAD"]
  assert files.read("model.safetensors", 300_000, 999_999) == WEIGHTS[300_000:]
  assert files.read("model.safetensors", 999_999, 1_000_000) == b""
  assert content(files.fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS
