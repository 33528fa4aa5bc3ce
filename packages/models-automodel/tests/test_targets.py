"""Checkpoints written to object stores, and places that cannot be written."""

import json
import os
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import models_sources
from models_automodel import AutoModel, ConfigError, SaveError, SourceFilesError, digest
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.text import load_tokenizer
from models_core.adapters import Adapter, Factors, load_peft_adapter, save_merged, save_peft_adapter
from models_core.extras import MissingExtraError
from models_core.safetensors_saver import save_model_to_safetensors
from models_llama.llama3 import FAMILY
from models_sources import get_source, object_store
from models_sources.testing import StoreServer

INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["gs", "s3"])
def store(request, monkeypatch, tmp_path):
  """A store with an empty bucket; `store.address` is a folder in it. No other is in reach."""
  for name in list(os.environ):
    if name.startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST")):
      monkeypatch.delenv(name)
  monkeypatch.setenv("MODELS_SOURCES_CACHE", str(tmp_path / "user-cache"))
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
  monkeypatch.setattr(
    object_store, "POLICY", object_store.Policy(attempts=3, first_wait=0.01, longest_wait=0.02)
  )
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  with StoreServer() as server:
    server.make("bucket")
    server.address = f"{request.param}://bucket/models/mine"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    yield server
  assert os.listdir(".") == []


# What does not depend on the kind of store is tested with one of them.
one_store = pytest.mark.parametrize("store", ["gs"], indirect=True)


@pytest.fixture
def base(checkpoint, tmp_path):
  """The tiny model with companions."""
  source, tensors = checkpoint
  directory = tmp_path / "base"
  directory.mkdir()
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  raw = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 77}
  (directory / "config.json").write_text(json.dumps(raw))
  (directory / "tokenizer.json").write_text("{}")
  (directory / "LICENSE").write_text("terms")
  return directory


def seen(store):
  return store.objects("bucket/models/mine")


def tensors_of(objects):
  found = {}
  for name, data in objects.items():
    if name.endswith(".safetensors"):
      found |= safetensors.numpy.load(data)
  return found


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), name


def load(place, mesh=None, **options):
  return AutoModel.from_pretrained(str(place), mesh, progress=False, **options)[0]


