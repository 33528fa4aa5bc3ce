"""Writing to stores: no state that a reader can see is half a checkpoint, and what a failure leaves is known."""

import contextlib
import dataclasses
import os
import threading

import pytest

from models_sources import (
  AccessError,
  ConnectionFailedError,
  FilesNotFoundError,
  InvalidNameError,
  SourceError,
  WritableSource,
  get_source,
  object_store,
  object_target,
)

MB = 1 << 20
DATA = os.urandom(7 * MB) * 3


@pytest.fixture
def target(store, monkeypatch):
  """A folder of an empty bucket; `store.source` is the source that reads it."""
  monkeypatch.setattr(
    object_store, "POLICY", dataclasses.replace(object_store.POLICY, first_wait=0.01, longest_wait=0.02)
  )
  store.make("bucket")
  store.source = get_source("gcs" if store.scheme == "gs" else "s3")
  return store.source.open_target(f"{store.scheme}://bucket/a folder/m+1")


def seen(store):
  return store.objects("bucket/a folder/m+1")


def write(draft, name="model-{}.safetensors", data=DATA, step=MB):
  name = name.format(draft.token)
  with draft.create(name, len(data)) as put:
    for start in range(0, len(data), step):
      put(memoryview(data)[start : start + step])
  return {name: len(data)}


def save(target, text, *, overwrite=False, data=b"data", outdated=(), conflicting=(), **more):
  """A small checkpoint: `config.json` names the data, and is put last."""
  draft = target.begin(overwrite=overwrite, last="config.json")
  try:
    sizes = write(draft, data=data)
    draft.put("config.json", f"{text} {draft.token}".encode())
    for name, content in more.items():
      draft.put(name, content)
    draft.commit(sizes, outdated, conflicting)
  except BaseException:
    draft.discard()
    raise
  return draft


def test_only_stores_can_be_written_to():
  writable = [
    isinstance(get_source(name), WritableSource) for name in ("gcs", "s3", "local", "huggingface", "kaggle")
  ]
  assert writable == [True, True, False, False, False]


def test_an_object_goes_up_in_parts(store, target):
  draft = target.begin(overwrite=False, last="config.json")
  sizes = write(draft)
  draft.put("config.json", b"{}")
  draft.put("tokenizer.json", b"[]")
  assert store.source.open_target(target.path).path == target.path
  draft.commit(sizes, ())
  name = next(iter(sizes))
  assert seen(store) == {name: DATA, "config.json": b"{}", "tokenizer.json": b"[]"}
  files = store.source.open_files(target.path)
  assert files.read(name, 5 * MB, 9 * MB) == DATA[5 * MB : 9 * MB]
  queries = [request.query for request in store.requests if request.method == "PUT" and request.query]
  assert sorted(query.partition("&")[0] for query in queries) == [
    "partNumber=1",
    "partNumber=2",
    "partNumber=3",
  ]
  assert not store.uploads


def test_a_stream_waits_for_its_parts(store, target):
  """Memory holds a few parts, however fast the bytes are made."""
  draft = target.begin(overwrite=False, last="config.json")
  store.fail("partNumber", silence=0.5, times=99)
  given, limit = 0, (object_target._AT_ONCE + 1) * object_target._PART
  with draft.create(f"x-{draft.token}", 8 * limit) as put:
    late = threading.Event()
    threading.Timer(0.4, late.set).start()
    while not late.is_set() and given < 2 * limit:
      put(bytes(MB))
      given += MB
    assert given <= limit + MB
    for fault in store._faults:
      fault.times = 0


@pytest.mark.parametrize(
  "fault",
  [{"status": 503}, {"status": 429}, {"reset": True}, {"take": 100_000}, {"take": 100_000, "reset": True}],
  ids=str,
)
def test_a_part_that_fails_is_sent_again(store, target, fault):
  store.fail("PUT .*partNumber=2", times=3, **fault)
  store.fail("POST .*uploads", times=1, status=503)
  store.fail("POST .*uploadId", times=1, status=503)
  draft = save(target, "a", data=DATA)
  assert seen(store)[f"model-{draft.token}.safetensors"] == DATA
  assert not store.uploads


