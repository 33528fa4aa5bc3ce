"""Uploads to a hub on the loopback, as the real client speaks to it."""

import re

import pytest
from huggingface_hub import constants

from models_sources import AccessError, FilesNotFoundError, InvalidNameError, SourceError, get_source
from models_sources import huggingface as source
from models_sources.huggingface.upload import upload
from models_sources.retry import Policy
from models_sources.testing import HubServer

WEIGHTS, MORE = b"weights" * 4000, b"more" * 5000
FILES = {"config.json": b"{}", "model-1.safetensors": WEIGHTS, "model-2.safetensors": MORE}
# Of the client, to its own HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PUT = "storage PUT /blobs/"


@pytest.fixture
def hub(monkeypatch, tmp_path):
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr("models_sources.huggingface.upload.POLICY", Policy(sleep=lambda seconds: None))
  # The client waits between its own attempts, too.
  monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
  with HubServer() as server:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    server.writers = frozenset({"mine"})
    yield server


def put(hub, files=FILES, **options):
  return upload("org/new", files, **{"token": "mine", "progress": False} | options)


def sent(hub):
  return [line for line in hub.lines("storage") if line.startswith("PUT")]


def test_a_repository_is_made_and_read_again(hub, tmp_path):
  (tmp_path / "model-1.safetensors").write_bytes(WEIGHTS)
  commit = put(hub, FILES | {"model-1.safetensors": tmp_path / "model-1.safetensors"})
  assert re.fullmatch("[0-9a-f]{40}", commit)
  assert {k: v for k, v in hub.files("org/new").items() if k != ".gitattributes"} == FILES
  files = get_source("huggingface").open_files("org/new", progress=False)
  assert files.revision == commit
  assert files.read("model-2.safetensors", 0, 8) == MORE[:8]
  assert files.is_same("model-1.safetensors", tmp_path / "model-1.safetensors")
  (tmp_path / "model-1.safetensors").write_bytes(MORE)
  assert not files.is_same("model-1.safetensors", tmp_path / "model-1.safetensors")


def test_what_the_hub_has_is_not_sent_again(hub):
  first = put(hub)
  assert len(sent(hub)) == 2
  hub.requests.clear()
  assert put(hub) == first
  assert sent(hub) == []
  put(hub, FILES | {"config.json": b"{ }"})
  assert sent(hub) == []
  assert hub.files("org/new")["config.json"] == b"{ }"


@pytest.mark.parametrize("fault", [{"status": 503}, {"take": 1000}, {"take": 1000, "reset": True}])
def test_an_upload_goes_on_after_a_cut(hub, fault):
  hub.fail(PUT, times=2, **fault)
  put(hub)
  assert hub.files("org/new")["model-2.safetensors"] == MORE


def test_a_later_call_goes_on_and_readers_see_no_half(hub):
  put(hub, {"config.json": b"old"})
  hub.fail("hub POST .*/commit/", times=100, status=503)
  with pytest.raises(SourceError, match="answers 503 about the upload of org/new: try later"):
    put(hub)
  assert len(sent(hub)) == 2
  assert hub.files("org/new")["config.json"] == b"old"
  hub._faults.clear()
  put(hub)
  assert len(sent(hub)) == 2
  assert hub.files("org/new")["config.json"] == b"{}"


def test_outdated_files_go_in_the_same_commit(hub):
  put(hub)
  put(hub, {"model.safetensors": MORE}, outdated=(".safetensors",))
  assert hub.files("org/new").keys() == {".gitattributes", "config.json", "model.safetensors"}


def test_a_private_repository(hub):
  put(hub, private=True)
  with pytest.raises(FilesNotFoundError):
    source.open_files("org/new", token=False)


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    (
      {"token": "theirs"},
      AccessError,
      "does not let this token write to org/new: make a token with the right to",
    ),
    ({"token": False}, AccessError, "does not let this token write to org/new"),
    ({"revision": "nobody"}, FilesNotFoundError, "no repository org/new with a branch nobody"),
    ({"files": {"../x": b""}}, InvalidNameError, "'../x' is not a valid file name"),
  ],
)
def test_what_is_refused(hub, options, error, message):
  with pytest.raises(error, match=re.escape(message)) as caught:
    put(hub, **options)
  assert "mine" not in str(caught.value).replace("mine:", "")
  with pytest.raises(InvalidNameError, match="write organisation/name"):
    upload("a/b/c", FILES)
