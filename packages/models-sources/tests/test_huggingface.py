import hashlib
import json
import os
import pathlib
import struct
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants, scan_cache_dir

from models_sources import AccessError, FilesNotFoundError, InvalidNameError, SourceError, get_source
from models_sources.testing import SIGNATURE

from .checkpoint import CONFIG, FILES, HEADER, REPO, WEIGHTS

open_files = get_source("huggingface").open_files
TOKEN = "hf_verySecretToken"


@pytest.fixture
def commit(hub):
  return hub.add(REPO, FILES)


def content(directory, name):
  return (pathlib.Path(directory) / name).read_bytes()


def test_opening_reads_no_file(hub, commit):
  files = open_files(REPO)
  assert files.names() == sorted(FILES)
  assert [files.size(name) for name in files.names()] == [len(FILES[name]) for name in files.names()]
  assert files.path.endswith(f"/cache/models--org--name/snapshots/{commit}")
  assert hub.lines() == ["GET /api/models/org/name/revision/main"]
  assert not pathlib.Path(constants.HF_HUB_CACHE).exists()


def test_a_header_is_read_by_ranges(hub, commit):
  files = open_files(REPO)
  (length,) = struct.unpack("<Q", files.read("model.safetensors", 0, 8))
  assert files.read("model.safetensors", 8, 8 + length) == HEADER
  asked = [(r.host, r.range, r.sent) for r in hub.requests[1:]]
  assert asked == [
    ("hub", "bytes=0-7", 0),
    ("storage", "bytes=0-7", 8),
    ("hub", "bytes=8-70", 0),
    ("storage", "bytes=8-70", 63),
  ]
  assert all(commit in r.path for r in hub.requests[1:] if r.host == "hub")


def test_ranges_end_where_the_file_ends(hub, commit):
  files = open_files(REPO)
  assert files.read("config.json", 0, 10_000) == CONFIG
  assert files.read("config.json", len(CONFIG) - 1, 10_000) == CONFIG[-1:]
  before = len(hub.requests)
  assert files.read("config.json", len(CONFIG), 10_000) == b""
  assert files.read("config.json", 5, 5) == b""
  assert len(hub.requests) == before


def test_only_what_is_named_is_fetched(hub, commit):
  files = open_files(REPO)
  directory = files.fetch(["config.json", "model.safetensors", "config.json"])
  assert directory == files.path
  assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
  assert content(directory, "model.safetensors") == WEIGHTS
  assert content(directory, "config.json") == CONFIG
  assert not any("pytorch_model" in line or "params" in line for line in hub.lines())
  assert sum(r.sent for r in hub.requests if r.host == "storage") == len(WEIGHTS)


def test_names_are_no_patterns(hub):
  hub.add(REPO, {"a[1].json": b"1", "a1.json": b"2", "*.json": b"3"})
  directory = open_files(REPO).fetch(["a[1].json", "*.json"])
  assert sorted(os.listdir(directory)) == ["*.json", "a[1].json"]


def test_files_in_folders(hub, commit):
  files = open_files(REPO)
  assert content(files.fetch(["original/params.json"]), "original/params.json") == b"{}"
  assert files.read("original/params.json", 0, 2) == b"{}"


def test_the_cache_is_read_without_a_request(hub, commit):
  open_files(REPO).fetch(["config.json", "model.safetensors"])
  hub.requests.clear()
  files = open_files(REPO, revision=commit)
  assert files.names() == sorted(FILES)
  assert files.size("pytorch_model.bin") == len(FILES["pytorch_model.bin"])
  assert files.read("model.safetensors", 8, 8 + len(HEADER)) == HEADER
  files.fetch(["config.json", "model.safetensors"])
  assert hub.requests == []


