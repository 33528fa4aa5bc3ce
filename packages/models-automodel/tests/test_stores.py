"""Models in object stores: what travels, what is left on the disk, and what goes wrong."""

import os
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from models_automodel import AutoModel, ModelSource, SourceFilesError
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.text import load_tokenizer
from models_core.extras import MissingExtraError
from models_core.formats import byte_reader
from models_core.loading import fill, loader
from models_sources import object_store
from models_sources.testing import StoreServer

ADDRESS = "gs://bucket/models/mine"
WEIGHTS = "bucket/models/mine/model.safetensors"


@pytest.fixture
def store(monkeypatch, tmp_path, checkpoint):
  """A store that holds the tiny model. No other is in reach."""
  for name in list(os.environ):
    if name.startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST")):
      monkeypatch.delenv(name)
  monkeypatch.setenv("MODELS_SOURCES_CACHE", str(tmp_path / "user-cache"))
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
  with StoreServer() as server:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    directory, _ = checkpoint
    for name in ("config.json", "model.safetensors"):
      server.put(f"bucket/models/mine/{name}", (directory / name).read_bytes())
    server.put("bucket/models/mine/README.md", b"# weights")
    yield server


@pytest.fixture
def small_ranges(monkeypatch):
  """As many requests as a large model takes."""
  monkeypatch.setattr(byte_reader, "RANGE", 512)
  monkeypatch.setattr(byte_reader.RangeReader, "chunk", 512)
  monkeypatch.setattr(fill, "_TASK", 2048)


@pytest.fixture
def waits(monkeypatch):
  seconds = []
  policy = object_store.Policy(attempts=8, sleep=seconds.append, jitter=lambda: 0.0)
  monkeypatch.setattr(object_store, "POLICY", policy)
  return seconds


def check(model, checkpoint):
  state = nnx.state(model)
  np.testing.assert_array_equal(state["lm_head"]["w"].get_value(), checkpoint[1]["lm_head.weight"])
  np.testing.assert_array_equal(
    state["layers"][1]["mlp"]["down_proj"]["w"].get_value(),
    checkpoint[1]["model.layers.1.mlp.down_proj.weight"],
  )


@pytest.mark.parametrize(
  "arguments",
  [
    {"model_id": "google/gemma-3-1b-it", "model_source": ModelSource.GCS, "model_path": ADDRESS},
    {"model_id": ADDRESS},
    {"model_id": ADDRESS, "model_source": ModelSource.KAGGLE},
    {"model_id": "s3://bucket/models/mine"},
    {"model_id": "mine", "model_source": ModelSource.S3, "model_path": "s3://bucket/models/mine"},
    {"model_id": f"{ADDRESS}/", "model_source": "gcs"},
  ],
  ids=str,
)
def test_a_model_is_streamed(store, checkpoint, arguments, tmp_path):
  model, path = AutoModel.from_pretrained(progress=False, **arguments)
  check(model, checkpoint)
  assert path == (arguments.get("model_path") or arguments["model_id"]).rstrip("/")
  assert not (tmp_path / "user-cache").exists()
  assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("mesh", [None, (4, 1), (1, 4), (2, 2)], ids=str)
def test_every_byte_travels_once(store, checkpoint, mesh, dtype, small_ranges):
  mesh = mesh and jax.make_mesh(mesh, ("fsdp", "tp"))
  model, _ = AutoModel.from_pretrained(ADDRESS, mesh, dtype=dtype, progress=False)
  if dtype is None:
    check(model, checkpoint)
  data = sum(tensor.nbytes for tensor in checkpoint[1].values())
  size = (checkpoint[0] / "model.safetensors").stat().st_size
  # The header's first request takes all of so small a file; a large one's is 256 KiB.
  assert store.received(WEIGHTS) == data + size
  assert store.received("bucket/models/mine/README.md") == 0
  assert store.lines().count("GET /bucket") == 1


def test_rows_that_are_not_asked_for_do_not_travel(store, checkpoint, small_ranges):
  plan = AutoModel.plan(ADDRESS)
  store.requests.clear()
  wanted = plan.checkpoint.tensors["model.embed_tokens.weight"]
  opened = plan.checkpoint.open(plan.files)
  rows = np.empty((10, wanted.shape[1]), wanted.dtype)
  opened.runs.read_into(wanted, 20 * wanted.shape[1], rows)
  opened.close()
  np.testing.assert_array_equal(rows, checkpoint[1]["model.embed_tokens.weight"][20:30])
  assert store.received(WEIGHTS) == rows.nbytes


def test_a_plan_takes_headers_and_config_alone(store, checkpoint):
  plan = AutoModel.plan(ADDRESS, jax.make_mesh((2, 2), ("fsdp", "tp")))
  assert plan.num_parameters == sum(tensor.size for tensor in checkpoint[1].values())
  assert len(store.requests) == 3  # the list, the configuration, one header


@pytest.mark.parametrize("naming", ["huggingface", "orbax"])
def test_a_conversion_streams(store, checkpoint, naming, tmp_path):
  convert(ADDRESS, tmp_path / "out", to=naming, progress=False)
  model, _ = AutoModel.from_pretrained(str(tmp_path / "out"), progress=False)
  check(model, checkpoint)
  assert not (tmp_path / "user-cache").exists()