def test_a_stalled_part_is_sent_again(store, target, monkeypatch):
  monkeypatch.setenv("MODELS_SOURCES_TIMEOUT", "0.2")
  store.fail("PUT .*partNumber=1", silence=3.0)
  draft = save(store.source.open_target(target.path), "a", data=DATA)
  assert seen(store)[f"model-{draft.token}.safetensors"] == DATA


@pytest.mark.parametrize(
  ("fault", "kind", "message"),
  [
    ({"status": 503}, ConnectionFailedError, r"answers 503 about .*model-.*: try later"),
    (
      {"status": 403},
      AccessError,
      r"may not be written with these credentials: .*list, read, write and delete",
    ),
    ({"take": 1000}, ConnectionFailedError, r"failed or was cut"),
    ({"status": 404}, FilesNotFoundError, r"there is no bucket bucket, or somebody else ended the upload"),
  ],
  ids=str,
)
def test_an_upload_that_fails_leaves_nothing(store, target, fault, kind, message):
  store.fail("PUT .*partNumber", times=999, **fault)
  with pytest.raises(kind, match=message):
    save(target, "a", data=DATA)
  assert not seen(store)
  assert not store.uploads


def test_an_error_of_the_writer_aborts_its_upload(store, target):
  draft = target.begin(overwrite=False, last="config.json")

  def fail():
    with draft.create(f"x-{draft.token}", 100 * MB) as put:
      put(bytes(20 * MB))
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail()
  draft.discard()
  assert not seen(store)
  assert not store.uploads


@contextlib.contextmanager
def snapshots(store):
  """The objects after each change of the store."""
  states, changed = [], store._changed

  def noted(*args):
    answer = changed(*args)
    states.append(seen(store))
    return answer

  store._changed = noted
  try:
    yield states
  finally:
    store._changed = changed


def restore(store, state):
  for name in seen(store):
    store.remove(f"bucket/a folder/m+1/{name}")
  for name, data in state.items():
    store.put(f"bucket/a folder/m+1/{name}", data)


def load(store, state):
  """What a reader finds in a folder: the text of its config.json, whose data is there."""
  restore(store, state)
  files = store.source.open_files(f"{store.scheme}://bucket/a folder/m+1")
  text, token = files.read("config.json", 0, 99).decode().split()
  assert files.size(f"model-{token}.safetensors")
  assert not [name for name in files.names() if name.startswith(".")]
  return text, files.read("tokenizer.json", 0, 99)


def outcome(store, state):
  """What a reader finds; None where it is told that there is no whole checkpoint."""
  try:
    return load(store, state)
  except FilesNotFoundError as error:
    return None if "holds no whole checkpoint: config.json is written last" in str(error) else str(error)


@pytest.mark.parametrize("small", ["same", "other"])
def test_readers_find_the_old_the_new_or_an_error(store, target, small):
  old = save(target, "old", **{"tokenizer.json": b"same", "notes.txt": b"mine"})
  with snapshots(store) as states:
    # One object alone changes, or several do.
    outdated = [f"model-{old.token}.safetensors"]
    save(target, "new", overwrite=True, outdated=outdated, **{"tokenizer.json": small.encode()})
  assert states[-1] == seen(store)
  assert len([name for name in states[-1] if "model" in name]) == 1
  assert states[-1]["notes.txt"] == b"mine"
  kinds = list(dict.fromkeys(outcome(store, state) for state in states))
  if small == "same":
    assert kinds == [("old", b"same"), ("new", b"same")]
  else:
    assert kinds == [("old", b"same"), None, ("new", b"other")]


def test_a_folder_is_no_checkpoint_before_its_first_commit(store, target):
  with snapshots(store) as states:
    save(target, "new", **{"tokenizer.json": b"1"})
  whole = [state for state in states if "config.json" in state]
  assert len(states) - len(whole) >= 3
  for state in states:
    if "config.json" in state:
      assert load(store, state) == ("new", b"1")
    else:
      with pytest.raises(FilesNotFoundError, match="Wait for the save that is under way"):
        load(store, state)