def test_bytes_of_another_commit_are_not_fetched_again(hub, commit):
  open_files(REPO).fetch(["model.safetensors"])
  hub.add(REPO, FILES | {"config.json": b"{}"})
  hub.requests.clear()
  assert content(open_files(REPO).fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS
  assert hub.lines("storage") == []


def test_the_pinned_commit_wins_when_main_moves(hub, commit):
  files = open_files(REPO)
  newer = hub.add(REPO, {"config.json": b'{"model_type": "other"}', "model.safetensors": WEIGHTS[::-1]})
  assert files.read("config.json", 0, 100) == CONFIG
  directory = files.fetch(["config.json", "model.safetensors"])
  assert directory.endswith(commit)
  assert content(directory, "model.safetensors") == WEIGHTS
  assert open_files(REPO).path.endswith(newer)
  assert open_files(REPO, revision=commit).path.endswith(commit)


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/4", "a branch"])
def test_revisions(hub, commit, revision):
  other = hub.add(REPO, {"config.json": b"{}"}, revision=revision)
  files = open_files(REPO, revision=revision)
  assert files.path.endswith(other)
  assert content(files.fetch(["config.json"]), "config.json") == b"{}"


def test_download_path_is_the_cache(hub, commit, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  files = open_files(REPO, download_path="~/elsewhere")
  assert files.fetch(["config.json"]) == str(tmp_path / "elsewhere/models--org--name/snapshots" / commit)
  assert not pathlib.Path(constants.HF_HUB_CACHE).exists()


def test_the_client_library_finds_what_was_fetched_and_the_other_way_round(hub, commit):
  directory = open_files(REPO).fetch(["config.json"])
  cache = scan_cache_dir(constants.HF_HUB_CACHE)
  assert cache.warnings == []
  (repo,) = cache.repos
  assert repo.refs["main"].commit_hash == commit
  local = huggingface_hub.hf_hub_download(REPO, "config.json", local_files_only=True)
  assert local == os.path.join(directory, "config.json")
  huggingface_hub.snapshot_download(
    REPO, revision=commit, allow_patterns=["model.safetensors"], endpoint=hub.endpoint, tqdm_class=None
  )
  hub.requests.clear()
  assert (
    content(open_files(REPO, revision=commit).fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS
  )
  assert hub.requests == []


def test_a_renamed_repository(hub, commit):
  hub.move(REPO, "neworg/newname")
  files = open_files(REPO)
  assert files.read("model.safetensors", 8, 8 + len(HEADER)) == HEADER
  assert content(files.fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS


def test_many_threads_at_once(hub, commit):
  files, seen = open_files(REPO), []

  def work():
    seen.append(files.read("model.safetensors", 8, 8 + len(HEADER)))
    seen.append(content(files.fetch(["config.json", "model.safetensors"]), "model.safetensors"))

  threads = [threading.Thread(target=work) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(seen, key=len) == [HEADER] * 6 + [WEIGHTS] * 6
  assert sum(r.method == "GET" and r.range is None for r in hub.requests if r.host == "storage") == 1


PROGRAM = """
from models_sources import get_source
files = get_source("huggingface").open_files("org/name", progress=False)
print(files.fetch(["config.json", "model.safetensors"]))
"""


def run(hub, tmp_path, **env):
  """Runs the program in another process, which has only the environment to find the hub by."""
  env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM],
    env={**os.environ, **env},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_many_processes_at_once_and_the_users_environment(hub, commit, tmp_path):
  # Without a terminal, progress bars are shown where TQDM_POSITION says so.
  processes = [run(hub, tmp_path, TQDM_POSITION="-1") for _ in range(2)]
  outputs = [process.communicate() for process in processes]
  assert [err for _, err in outputs] == ["", ""]
  assert {out for out, _ in outputs} == {f"{tmp_path}/hub/models--org--name/snapshots/{commit}\n"}
  assert content(outputs[0][0].strip(), "model.safetensors") == WEIGHTS
  assert sum(r.sent for r in hub.requests if r.host == "storage") == len(WEIGHTS)


def test_progress_is_a_matter_of_the_call(hub, commit, capfd, monkeypatch):
  monkeypatch.setenv("TQDM_POSITION", "-1")
  open_files(REPO, progress=False).fetch(["model.safetensors"])
  assert capfd.readouterr().err == ""
  open_files(REPO).fetch(["pytorch_model.bin"])
  assert "%" in capfd.readouterr().err


# Who may read what.


def test_a_token_goes_to_the_hub_alone(hub, caplog):
  hub.add(REPO, FILES, readers=frozenset({TOKEN}))
  caplog.set_level("DEBUG")
  files = open_files(REPO, token=TOKEN)
  assert files.read("model.safetensors", 8, 8 + len(HEADER)) == HEADER
  files.fetch(["config.json", "model.safetensors"])
  sent = {(r.host, r.headers.get("authorization")) for r in hub.requests}
  assert sent == {("hub", f"Bearer {TOKEN}"), ("storage", None)}
  texts = [
    repr(files),
    str(vars(files)),
    files.path,
    caplog.text,
    *map(str, pathlib.Path(files.path).rglob("*")),
  ]
  texts += [p.read_text(errors="replace") for p in files.cache.folder.rglob("*") if p.is_file()]
  assert not [text for text in texts if TOKEN in text]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_to_another_port_or_name_carries_no_token(hub, host):
  """A port of the hub's own machine may be anybody's."""
  hub.add(REPO, FILES, readers=frozenset({TOKEN}))
  files = open_files(REPO, token=TOKEN)
  place = urlsplit(hub.storage)._replace(netloc=f"{host}:{urlsplit(hub.storage).port}").geturl()
  digest = hashlib.sha256(WEIGHTS).hexdigest()
  hub.fail("hub GET .*/resolve/", status=302, headers={"Location": f"{place}/blobs/{digest}?{SIGNATURE}"})
  assert files.read("model.safetensors", 8, 8 + len(HEADER)) == HEADER
  asked, stored = hub.requests[-2:]
  assert (asked.host, asked.headers["authorization"]) == ("hub", f"Bearer {TOKEN}")
  assert stored.host == "storage"
  assert stored.range == asked.range
  assert "authorization" not in stored.headers


def test_a_redirect_within_the_hub_carries_the_token(hub):
  hub.add(REPO, FILES, readers=frozenset({TOKEN}))
  files = open_files(REPO, token=TOKEN)
  hub.move(REPO, "neworg/newname")
  assert files.read("config.json", 0, len(CONFIG)) == CONFIG
  assert [r.headers.get("authorization") for r in hub.requests] == [f"Bearer {TOKEN}"] * 3


def test_the_users_token(hub, monkeypatch):
  hub.add(REPO, FILES, readers=frozenset({TOKEN}))
  with pytest.raises(FilesNotFoundError):
    open_files(REPO)
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  assert open_files(REPO).names() == sorted(FILES)
  with pytest.raises(FilesNotFoundError):
    open_files(REPO, token=False)


def test_a_token_that_is_insisted_on(hub, commit):
  with pytest.raises(
    AccessError, match=r"none is saved: run `hf auth login`, set HF_TOKEN or pass the token"
  ):
    open_files(REPO, token=True)
  assert hub.requests == []


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("action", ["fetch", "read"])
def test_gated(hub, waits, token, action):
  hub.add(REPO, FILES, gated=True)
  files = open_files(REPO, token=token)
  with pytest.raises(AccessError) as caught:
    files.fetch(["config.json"]) if action == "fetch" else files.read("config.json", 0, 9)
  message = str(caught.value)
  assert (
    f"org/name is gated: accept its licence at {hub.endpoint}/org/name, then set HF_TOKEN or pass token="
    in message
  )
  assert TOKEN not in message
  assert waits == []


def test_a_missing_repository(hub, waits):
  for token in (None, TOKEN):
    with pytest.raises(
      FilesNotFoundError, match=r"no model org/nome at http.*check the spelling.*HF_TOKEN"
    ) as caught:
      open_files("org/nome", token=token)
    assert TOKEN not in str(caught.value)
  assert waits == []


def test_a_missing_revision(hub, commit, waits):
  with pytest.raises(
    FilesNotFoundError, match=r"org/name has no revision v9: check the spelling among its branches"
  ):
    open_files(REPO, revision="v9")
  assert waits == []


@pytest.mark.parametrize(("status", "words"), [(401, "rejects the token"), (403, "the token may not read")])
def test_refused_tokens(hub, commit, waits, status, words):
  hub.fail("api", status=status)
  with pytest.raises(AccessError, match=words) as caught:
    open_files(REPO, token=TOKEN)
  assert TOKEN not in str(caught.value)
  assert waits == []


def test_missing_files(hub, commit):
  files = open_files(REPO)
  with pytest.raises(FilesNotFoundError, match=r"has no confg.json, other; did you mean config.json\?"):
    files.fetch(["config.json", "confg.json", "other"])
  for action in (files.size, lambda n: files.read(n, 0, 1)):
    with pytest.raises(FilesNotFoundError):
      action("other")
  assert len(hub.requests) == 1


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x"])
def test_names_do_not_leave_the_snapshot(hub, commit, name):
  files = open_files(REPO)
  for action in (files.size, lambda n: files.read(n, 0, 1), lambda n: files.fetch([n])):
    with pytest.raises(InvalidNameError):
      action(name)


def test_a_hub_that_lists_a_path_upwards_is_refused(hub):
  hub.add(REPO, {"../../evil": b"x"})
  with pytest.raises(InvalidNameError):
    open_files(REPO)


@pytest.mark.parametrize(
  "identifier", ["/data/model", "./model", "a/b/c", "org/na me", "", "org/..", "C:\\model"]
)
def test_what_is_no_identifier(hub, identifier):
  with pytest.raises(
    InvalidNameError, match=r"not a repository id: write organisation/name.*the source 'local'"
  ):
    open_files(identifier)
  assert hub.requests == []


@pytest.mark.parametrize("revision", ["../../x", "/x", ""])
def test_what_is_no_revision(hub, commit, revision):
  with pytest.raises(InvalidNameError, match="is not a valid revision"):
    open_files(REPO, revision=revision)


# Without a hub.


@pytest.fixture(params=["variable", "constant"])
def offline(request, hub, commit, monkeypatch):
  """Called to go offline."""

  def switch():
    hub.requests.clear()
    if request.param == "variable":
      monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
      monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

  return switch


@pytest.mark.parametrize("full", [False, True])
def test_offline_with_a_cache(hub, commit, offline, full):
  open_files(REPO).fetch(["config.json", "model.safetensors"])
  offline()
  files = open_files(REPO, revision=commit if full else None)
  assert files.names() == ["config.json", "model.safetensors"]
  assert files.size("model.safetensors") == len(WEIGHTS)
  assert files.read("model.safetensors", 8, 8 + len(HEADER)) == HEADER
  assert content(files.fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS
  with pytest.raises(
    FilesNotFoundError, match=r"pytorch_model.bin of org/name .* not in the cache .*HF_HUB_OFFLINE"
  ):
    files.fetch(["config.json", "pytorch_model.bin"])
  for action in (files.size, lambda n: files.read(n, 0, 1)):
    with pytest.raises(FilesNotFoundError, match="not in the cache"):
      action("pytorch_model.bin")
  assert hub.requests == []


@pytest.mark.parametrize("revision", [None, "v1", "0" * 40])
def test_offline_without_a_cache(hub, offline, revision):
  offline()
  with pytest.raises(
    FilesNotFoundError, match=r"is not in the cache .* HF_HUB_OFFLINE forbids requests to the hub: unset it"
  ):
    open_files(REPO, revision=revision)
  assert hub.requests == []


def test_offline_main_is_what_was_last_fetched(hub, commit, monkeypatch):
  open_files(REPO).fetch(["config.json"])
  hub.add(REPO, {"config.json": b"{}"})
  open_files(REPO)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  assert open_files(REPO).read("config.json", 0, 100) == CONFIG


def test_no_connection_with_a_cache(hub, commit, waits, monkeypatch, caplog):
  open_files(REPO).fetch(["config.json"])
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  files = open_files(REPO)
  assert len(waits) == 1
  assert f"using commit {commit} of org/name from the cache" in caplog.text
  assert files.names() == ["config.json"]
  assert files.read("config.json", 0, 100) == CONFIG
  with pytest.raises(FilesNotFoundError, match=r"model.safetensors .*not in the cache .*no connection"):
    files.fetch(["model.safetensors"])


def test_a_read_only_cache(hub, commit):
  files = open_files(REPO)
  files.fetch(["config.json"])
  folder = files.cache.folder
  # The folder of listings cannot be made where a file has its name.
  listing = folder / ".listings"
  (listing / f"{commit}.json").unlink()
  listing.rmdir()
  listing.write_text("")
  assert content(open_files(REPO).fetch(["config.json"]), "config.json") == CONFIG


def test_a_listing_that_cannot_be_read_is_asked_for_again(hub, commit):
  files = open_files(REPO)
  files.fetch(["config.json"])
  for text in ("", "{", "[]", json.dumps({"config.json": {"bytes": 3}})):
    (files.cache.folder / ".listings" / f"{commit}.json").write_text(text)
    hub.requests.clear()
    assert open_files(REPO, revision=commit).names() == sorted(FILES)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("status", [403, 404])
def test_signed_addresses_are_not_quoted(hub, commit, waits, status, caplog):
  hub.fail("storage GET", status=status, times=99)
  files = open_files(REPO)
  for action in (lambda: files.fetch(["model.safetensors"]), lambda: files.read("model.safetensors", 0, 8)):
    with pytest.raises(SourceError, match=f"answers {status}|does not have") as caught:
      action()
    assert SIGNATURE not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


def test_a_signature_that_is_too_old_is_renewed(hub, commit, waits):
  hub.fail("storage GET", status=403, times=2)
  files = open_files(REPO)
  assert files.read("model.safetensors", 8, 8 + len(HEADER)) == HEADER
  hub.fail("storage GET", status=403, times=2)
  assert content(files.fetch(["model.safetensors"]), "model.safetensors") == WEIGHTS
  assert len(waits) == 4
