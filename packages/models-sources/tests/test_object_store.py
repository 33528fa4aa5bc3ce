"""Stores as they are meant to be used: what is asked for, what comes, and who may read."""

import pathlib
import re

import pytest

from models_sources import (
  AccessError,
  ConnectionFailedError,
  CorruptFilesError,
  FilesNotFoundError,
  InvalidNameError,
  get_source,
  source_of_address,
)
from models_sources.object_store import CachedFiles, StoreFiles
from models_sources.testing import StoreServer

from .checkpoint import CONFIG, WEIGHTS

FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
SOURCES = {"gs": "gcs", "s3": "s3"}


@pytest.fixture
def folder(store):
  for name, data in FILES.items():
    store.put(f"bucket/models/mine/{name}", data)
  store.put("bucket/models/mine/sub/deep.json", b"[]")
  store.put("bucket/models/mine-too/config.json", b"[]")
  return f"{store.scheme}://bucket/models/mine"


def open_files(address, **options):
  return get_source(source_of_address(address)).open_files(address, **options)


@pytest.fixture
def files(folder):
  return open_files(folder)


def test_schemes_name_sources():
  assert [source_of_address(a) for a in ("gs://b/x", "s3://b", "org/name", "/a/b", "gs:/b", "ftp://b")] == [
    "gcs",
    "s3",
    None,
    None,
    None,
    None,
  ]


def test_a_folder_is_listed_by_one_request(store, folder, files):
  assert isinstance(files, StoreFiles)
  assert files.path == folder
  assert files.names() == sorted(FILES)
  assert files.size("model.safetensors") == len(WEIGHTS)
  assert len(store.requests) == 1
  assert open_files(folder + "/").names() == files.names()


def test_ranges_and_nothing_else_travel(store, files):
  store.requests.clear()
  assert files.read("model.safetensors", 8, 5000) == WEIGHTS[8:5000]
  assert files.read("config.json", 5, 1000) == CONFIG[5:]
  assert files.read("config.json", 5, 5) == b""
  assert files.read("config.json", 1000, 2000) == b""
  buffer = bytearray(1000)
  files.read_into("model.safetensors", 100_000, memoryview(buffer)[10:990])
  assert buffer[10:990] == WEIGHTS[100_000:100_980]
  assert not any(buffer[:10] + buffer[990:])
  assert store.received("bucket/models/mine/model.safetensors") == 4992 + 980
  assert len(store.requests) == 3


def test_every_range_is_of_the_version_that_was_listed(store, files):
  store.requests.clear()
  files.read("config.json", 0, 4)
  files.read("config.json", 4, 8)
  conditions = {request.headers.get("if-match") for request in store.requests}
  assert len(conditions) == 1
  assert None not in conditions


def test_long_listings_come_in_pages(store, folder, files):
  for i in range(25):
    store.put(f"bucket/models/mine/model-{i:05}-of-00025.safetensors", b"x" * i)
  store.page = 10
  names = open_files(folder).names()
  assert len(names) == 25 + len(FILES)
  assert names == sorted(names)


def test_one_object(store, folder):
  files = open_files(f"{folder}/model.safetensors")
  assert files.names() == ["model.safetensors"]
  assert files.path == f"{folder}/model.safetensors"
  assert files.read("model.safetensors", 0, 8) == WEIGHTS[:8]


def test_a_whole_bucket_and_names_that_need_escapes(store):
  store.put("bucket/a b+c%d&é.json", b"{}")
  files = open_files(f"{store.scheme}://bucket")
  assert files.names() == ["a b+c%d&é.json"]
  assert files.read("a b+c%d&é.json", 0, 9) == b"{}"


def test_the_mark_of_an_empty_folder_is_no_file(store, folder):
  store.put("bucket/models/mine/", b"")
  assert open_files(folder).names() == sorted(FILES)


@pytest.mark.parametrize("address", ["gs://", "gs:///x", "gs://-b/x", "gs://b/../x", "gs://b/a//b", "gs://u:p@b/x", "b/x"])  # fmt: skip
def test_what_is_no_address(address):
  for scheme, source in SOURCES.items():
    with pytest.raises(InvalidNameError, match=rf"not an address of the form {scheme}://bucket/folder"):
      get_source(source).open_files(address.replace("gs:", f"{scheme}:"))


def test_a_store_has_no_revisions(folder):
  with pytest.raises(InvalidNameError, match="has no revision 'main'"):
    open_files(folder, revision="main")


def test_the_revision_of_opened_files_gives_the_same_or_an_error(store, folder, files, tmp_path):
  assert open_files(folder, revision=files.revision).listing == files.listing
  assert open_files(folder, revision=files.revision, download_path=str(tmp_path)).revision == files.revision
  store.put("bucket/models/mine/config.json", b"[1]")
  with pytest.raises(CorruptFilesError, match=f"{folder} has changed since revision "):
    open_files(folder, revision=files.revision)


def test_what_is_missing_is_said_at_once(store, folder, files, store_waits):
  for address in (f"{store.scheme}://nobucket/x", f"{store.scheme}://bucket/models/min"):
    with pytest.raises(FilesNotFoundError, match=f"there is nothing at {address}: check the spelling"):
      open_files(address)
  with pytest.raises(FilesNotFoundError, match=r"has no confg.json; did you mean config.json\?"):
    files.read("confg.json", 0, 1)
  with pytest.raises(FilesNotFoundError, match=r"has no confg.json"):
    files.fetch(["confg.json"])
  with pytest.raises(InvalidNameError):
    files.read("../secret", 0, 1)
  with pytest.raises(CorruptFilesError, match=rf"has {len(CONFIG)} bytes, but 100000"):
    files.read_into("config.json", 0, memoryview(bytearray(100_000)))
  assert store_waits == []


