"""A machine that refuses: one error of a source, which names the directory, the bytes that are needed and the remedy."""

import contextlib
import errno
import os
import pathlib
import pickle
import resource
import signal
import tempfile

import pytest

from models_sources import (
  AccessError,
  DiskError,
  FilesNotFoundError,
  InvalidNameError,
  get_source,
  kaggle,
)
from models_sources.disk import local_directory, read_errors, write_errors
from models_sources.retry import Policy
from models_sources.testing import StoreServer
from models_sources.testing_kaggle import KaggleServer

from .checkpoint import FILES, REPO, WEIGHTS

HANDLE = "google/gemma-2/flax/gemma2-2b-it"


@contextlib.contextmanager
def small_files(nbytes):
  """No file of this process may be larger, as on a disk that is full."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def unprivileged():
  """A directory that all may use, for a user whom permissions bind."""
  with tempfile.TemporaryDirectory() as place:
    os.chmod(place, 0o777)
    if os.geteuid():
      yield pathlib.Path(place)
      return
    os.seteuid(65534)
    try:
      yield pathlib.Path(place)
    finally:
      os.seteuid(0)


@pytest.fixture
def kaggle_server(monkeypatch, tmp_path):
  with KaggleServer() as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(kaggle, "POLICY", Policy(sleep=lambda seconds: None))
    server.add_version(HANDLE, {"weights": WEIGHTS})
    yield server


@pytest.fixture
def gs(no_platform, store_waits, monkeypatch):
  with StoreServer() as server:
    server.put("bucket/m/model.safetensors", WEIGHTS)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    yield server


@pytest.fixture(params=["hub", "kaggle", "gs"])
def fetch(request):
  """(directory of the cache) -> fetches the weights into it."""
  if request.param == "hub":
    hub = request.getfixturevalue("hub")
    hub.add(REPO, FILES)
    source, place, name = "huggingface", REPO, "model.safetensors"
  elif request.param == "kaggle":
    request.getfixturevalue("kaggle_server")
    source, place, name = "kaggle", HANDLE, "weights"
  else:
    request.getfixturevalue("gs")
    source, place, name = "gcs", "gs://bucket/m", "model.safetensors"

  def run(directory):
    files = get_source(source).open_files(place, download_path=str(directory), progress=False)
    files.fetch([name])
    return files.read(name, 0, len(WEIGHTS))

  return run


@pytest.mark.filterwarnings("ignore")
def test_a_cache_that_is_full(fetch, tmp_path):
  with small_files(100_000), pytest.raises(DiskError) as caught:
    fetch(tmp_path / "cache")
  assert str(caught.value).startswith(f"{tmp_path}/cache/")
  assert "cannot be written: File too large" in str(caught.value)
  assert f"needs {len(WEIGHTS):,} bytes there, and a file may have 100,000: raise the limit" in str(
    caught.value
  )
  assert caught.value.errno == errno.EFBIG
  assert fetch(tmp_path / "cache") == WEIGHTS


def test_a_file_in_the_place_of_the_cache(fetch, tmp_path):
  (tmp_path / "cache").write_text("")
  with pytest.raises(
    DiskError, match=rf"{tmp_path}/cache/.* cannot be written: .* needs [\d,]+ bytes there: make it"
  ):
    fetch(tmp_path / "cache")


@pytest.mark.parametrize("directory", ["gs://bucket/x", "s3:/bucket/x", "hf://x", "a\0b"])
def test_a_cache_that_is_no_directory(fetch, directory, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = os.listdir(".")
  with pytest.raises(InvalidNameError, match="is not a directory of this machine: give another"):
    fetch(directory)
  assert os.listdir(".") == before


def test_a_user_who_may_not_write(unprivileged):
  with (
    pytest.raises(
      DiskError, match=r"^/proc/1/x cannot be written: .*; w needs 1,000 bytes there: make it writable, or y$"
    ),
    write_errors("/proc/1/x", "w", 1000, "y"),
  ):
    os.makedirs("/proc/1/x")


def test_a_full_disk_names_what_is_free(tmp_path):
  with (
    pytest.raises(
      DiskError, match=r"needs 9 bytes there, and [\d,]+ are free: free some space, or y$"
    ) as caught,
    write_errors(tmp_path / "a" / "b", "w", 9, "y"),
  ):
    raise OSError(errno.ENOSPC, "No space left on device")
  again = pickle.loads(pickle.dumps(caught.value))
  assert (type(again), str(again), again.errno) == (DiskError, str(caught.value), errno.ENOSPC)


def test_errors_of_sources_pass():
  error = ConnectionError("not of the file system")
  for context in (write_errors("a", "b", 1, "c"), read_errors("a")):
    with pytest.raises(ConnectionError) as caught, context:
      raise error
    assert caught.value is error


def test_what_may_not_be_read(unprivileged):
  unprivileged = pathlib.Path(tempfile.mkdtemp(dir=unprivileged))
  (unprivileged / "config.json").write_text("{}")
  (unprivileged / "config.json").chmod(0)
  files = get_source("local").open_files(str(unprivileged))
  with pytest.raises(
    AccessError, match=r"config.json cannot be read: Permission denied: make it readable for this user"
  ):
    files.read("config.json", 0, 1)
  unprivileged.chmod(0o311)
  with pytest.raises(AccessError, match=r"cannot be read: Permission denied"):
    files.names()
  unprivileged.chmod(0o755)


def test_too_many_open_files(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  files, held = get_source("local").open_files(str(tmp_path)), []
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
  try:
    with contextlib.suppress(OSError):
      while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(
      DiskError, match="Too many open files: raise the limit on open files, which `ulimit -n` shows"
    ):
      files.read("config.json", 0, 1)
  finally:
    for descriptor in held:
      os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_file_that_goes_while_it_is_read(tmp_path):
  with (
    pytest.raises(FilesNotFoundError, match="was removed meanwhile; load it again"),
    read_errors(tmp_path / "a"),
  ):
    (tmp_path / "a").read_bytes()


def test_a_path_with_a_nul():
  with pytest.raises(InvalidNameError, match=r"'a\\x00b' holds a NUL"):
    get_source("local").open_files("a\0b")


def test_a_directory_of_the_user(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert local_directory("~/models", "x") == "/home/me/models"
  assert local_directory("C:/models", "x") == "C:/models"