@pytest.mark.parametrize("first", [True, False])
def test_the_next_save_removes_what_a_killed_one_left(store, target, first):
  if not first:
    save(target, "old", **{"tokenizer.json": b"0"})
  with snapshots(store) as states:
    save(target, "killed", overwrite=True, **{"tokenizer.json": b"1"})
  for state in states[:-1]:
    restore(store, state)
    if state.keys() & {"config.json"}:
      message = "exists and is not empty|another process is writing"
    else:
      message = r"another process is writing .*, or a save was interrupted \(\.saving-"
    with pytest.raises(SourceError, match=message):
      save(target, "new")
    old = [name for name in seen(store) if name.startswith("model-")]
    draft = save(target, "new", overwrite=True, outdated=old, **{"tokenizer.json": b"2"})
    assert seen(store).keys() == {"config.json", "tokenizer.json", f"model-{draft.token}.safetensors"}


def refuse_change(store, place):
  """Refuses one change of the store, counted from 0. Returns a function that says how many were asked for."""
  fault, taken, take = store.fail("(PUT|DELETE|POST) ", status=403, times=0), 0, store._take_fault

  def refuse(request):
    nonlocal taken
    if request.method in ("PUT", "DELETE", "POST"):
      fault.times, taken = int(taken == place), taken + 1
    return take(request)

  store._take_fault = refuse
  return lambda: (taken, setattr(store, "_take_fault", take))[0]


def test_each_request_that_fails_leaves_the_old_or_says_what_is_left(store, target):
  save(target, "old", **{"tokenizer.json": b"0"})
  old, outcomes = seen(store), []
  while True:
    count, message = refuse_change(store, len(outcomes)), "saved"
    try:
      save(target, "new", overwrite=True, **{"tokenizer.json": b"1"})
    except SourceError as error:
      message = str(error)
    taken, left = count(), seen(store)
    if taken <= len(outcomes):
      break
    outcomes.append((message, left == old, outcome(store, left)))
    restore(store, old)
  # The mark, the data, the removal of config.json.
  for message, unchanged, _ in outcomes[:3]:
    assert "may not be written" in message
    assert unchanged
  # The tokenizer's file and config.json are put.
  for message, _, found in outcomes[3:5]:
    assert "holds no whole checkpoint now, because config.json was removed already: save" in message
    assert found is None
  # What is removed in the end.
  assert [message for message, _, _ in outcomes[5:]] == ["saved"] * len(outcomes[5:])
  assert {found for _, _, found in outcomes[5:]} == {("new", b"1")}


def test_what_cannot_be_removed_at_the_end_is_a_warning(store, target, caplog):
  old = save(target, "old")
  pattern = "DELETE .*model" if store.scheme == "gs" else "POST /bucket.delete"
  store.fail(pattern, status=403, times=1 if store.scheme == "gs" else 0)
  if store.scheme == "s3":
    # The first removal of this commit is that of the old data: only config.json changes.
    store.fail(pattern, status=403, times=1)
  save(target, "new", overwrite=True, outdated=[f"model-{old.token}.safetensors"])
  assert "is saved, but holds objects that it does not need" in caplog.text
  assert store.source.open_files(target.path).read("config.json", 0, 3) == b"new"


def test_conflicting_objects_are_gone_when_the_new_ones_appear(store, target):
  store.put("bucket/a folder/m+1/model.safetensors", b"old")
  store.put("bucket/a folder/m+1/config.json", b"old")
  with snapshots(store) as states:
    save(target, "new", overwrite=True, outdated=["model.safetensors"], conflicting=["model.safetensors"])
  for state in states:
    if state.get("config.json", b"old") != b"old":
      assert "model.safetensors" not in state
    elif "config.json" in state:
      assert state["model.safetensors"] == b"old"


def test_two_savers_of_one_folder(store, target):
  first = target.begin(overwrite=False, last="config.json")
  with pytest.raises(
    SourceError, match=r"another process is writing .*wait for it, give another address, or overwrite"
  ):
    target.begin(overwrite=False, last="config.json")
  # One that replaces it takes over: the first one says so, and leaves the other's checkpoint alone.
  sizes = write(first, data=b"1")
  second = save(target, "second", overwrite=True)
  first.put("config.json", b"first")
  with pytest.raises(SourceError, match="another process has begun to write"):
    first.commit(sizes, ())
  first.discard()
  assert seen(store).keys() == {"config.json", f"model-{second.token}.safetensors"}