def test_with_a_download_path_files_are_kept(store, checkpoint, tmp_path):
  for _ in range(2):
    model, path = AutoModel.from_pretrained(
      ADDRESS, model_download_path=str(tmp_path / "own"), progress=False
    )
    check(model, checkpoint)
    assert path.startswith(str(tmp_path / "own"))
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    received, store.requests = store.received(WEIGHTS), []
  assert received == 0


def test_a_gguf_file_is_streamed(store, write_gguf, tmp_path):
  path = write_gguf(tmp_path / "tiny.gguf")
  store.put("bucket/gguf/tiny.gguf", path.read_bytes())
  local, _ = AutoModel.from_pretrained(str(path), progress=False)
  remote, where = AutoModel.from_pretrained("gs://bucket/gguf/tiny.gguf", progress=False)
  assert where == "gs://bucket/gguf/tiny.gguf"
  same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(local), nnx.state(remote))
  assert all(jax.tree.leaves(same))


def test_the_tokenizer_of_an_address(store, monkeypatch):
  tokenizers = pytest.importorskip("tokenizers")
  engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "up": 1}, unk_token="[UNK]"))
  store.put("bucket/models/mine/tokenizer.json", engine.to_str().encode())
  assert load_tokenizer(ADDRESS).encode("up") == [1]
  with pytest.raises(SourceFilesError, match="there is nothing at gs://bucket/none"):
    load_tokenizer("gs://bucket/none")


def test_the_command_takes_addresses(store, capsys):
  assert main(["show", ADDRESS]) == 0
  assert "rope_theta = 10000.0" in capsys.readouterr().out
  assert main(["plan", "s3://bucket/models/mine"]) == 0
  assert "s3://bucket/models/mine" in capsys.readouterr().out
  assert main(["show", "gs://bucket/models/nothing"]) == 1
  assert "there is nothing at gs://bucket/models/nothing" in capsys.readouterr().err


# What goes wrong while a model is loaded.


@pytest.mark.parametrize(
  "fault",
  [
    {"cut": 100},
    {"cut": 100, "reset": True},
    {"reset": True},
    {"status": 503},
    {"status": 429, "headers": {"Retry-After": "1"}},
    {"alter": lambda body: body[:100]},
    {"drip": 0.01},
  ],
  ids=str,
)
def test_what_passes_ends_with_the_right_model(store, checkpoint, small_ranges, waits, fault):
  store.fail("GET .*safetensors", times=5, **fault)
  model, _ = AutoModel.from_pretrained(ADDRESS, progress=False)
  check(model, checkpoint)


@pytest.mark.parametrize("moment", ["after the header", "between two ranges"])
def test_an_object_that_is_replaced_is_an_error(store, checkpoint, small_ranges, moment, monkeypatch):
  size = (checkpoint[0] / "model.safetensors").stat().st_size
  data = bytearray((checkpoint[0] / "model.safetensors").read_bytes())
  data[-1] ^= 1  # Of the same length: nothing but its mark tells it apart.
  assert len(data) == size
  plan = AutoModel.plan(ADDRESS)
  if moment == "after the header":
    store.put(WEIGHTS, bytes(data))
  with pytest.raises(Exception, match=rf"gs://{WEIGHTS} was replaced while it was read") as caught:
    loader.load(plan, on_bytes=lambda count: store.put(WEIGHTS, bytes(data)))
  assert type(caught.value).__name__ == "CorruptFilesError"


def test_errors_of_a_store_are_errors_of_this_house(store, waits):
  with pytest.raises(SourceFilesError, match="there is nothing at gs://nobucket/x"):
    AutoModel.from_pretrained("gs://nobucket/x")
  with pytest.raises(SourceFilesError, match="not an address of the form gs://bucket/folder"):
    AutoModel.from_pretrained("google/gemma-3-1b-it", model_source=ModelSource.GCS)
  store.fail("GET .*safetensors", status=503, times=999)
  with pytest.raises(SourceFilesError, match=r"answers 503 about gs://bucket/models/mine/model\.safetensors"):
    AutoModel.from_pretrained(ADDRESS, progress=False)
  assert len(waits) == 7


def test_parameters_are_sharded_as_from_a_directory(store, checkpoint):
  mesh = jax.make_mesh((2, 2), ("fsdp", "tp"))
  remote, _ = AutoModel.from_pretrained(ADDRESS, mesh, progress=False)
  local, _ = AutoModel.from_pretrained(str(checkpoint[0]), mesh, progress=False)
  ours, theirs = (nnx.state(model)["lm_head"]["w"].get_value() for model in (remote, local))
  assert ours.sharding == theirs.sharding
  assert ours.sharding.spec != P()


def test_without_the_client_the_error_says_how_to_install_it(monkeypatch):
  for module in ("models_sources.s3", "models_sources.object_store"):
    monkeypatch.delitem(sys.modules, module, raising=False)
  monkeypatch.setitem(sys.modules, "obstore", None)
  with pytest.raises(MissingExtraError, match=r"the package obstore: (uv )?pip install .*\[stores\]"):
    AutoModel.plan("s3://bucket/models/mine")


def test_a_stalled_store_is_left(store, checkpoint, monkeypatch, waits):
  monkeypatch.setenv("MODELS_SOURCES_TIMEOUT", "0.3")
  store.fail("GET .*safetensors", stall=1.0, times=2)
  model, _ = AutoModel.from_pretrained(ADDRESS, progress=False)
  check(model, checkpoint)
  assert len(waits) == 2
