"""The S3 source against moto's server, which others wrote: signatures, listings, ranges and conditions as S3 has them."""

import pathlib
import urllib.request
from contextlib import nullcontext

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

from models_sources import CorruptFilesError, FilesNotFoundError, SourceError, get_source

from .checkpoint import CONFIG, WEIGHTS

open_files = get_source("s3").open_files


@pytest.fixture(scope="module")
def server():
  moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
  moto.start()
  host, port = moto.get_host_and_port()
  # The client has no call that makes a bucket.
  urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
  yield f"http://{host}:{port}"
  moto.stop()


@pytest.fixture
def bucket(server, no_platform, monkeypatch):
  """A client that writes into the bucket that the source reads."""
  monkeypatch.setenv("AWS_ENDPOINT_URL", server)
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-shown")
  client = S3Store("bucket", endpoint=server, client_options={"allow_http": True})
  obstore.put(client, "m/config.json", CONFIG)
  obstore.put(client, "m/model.safetensors", WEIGHTS)
  return client


def test_a_folder_of_s3(bucket, tmp_path):
  files = open_files("s3://bucket/m")
  assert files.names() == ["config.json", "model.safetensors"]
  assert files.read("model.safetensors", 1000, 200_000) == WEIGHTS[1000:200_000]
  where = pathlib.Path(open_files("s3://bucket/m", download_path=str(tmp_path)).fetch(["model.safetensors"]))
  assert (where / "model.safetensors").read_bytes() == WEIGHTS


def test_a_replaced_object_of_s3(bucket):
  files = open_files("s3://bucket/m")
  assert files.read("model.safetensors", 0, 8) == WEIGHTS[:8]
  obstore.put(bucket, "m/model.safetensors", WEIGHTS[::-1])
  with pytest.raises(CorruptFilesError, match=r"s3://bucket/m/model\.safetensors was replaced"):
    files.read("model.safetensors", 0, 8)


def test_a_missing_bucket_and_folder_of_s3(bucket):
  for address in ("s3://no-such-bucket/m", "s3://bucket/nothing"):
    with pytest.raises(FilesNotFoundError, match=f"there is nothing at {address}"):
      open_files(address)


def test_a_checkpoint_is_written_to_s3(bucket):
  """Parts, conditions and removals as others understand them."""
  target = get_source("s3").open_target("s3://bucket/written")
  for number in range(2):
    draft = target.begin(overwrite=bool(number), last="config.json")
    name, data = f"model-{draft.token}.safetensors", WEIGHTS * 30
    with draft.create(name, len(data)) as put:
      for start in range(0, len(data), 1 << 20):
        put(data[start : start + (1 << 20)])
    with (
      pytest.raises(FilesNotFoundError, match="holds no whole checkpoint") if not number else nullcontext()
    ):
      open_files(target.path)
    draft.put("config.json", CONFIG + b" " * number)
    draft.put("tokenizer.json", b"[%d]" % number)
    draft.commit({name: len(data)}, [old for old in draft.files.names() if old.endswith(".safetensors")])
    files = open_files(target.path)
    assert files.names() == ["config.json", name, "tokenizer.json"]
    assert files.read(name, 0, len(data)) == data
  with pytest.raises(SourceError, match="exists and is not empty"):
    target.begin(overwrite=False, last="config.json")
  draft = target.begin(overwrite=True, last="config.json")

  def fail():
    with draft.create(f"x-{draft.token}", 100 << 20) as put:
      put(bytes(20 << 20))
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail()
  draft.discard()
  listed = urllib.request.urlopen(f"{bucket.config['endpoint']}/bucket?uploads").read().decode()
  assert "<UploadId>" not in listed
  assert open_files(target.path).names() == ["config.json", name, "tokenizer.json"]
