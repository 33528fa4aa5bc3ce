"""Kaggle's models through the real client, from a server on the loopback."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import kagglehub
import pytest

from models_sources import (
  AccessError,
  ConnectionFailedError,
  CorruptFilesError,
  FilesNotFoundError,
  InvalidNameError,
  get_source,
  kaggle,
)
from models_sources.retry import Policy
from models_sources.testing_kaggle import KaggleServer

HANDLE = "google/gemma-2/flax/gemma2-2b-it"
FILES = {
  "gemma2-2b-it/_METADATA": b'{"tree_metadata": {}}',
  "gemma2-2b-it/manifest.ocdbt": b"manifest",
  "gemma2-2b-it/d/0": bytes(range(256)) * 4096,
  "tokenizer.model": b"pieces",
}


@pytest.fixture
def server(monkeypatch, tmp_path):
  with KaggleServer() as kaggle_server:
    for name, value in kaggle_server.environment.items():
      monkeypatch.setenv(name, value)
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
      monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kaggle, "POLICY", Policy(sleep=lambda seconds: None))
    kaggle_server.add_version(HANDLE, FILES)
    yield kaggle_server


def content(files):
  root = pathlib.Path(files.fetch(files.names()))
  return {name: (root / name).read_bytes() for name in files.names()}


def test_the_newest_version_is_pinned(server, tmp_path):
  files = get_source("kaggle").open_files(HANDLE)
  assert files.names() == sorted(FILES)
  assert files.path == str(tmp_path / "cache/models" / HANDLE / "1")
  server.add_version(HANDLE, {"other": b""})
  assert content(files) == FILES
  assert files.read("tokenizer.model", 1, 4) == b"iec"
  assert kaggle.open_files(HANDLE).names() == ["other"]
  assert kaggle.open_files(f"{HANDLE}/1").names() == sorted(FILES)


def test_only_what_is_needed_is_downloaded_and_only_once(server):
  files = kaggle.open_files(HANDLE)
  files.fetch(["tokenizer.model"])
  assert sum("Download" in line for line in server.lines()) == 1
  assert content(files) == FILES
  server.requests.clear()
  assert content(kaggle.open_files(HANDLE)) == FILES
  assert [line for line in server.lines() if "GetModelInstance" not in line] == []


def test_the_cache_is_kagglehub_s_own(server):
  content(kaggle.open_files(HANDLE))
  server.requests.clear()
  path = kagglehub.model_download(f"{HANDLE}/1")
  assert (pathlib.Path(path) / "tokenizer.model").read_bytes() == b"pieces"
  assert server.lines() == []


def test_a_list_of_files_may_have_pages(server):
  server.page = 2
  assert kaggle.open_files(HANDLE).names() == sorted(FILES)


def test_a_licence_must_be_accepted(server, monkeypatch):
  server.add_version("google/gemma/flax/2b", FILES, licensed=True)
  with pytest.raises(
    AccessError, match=r"google/gemma/flax/2b/1: accept .*kaggle.com/models/google/gemma,.*KAGGLE_KEY"
  ):
    kaggle.open_files("google/gemma/flax/2b")
  monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
  monkeypatch.setenv("KAGGLE_KEY", "not-to-be-shown")
  files = kaggle.open_files("google/gemma/flax/2b")
  assert content(files) == FILES
  assert "not-to-be-shown" not in repr(files)
  assert all("authorization" not in r.headers for r in server.requests if r.path.startswith("/blobs"))
  with pytest.raises(AccessError):
    kaggle.open_files("google/gemma/flax/2b/1", token=False, download_path="elsewhere")


@pytest.mark.parametrize("handle", ["google/gemma/flax/9b", f"{HANDLE}/7"])
def test_what_there_is_not(server, handle):
  with pytest.raises(FilesNotFoundError, match=r"kaggle.com/models/google/gemma"):
    kaggle.open_files(handle)
  with pytest.raises(FilesNotFoundError, match=r"did you mean tokenizer\.model"):
    kaggle.open_files(HANDLE).fetch(["tokenizer.mode"])


@pytest.mark.parametrize(
  "handle", ["google/gemma-2b", "a/b/c", "a/b/flax/d/e", "a/b/flax/d/0", "../b/flax/d/e"]
)
def test_what_is_no_handle(server, handle):
  with pytest.raises(InvalidNameError):
    kaggle.open_files(handle)
  assert server.lines() == []


ANSWERS = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}, {"reset": True}, {"stall": 1.0}]
BODIES = [
  {"cut": 1000},
  {"cut": 1000, "reset": True},
  {"alter": lambda body: body[:-1]},
  {"alter": lambda body: b"\0" + body[1:]},
]


@pytest.mark.parametrize(
  ("where", "fault"),
  [("/blobs/", f) for f in ANSWERS + BODIES]
  + [("Download.*/d/0", f) for f in ANSWERS]
  + [("List", f) for f in ANSWERS],
)
def test_faults_are_overcome(server, where, fault, monkeypatch):
  monkeypatch.setattr(kaggle, "TIMEOUT", (1.0, 0.3))
  server.fail(where, **fault)
  assert content(kaggle.open_files(HANDLE)) == FILES


def test_faults_that_stay_are_errors_and_leave_nothing_broken(server):
  files = kaggle.open_files(HANDLE)
  server.fail("/blobs/", times=100, status=503)
  with pytest.raises(ConnectionFailedError, match=rf"503 .*{HANDLE}/1") as caught:
    content(files)
  assert "Signature" not in str(caught.value)
  server._faults.clear()
  server.fail("/blobs/", times=8, alter=lambda body: body + b"!")
  with pytest.raises(CorruptFilesError, match=f"{HANDLE}/1"):
    content(files)
  server._faults.clear()
  assert not list(pathlib.Path(files.path).rglob("*.part"))
  assert content(files) == FILES


def test_offline_the_newest_whole_version_serves(server, caplog):
  first = content(kaggle.open_files(HANDLE))
  server.add_version(HANDLE, {"other": b""})
  server.fail("GetModelInstance", times=100, reset=True)
  assert content(kaggle.open_files(HANDLE)) == first
  assert "using version 1 from the cache" in caplog.text
  with pytest.raises(ConnectionFailedError):
    kaggle.open_files(HANDLE, download_path="/nonexistent/elsewhere")


FETCH = f"""
from models_sources import kaggle
files = kaggle.open_files({HANDLE!r})
files.fetch(files.names())
"""


def test_two_processes_download_once(server):
  server.fail("/blobs/", stall=0.5, times=4)
  children = [subprocess.Popen([sys.executable, "-c", FETCH]) for _ in range(2)]
  assert [child.wait(60) for child in children] == [0, 0]
  assert sum("Download" in line for line in server.lines()) == len(FILES)
  assert content(kaggle.open_files(HANDLE)) == FILES


def test_a_killed_download_starts_again(server):
  server.fail("/blobs/", stall=30.0, times=1)
  child = subprocess.Popen([sys.executable, "-c", FETCH])
  deadline = time.monotonic() + 60
  while not any("/blobs/" in line for line in server.lines()) and time.monotonic() < deadline:
    time.sleep(0.05)
  os.kill(child.pid, signal.SIGKILL)
  child.wait(60)
  assert content(kaggle.open_files(HANDLE)) == FILES