@pytest.mark.parametrize("size", ["5GB", "4KB"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_is_saved_and_comes_back(store, base, checkpoint, sharded, size):
  model = load(base, jax.make_mesh((2, 2), ("fsdp", "tp")) if sharded else None)
  AutoModel.save_pretrained(model, store.address, base=base, max_shard_size=size, progress=False)
  objects = seen(store)
  assert_same(tensors_of(objects), checkpoint[1])
  files = {name for name in objects if name.endswith(".safetensors")}
  assert (len(files) > 1) == (size == "4KB")
  assert objects.keys() - files == {"config.json", INDEX, "tokenizer.json", "LICENSE"}
  assert set(json.loads(objects[INDEX])["weight_map"].values()) == files
  assert json.loads(objects["config.json"])["max_position_embeddings"] == 77
  # The name of each file is used by this save alone, and transformers reads it as its index says.
  assert all(name.startswith("model-") and "-of-" in name for name in files)
  again = load(store.address)
  assert digest(again) == digest(model)
  assert again.config == model.config


@one_store
def test_a_base_in_a_store(store, base, checkpoint, tmp_path):
  """README's promise: the address that from_pretrained returned is a base."""
  AutoModel.save_pretrained(load(base), store.address, base=base, progress=False)
  model, path = AutoModel.from_pretrained(store.address, progress=False)
  assert path == store.address
  AutoModel.save_pretrained(model, tmp_path / "out", base=path, progress=False)
  assert_same(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), checkpoint[1])
  assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
  assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 77
  with pytest.raises(SourceFilesError, match="there is nothing at gs://bucket/none"):
    AutoModel.save_pretrained(model, tmp_path / "other", base="gs://bucket/none", progress=False)
  store.fail("GET .*tokenizer", status=503, times=99)
  with pytest.raises(SourceFilesError, match=r"answers 503 about gs://bucket/models/mine/tokenizer\.json"):
    AutoModel.save_pretrained(model, tmp_path / "other", base=path, progress=False)
  assert not (tmp_path / "other").exists()


def test_saving_onto_the_base_in_a_store(store, base, checkpoint):
  store.put("bucket/models/mine/notes.txt", b"mine")
  for name in ("config.json", "model.safetensors", "tokenizer.json"):
    store.put(f"bucket/models/mine/{name}", (base / name).read_bytes())
  model = load(store.address)
  with pytest.raises(SaveError, match="exists and is not empty: give another address, or overwrite=True"):
    AutoModel.save_pretrained(model, store.address, base=store.address, progress=False)
  model.final_norm.w.set_value(model.final_norm.w.get_value() + 1)
  changed = checkpoint[1] | {"model.norm.weight": checkpoint[1]["model.norm.weight"] + 1}
  for _ in range(2):
    AutoModel.save_pretrained(model, store.address, base=store.address, overwrite=True, progress=False)
    assert_same(tensors_of(seen(store)), changed)
    assert "model.safetensors" not in seen(store)
    assert digest(load(store.address)) == digest(model)
  assert seen(store).keys() >= {"notes.txt", "tokenizer.json"}
  assert len(seen(store)) == 5


def test_a_conversion_streams_from_store_to_store(store, base, checkpoint):
  AutoModel.save_pretrained(load(base), store.address, base=base, max_shard_size="4KB", progress=False)
  other = store.address.replace("mine", "other")
  convert(store.address, other, dtype="float16", progress=False)
  expected = {name: tensor.astype(np.float16) for name, tensor in checkpoint[1].items()}
  assert_same(tensors_of(store.objects("bucket/models/other")), expected)
  convert(other, other, dtype="float32", overwrite=True, progress=False)
  assert {tensor.dtype for tensor in tensors_of(store.objects("bucket/models/other")).values()} == {
    np.dtype("float32")
  }


@one_store
def test_the_command_converts_into_a_store(store, base, capsys):
  assert main(["convert", str(base), store.address]) == 0
  assert "config.json" in seen(store)
  capsys.readouterr()
  assert main(["convert", str(base), store.address]) == 1
  assert "exists and is not empty" in capsys.readouterr().err
  assert main(["convert", str(base), "hf://org/name"]) == 1
  assert (
    "hf://org/name cannot be written in place: save to a directory, then `models_automodel.upload` it"
    in capsys.readouterr().err
  )


def test_a_model_is_kept_in_a_store(store, base, monkeypatch):
  model = load(base, intermediate_ckpt_dir=store.address)
  assert seen(store).keys() > {"config.json", "origin.json", INDEX}
  again, path = AutoModel.from_pretrained(str(base), intermediate_ckpt_dir=store.address, progress=False)
  assert path == store.address
  assert digest(again) == digest(model)
  with pytest.raises(
    ConfigError, match="holds the result of another call, with dtype=None instead of 'bfloat16'"
  ):
    load(base, intermediate_ckpt_dir=store.address, dtype="bfloat16")
  store.put("bucket/other/file", b"")
  with pytest.raises(ConfigError, match=r"other was not written by from_pretrained"):
    load(base, intermediate_ckpt_dir=store.address.replace("models/mine", "other"))
  store.put(f"bucket/half/.saving-{'0' * 16}.config.json", b"")
  with pytest.raises(SaveError, match=r"another process is writing .*/half, or a save was interrupted"):
    load(base, intermediate_ckpt_dir=store.address.replace("models/mine", "half"))


@one_store
def test_of_two_processes_that_keep_a_model_one_wins(store, base, monkeypatch):
  from models_automodel import intermediate

  write = intermediate.save_model_to_safetensors

  def late(*args, **options):
    write(*args, **options)
    write(*args, **options)

  monkeypatch.setattr(intermediate, "save_model_to_safetensors", late)
  assert digest(load(base, intermediate_ckpt_dir=store.address)) == digest(load(base))


def test_an_adapter_is_written_to_a_store(store, base):
  config = load(base).config
  factors = Factors(np.ones((16, 2), np.float32), np.ones((2, 16), np.float32))
  adapter = Adapter({"layers.0.attn.q_proj.w": factors}, alpha=1.0, rank=2)
  source = get_source(models_sources.source_of_address(store.address))
  for alpha in (1.0, 2.0):
    adapter = Adapter(adapter.factors, alpha=alpha, rank=2)
    save_peft_adapter(adapter, source.open_target(store.address), FAMILY, config, overwrite=alpha > 1)
    found = load_peft_adapter(source.open_files(store.address), FAMILY, config)
    assert found.alpha == alpha
    np.testing.assert_array_equal(found.factors["layers.0.attn.q_proj.w"].a, factors.a)
  assert seen(store).keys() == {"adapter_model.safetensors", "adapter_config.json"}


@one_store
def test_the_functions_of_core_take_targets(store, base, checkpoint):
  target = get_source("gcs").open_target(store.address)
  save_model_to_safetensors({"a": np.arange(6, dtype=np.float32)}, target)
  assert seen(store).keys() >= {INDEX}
  assert_same(tensors_of(seen(store)), {"a": np.arange(6, dtype=np.float32)})
  save_merged(
    base, get_source("gcs").open_target("gs://bucket/merged"), Adapter({}, 1.0, 1), FAMILY, load(base).config
  )
  assert_same(tensors_of(store.objects("bucket/merged")), checkpoint[1])


# What goes wrong.


def test_a_save_that_fails_leaves_the_old_checkpoint(store, base, monkeypatch):
  model = load(base)
  AutoModel.save_pretrained(model, store.address, base=base, max_shard_size="4KB", progress=False)
  old = seen(store)
  store.fail(r"PUT .*00003", status=503, times=99)
  store.fail(r"PUT .*%2D00003", status=503, times=99)
  with pytest.raises(SaveError, match=r"answers 503 about .*-00003-of-\d+\.safetensors: try later"):
    AutoModel.save_pretrained(model, store.address, max_shard_size="4KB", overwrite=True, progress=False)
  assert seen(store) == old
  assert digest(load(store.address)) == digest(model)


def test_half_a_checkpoint_is_none(store, base):
  """Whatever is missing of a save that was killed: no preset of the folder's name is taken for it."""
  address = store.address.replace("mine", "Llama-3.2-1B")
  AutoModel.save_pretrained(load(base), address, base=base, progress=False)
  store.put(f"bucket/models/Llama-3.2-1B/.saving-{'0' * 16}.config.json", b"")
  assert load(address)
  store.remove("bucket/models/Llama-3.2-1B/config.json")
  for ask in (load, AutoModel.plan, load_tokenizer):
    with pytest.raises(
      SourceFilesError, match=r"holds no whole checkpoint: config\.json is written last, and is not there"
    ):
      ask(address)


@one_store
def test_an_orbax_tree(store, base):
  for naming in ("orbax", "maxtext"):
    with pytest.raises(
      SaveError, match=f"naming scheme '{naming}' is written to a directory of this machine only"
    ):
      convert(base, store.address, to=naming, progress=False)
  assert not store.requests


@one_store
def test_an_orbax_tree_in_the_target_is_not_mixed_with_tensors(store, base):
  for name in ("_METADATA", "manifest.ocdbt"):
    store.put(f"bucket/models/mine/{name}", b"{}")
  with pytest.raises(SaveError, match="holds an Orbax tree, which would stay beside the new checkpoint"):
    AutoModel.save_pretrained(load(base), store.address, overwrite=True, progress=False)
  assert seen(store).keys() == {"_METADATA", "manifest.ocdbt"}


@pytest.fixture
def read_only_source(monkeypatch):
  """A source of another package that can be read alone, announced under the scheme of its addresses."""
  module = types.ModuleType("archive")
  module.open_files = lambda identifier, **options: None
  monkeypatch.setitem(sys.modules, "archive", module)
  point = models_sources.importlib.metadata.EntryPoint("archive", "archive", models_sources.GROUP)
  entry_points = {**models_sources._entry_points(), "archive": point}
  monkeypatch.setattr(models_sources, "_entry_points", lambda: entry_points)


FILE = "file"
PLACES = [
  ("hf://org/name", "cannot be written in place: save to a directory, then `models_automodel.upload` it"),
  ("az://container/x", "there is no source for addresses az://"),
  ("http://host/x", "there is no source for addresses http://"),
  ("GS://bucket/x", "there is no source for addresses GS://"),
  ("kaggle://x", "the source 'kaggle' is only read"),
  ("archive://x", "the source 'archive' is only read"),
  (
    "file:///models/x",
    "is an address, not a directory of this machine, .*: write a directory without file://",
  ),
  (
    pathlib.Path("gs://bucket/x"),
    "gs:/bucket/x is an address, not a directory .*give the address as a string",
  ),
  (pathlib.Path("hf://bucket/x"), "hf:/bucket/x is an address, not a directory"),
  ("gs://", "is not an address of the form gs://bucket/folder"),
  ("a\0b", "holds a NUL"),
  ("x" * 250, "File name too long; .* Give a shorter path"),
  (FILE, "is not a directory: give another path"),
  (f"{FILE}/x/y", "cannot be written: .*/file is not a directory; give another path"),
]


@pytest.mark.parametrize(("place", "message"), PLACES, ids=lambda value: str(value)[:20])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
  place, message, base, tmp_path, monkeypatch, read_only_source
):
  model = load(base)
  monkeypatch.chdir(tmp_path)
  (tmp_path / FILE).write_text("")
  before = sorted(os.listdir(tmp_path))
  monkeypatch.setattr(AutoModel, "plan", None)  # nothing is asked for, and nothing read
  for save in (
    lambda: AutoModel.save_pretrained(model, place, progress=False),
    lambda: convert("org/name", place, progress=False),
    lambda: AutoModel.from_pretrained("org/name", intermediate_ckpt_dir=place, progress=False),
  ):
    # A file in the place of a kept model holds another call's result.
    with pytest.raises((SaveError, ConfigError), match=f"{message}|was not written by from_pretrained"):
      save()
  assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("place", ["gs://bucket/x", "s3:/bucket/x", "hf://x/y"])