def test_two_savers_that_begin_at_once(store, target, monkeypatch):
  """Each marks the folder before it looks for the other."""
  put = object_target.StoreTarget.put

  def put_both(self, name, data, **options):
    put(self, name, data, **options)
    if name.startswith(".saving-"):
      put(self, ".saving-0123456789abcdef.config.json", b"")

  monkeypatch.setattr(object_target.StoreTarget, "put", put_both)
  with pytest.raises(SourceError, match="another process is writing"):
    target.begin(overwrite=False, last="config.json")
  assert list(seen(store)) == [".saving-0123456789abcdef.config.json"]


def test_data_that_did_not_arrive_is_not_committed(store, target):
  draft = target.begin(overwrite=False, last="config.json")
  sizes = write(draft, data=b"1234")
  draft.put("config.json", b"{}")
  with pytest.raises(SourceError, match="did not arrive whole"):
    draft.commit({**sizes, f"other-{draft.token}": 3}, ())
  with pytest.raises(SourceError, match="did not arrive whole"):
    draft.commit(dict.fromkeys(sizes, 5), ())
  draft.discard()
  assert not seen(store)


def test_another_process_creates_objects_too(store, target):
  first = target.begin(overwrite=False, last="config.json")
  second = store.source.open_target(target.path).join(first.token, "config.json")
  sizes = write(first, "a-{}", b"1") | write(second, "b-{}", b"2")
  first.put("config.json", b"{}")
  first.commit(sizes, ())
  assert seen(store) == {f"a-{first.token}": b"1", f"b-{first.token}": b"2", "config.json": b"{}"}


def test_a_lost_answer_to_the_commit_is_no_error(store, target):
  """The object is there: the second attempt finds it."""
  changed = store._changed

  def lose(request, path, asked, body):
    answer = changed(request, path, asked, body)
    if path.endswith("/config.json") and request.method == "PUT":
      store._changed = changed
      return object_store_answer(503)
    return answer

  def object_store_answer(status):
    from models_sources.testing import _Answer

    return _Answer(status)

  store._changed = lose
  save(target, "new")
  assert seen(store)["config.json"].startswith(b"new")


@pytest.mark.parametrize(
  ("place", "message"),
  [
    ("{}://", "is not an address"),
    ("{}://bucket/a//b", "is not an address"),
    ("{}://bucket/a\0b", "is not an address"),
    ("{}://bucket/" + "k" * 1000, "is too long: the names of objects have at most 1024 bytes"),
  ],
)
def test_places_that_are_none(store, target, place, message):
  with pytest.raises(InvalidNameError, match=message):
    store.source.open_target(place.format(store.scheme))
  assert not store.requests


def test_what_is_refused_before_anything_is_written(store, target):
  store.put("bucket/file.gguf", b"1")
  store.put("bucket/marked", b"")
  store.put("bucket/marked/", b"")
  open_target = store.source.open_target
  for place, kind, message in (
    ("nobucket/x", FilesNotFoundError, "there is no bucket nobucket, which .* needs: create it"),
    ("bucket/file.gguf", InvalidNameError, "is an object, not a folder: give another address"),
    ("bucket", SourceError, "exists and is not empty"),
  ):
    with pytest.raises(kind, match=message):
      open_target(f"{store.scheme}://{place}").begin(overwrite=False, last="config.json")
  open_target(f"{store.scheme}://bucket/marked").begin(overwrite=False, last="config.json").discard()
  store.freeze("bucket")
  with pytest.raises(AccessError, match="may not be written with these credentials"):
    target.begin(overwrite=False, last="config.json")
  assert not seen(store)


def test_tokens(store, target):
  with pytest.raises(AccessError, match="cannot be written without credentials"):
    store.source.open_target(target.path, token=False)
  if store.scheme == "s3":
    with pytest.raises(InvalidNameError, match="S3 takes no token"):
      store.source.open_target(target.path, token="hf_secret")
  else:
    store.lock("bucket", "ours")
    with pytest.raises(AccessError):
      store.source.open_target(target.path, token="theirs").begin(overwrite=False, last="x")
    store.source.open_target(target.path, token="ours").begin(overwrite=False, last="x").discard()


def test_data_has_a_name_of_its_own(store, target):
  draft = target.begin(overwrite=False, last="config.json")
  with pytest.raises(InvalidNameError, match="would replace an object"), draft.create("model.safetensors", 1):
    pytest.fail("nothing is written")