# Who may read.


class TestAccess:
  @pytest.fixture
  def private(self, no_platform, store_waits, monkeypatch):
    """A bucket of Google's that only one token opens, asked as the real one is."""
    with StoreServer() as server:
      server.put("bucket/x/config.json", CONFIG)
      server.lock("bucket", "secret-token")
      monkeypatch.setenv("GOOGLE_BASE_URL", server.endpoint)
      for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, server.endpoint.removeprefix("http://"))
      monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
      monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.endpoint)
      yield server

  def test_a_token_opens(self, private):
    files = open_files("gs://bucket/x", token="secret-token")
    assert files.read("config.json", 0, 100) == CONFIG
    assert "secret-token" not in repr(files)

  def test_a_wrong_token_does_not_and_is_not_shown(self, private, store_waits):
    with pytest.raises(
      AccessError, match="may not be read with these credentials: run `gcloud auth"
    ) as caught:
      open_files("gs://bucket/x", token="wrong-token")
    assert "wrong-token" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert store_waits == []

  @pytest.mark.parametrize("scheme", SOURCES)
  def test_without_credentials_what_is_public_is_read(self, private, scheme):
    private.put("public/x/config.json", CONFIG)
    assert open_files(f"{scheme}://public/x").read("config.json", 0, 100) == CONFIG
    assert not [r for r in private.requests if "authorization" in r.headers]
    with pytest.raises(AccessError, match="there are no credentials"):
      open_files(f"{scheme}://public/x", token=True)

  @pytest.mark.parametrize("scheme", SOURCES)
  @pytest.mark.parametrize("token", [None, False])
  def test_without_credentials_what_is_private_is_refused(self, private, scheme, token, store_waits):
    with pytest.raises(AccessError, match="may not be read without credentials"):
      open_files(f"{scheme}://bucket/x", token=token)
    assert store_waits == []

  def test_false_asks_no_metadata_service(self, private):
    private.put("public/x/config.json", CONFIG)
    for scheme in SOURCES:
      open_files(f"{scheme}://public/x", token=False)
    assert [r.path for r in private.requests] == ["/public", "/public"]

  def test_broken_credentials_say_so(self, private, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(AccessError, match="cannot be used: run `gcloud auth"):
      open_files("gs://bucket/x")

  def test_keys_of_amazon_sign(self, private, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-shown")
    private.put("open/x/config.json", CONFIG)
    open_files("s3://open/x")
    assert re.search("Credential=AKIATEST/", private.requests[-1].headers["authorization"])
    with pytest.raises(InvalidNameError, match="S3 takes no token") as caught:
      open_files("s3://open/x", token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_nobody_listens(no_platform, store_waits, monkeypatch):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://user:password@127.0.0.1:9")
  with pytest.raises(
    ConnectionFailedError, match=r"Google Cloud Storage \(http://127.0.0.1:9\) .* gs://bucket/x"
  ) as caught:
    open_files("gs://bucket/x")
  assert "password" not in str(caught.value)
  assert len(store_waits) == 7


# On the disk, where that is asked for.


def test_fetched_objects_are_kept_and_not_asked_for_again(store, folder, tmp_path):
  files = open_files(folder, download_path=str(tmp_path / "cache"))
  assert isinstance(files, CachedFiles)
  assert not hasattr(files, "read_into")
  where = pathlib.Path(files.fetch(sorted(FILES)))
  assert files.path == str(where)
  assert where.is_relative_to(tmp_path / "cache")
  assert {path.name: path.read_bytes() for path in where.iterdir()} == FILES
  again = open_files(folder, download_path=str(tmp_path / "cache"))
  store.requests.clear()
  assert again.fetch(sorted(FILES)) == str(where)
  assert again.read("model.safetensors", 8, 100) == WEIGHTS[8:100]
  assert store.requests == []


def test_streamed_files_are_fetched_into_the_cache_of_the_user(store, files, tmp_path):
  where = pathlib.Path(files.fetch(["config.json"]))
  assert where.is_relative_to(tmp_path / "user-cache")
  assert [path.name for path in where.iterdir()] == ["config.json"]


def test_reading_leaves_nothing_on_the_disk(files, tmp_path):
  files.read("model.safetensors", 0, 100_000)
  assert not (tmp_path / "user-cache").exists()


def test_another_version_and_another_bucket_have_another_place(store, folder, tmp_path):
  options = {"download_path": str(tmp_path)}
  first = open_files(folder, **options).fetch(["config.json"])
  store.put("bucket/models/mine/config.json", b"[1]")
  store.put("other/models/mine/config.json", CONFIG)
  second = open_files(folder, **options).fetch(["config.json"])
  third = open_files(f"{store.scheme}://other/models/mine", **options).fetch(["config.json"])
  read = [pathlib.Path(place, "config.json").read_bytes() for place in (first, second, third)]
  assert read == [CONFIG, b"[1]", CONFIG]
  assert len({first, second, third}) == 3


def test_an_unchanged_object_of_a_changed_folder_is_not_fetched_again(store, folder, tmp_path):
  open_files(folder, download_path=str(tmp_path)).fetch(["model.safetensors"])
  store.put("bucket/models/mine/config.json", b"[1]")
  store.requests.clear()
  open_files(folder, download_path=str(tmp_path)).fetch(["model.safetensors", "config.json"])
  assert store.received("bucket/models/mine/model.safetensors") == 0