def test_core_writes_no_directory_with_the_name_of_an_address(place, base, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = load(base).config
  adapter = Adapter({}, alpha=1.0, rank=1)
  for save in (
    lambda: save_model_to_safetensors({"a": np.ones(3)}, place),
    lambda: save_peft_adapter(adapter, place, FAMILY, config),
    lambda: save_merged(base, place, adapter, FAMILY, config),
  ):
    with pytest.raises(
      SaveError, match="is an address, not a directory of this machine, and nothing is written there"
    ):
      save()
  assert os.listdir(tmp_path) == ["base"]


def test_a_download_path_is_a_directory(base, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for place in ("gs://bucket/x", "s3://bucket/x"):
    with pytest.raises(SourceFilesError, match="is not a directory of this machine"):
      AutoModel.plan("org/name", model_download_path=place)
  assert os.listdir(tmp_path) == ["base"]


def test_a_directory_of_a_single_user(base, tmp_path, monkeypatch):
  """`~` means the same in every place."""
  monkeypatch.setenv("HOME", str(tmp_path))
  for _ in range(2):
    _, path = AutoModel.from_pretrained(str(base), intermediate_ckpt_dir="~/kept", progress=False)
  assert path == str(tmp_path / "kept")


def test_a_kept_model_that_the_disk_has_no_room_for(base, tmp_path, monkeypatch):
  import errno

  from models_core.saving import safetensors_writer

  def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(safetensors_writer, "_pwrite", full)
  with pytest.raises(
    SaveError, match=rf"^{tmp_path}/kept cannot be written: No space .* bytes are needed, and .* are free"
  ):
    load(base, intermediate_ckpt_dir=tmp_path / "kept")
  assert os.listdir(tmp_path) == ["base"]


def test_without_the_client_the_error_says_how_to_install_it(base, monkeypatch):
  model = load(base)
  for module in ("models_sources.s3", "models_sources.object_store", "models_sources.object_target"):
    monkeypatch.delitem(sys.modules, module, raising=False)
  monkeypatch.setitem(sys.modules, "obstore", None)
  with pytest.raises(MissingExtraError, match=r"the package obstore: (uv )?pip install .*\[stores\]"):
    AutoModel.save_pretrained(model, "s3://bucket/x", progress=False)


@one_store
def test_a_private_bucket_takes_a_token(store, base):
  store.lock("bucket", "ours")
  model = load(base)
  with pytest.raises(SaveError, match="may not be"):
    AutoModel.save_pretrained(model, store.address, token="theirs", progress=False)
  AutoModel.save_pretrained(model, store.address, token="ours", progress=False)
  AutoModel.save_pretrained(
    model, store.address, base=store.address, token="ours", overwrite=True, progress=False
  )
  assert nnx.state(load(store.address, token="ours"))


@one_store
def test_all_weights_go_up_in_parts(store, tmp_path):
  """Larger than one part: streamed as one upload."""
  from models_core.dummy_model_creator import create_dummy_model
  from models_llama.llama3.model import ModelConfig

  config = ModelConfig(
    num_layers=2,
    vocab_size=4096,
    embed_dim=256,
    hidden_dim=1024,
    num_heads=4,
    head_dim=64,
    num_kv_heads=2,
    rope_theta=1e4,
    norm_eps=1e-5,
    rope_scaling=None,
  )
  model, _ = create_dummy_model(FAMILY.model_class, config, random_seed=1), None
  AutoModel.save_pretrained(model, store.address, progress=False)
  parts = [request for request in store.requests if "partNumber" in request.query]
  assert len(parts) >= 2
  assert digest(load(store.address)) == digest(model)
