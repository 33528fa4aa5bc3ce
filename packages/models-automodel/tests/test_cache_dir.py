"""`cache_dir`: a second load of the same thing reads no checkpoint, and a load of another thing is that other thing."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from models_automodel import AutoModel, SaveError, automodel, load_text_model
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.digest import digest
from models_sources.testing import StoreServer


@pytest.fixture
def reads(monkeypatch):
  """The plans whose weights were read."""
  found, read = [], automodel.load_arrays

  def noted(plan, **options):
    found.append(plan)
    return read(plan, **options)

  monkeypatch.setattr(automodel, "load_arrays", noted)
  return found


@pytest.fixture
def load(tmp_path):
  """Loads through the cache; returns the model."""

  def run(place, mesh=None, **options):
    return AutoModel.from_pretrained(place, mesh, cache_dir=tmp_path / "cache", progress=False, **options)[0]

  return run


@pytest.fixture
def adapter(tmp_path, checkpoint):
  """`adapter(seed)` writes an adapter of the checkpoint, always to the same place."""

  def write(seed, **whole):
    rng = np.random.default_rng(seed)
    tensors = dict(whole)
    for layer in range(2):
      module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
      tensors |= {
        f"{module}.lora_A.weight": rng.normal(size=(2, 16)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(16, 2)).astype(np.float32),
      }
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": str(checkpoint[0])}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

  return write


def mesh_of(*shape):
  return jax.sharding.Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("fsdp", "tp"))


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_a_dtype_change(shape, checkpoint, load, reads):
  mesh = None if shape is None else mesh_of(*shape)
  first, second = (load(checkpoint[0], mesh, dtype="bfloat16") for _ in range(2))
  assert len(reads) == 1
  plain, _ = AutoModel.from_pretrained(checkpoint[0], mesh, dtype="bfloat16", progress=False)
  assert digest(first) == digest(second) == digest(plain)
  assert second.config == plain.config
  other = load(checkpoint[0], mesh, dtype="float16")
  assert other.lm_head.w[...].dtype == "float16"
  short = load(checkpoint[0], mesh, dtype="bfloat16", layers=range(1))
  assert len(short.layers) == 1


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_adapters_and_their_base(shape, adapter, checkpoint, load, reads):
  mesh = None if shape is None else mesh_of(*shape)
  digests = set()
  for seed in range(2):
    folder = adapter(seed)
    plain, _ = AutoModel.from_pretrained(folder, mesh, progress=False)
    expected = digest(plain)
    del reads[:]
    assert [digest(load(folder, mesh)) for _ in range(2)] == [expected] * 2
    assert len(reads) == 1
    digests.add(expected.total)
  digests.add(digest(load(checkpoint[0], mesh)).total)
  assert len(digests) == 3


def test_an_adapter_that_resizes_the_vocabulary(adapter, load, reads):
  rows = np.random.default_rng(1).normal(size=(2, 72, 16)).astype(np.float32)
  names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
  folder = adapter(0, **dict(zip(names, rows, strict=True)))
  first, second = (load(folder, mesh_of(2, 2)) for _ in range(2))
  assert len(reads) == 1
  assert second.config.vocab_size == 72
  for one, other in zip(
    *(jax.tree.leaves(jax.tree.map(lambda x: x, m)) for m in (first, second)), strict=True
  ):
    assert one.sharding == other.sharding
  assert digest(first) == digest(second)


def test_quantised_weights(write_gguf, tmp_path, load, reads):
  path = write_gguf(tmp_path / "model.gguf")
  first, second = (load(path, dtype="bfloat16") for _ in range(2))
  assert digest(first) == digest(second)
  assert len(reads) == 1


def test_an_orbax_tree_of_which_a_file_changes(checkpoint, tmp_path, load, reads):
  convert(checkpoint[0], tmp_path / "tree", to="orbax", progress=False)
  first, second = (load(tmp_path / "tree") for _ in range(2))
  assert digest(first) == digest(second)
  assert len(reads) == 1
  row = np.asarray(first.layers[1].attn.q_proj.w[...])[:1].tobytes()
  # How many files of data there are, and what is in which, changes from save to save.
  data = next(path for path in (tmp_path / "tree").rglob("d/*") if row in path.read_bytes())
  was = data.stat()
  raw = bytearray(data.read_bytes())
  at = raw.find(row)
  raw[at : at + 4] = np.float32(7).tobytes()
  data.write_bytes(raw)
  os.utime(data, ns=(was.st_atime_ns, was.st_mtime_ns))
  assert load(tmp_path / "tree").layers[1].attn.q_proj.w[...][0, 0] == 7


def test_a_store_of_which_an_object_changes(checkpoint, tmp_path, load, reads, monkeypatch):
  for name in list(os.environ):
    if name.startswith(("GOOGLE_", "STORAGE_EMULATOR_HOST")):
      monkeypatch.delenv(name)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  files = {name: (checkpoint[0] / name).read_bytes() for name in ("config.json", "model.safetensors")}
  with StoreServer() as server:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    for name, data in files.items():
      server.put(f"bucket/mine/{name}", data)
    before = digest(load("gs://bucket/mine"))
    received = server.received("bucket/mine/model.safetensors")
    assert digest(load("gs://bucket/mine")) == before
    # The first read of a header, which is longer than this file.
    assert server.received("bucket/mine/model.safetensors") - received == len(files["model.safetensors"])
    assert len(reads) == 1
    server.put("bucket/mine/model.safetensors", files["model.safetensors"][:-4] + np.float32(7).tobytes())
    assert digest(load("gs://bucket/mine")) != before


def test_files_that_are_mapped_anyway(checkpoint, tmp_path, load, caplog):
  convert(checkpoint[0], tmp_path / "aligned", progress=False)
  load(tmp_path / "aligned")
  (note,) = [r.getMessage() for r in caplog.records if "cache_dir" in r.getMessage()]
  assert note.endswith(
    "not used, because the checkpoint's own files hold the parameters as the devices take them"
  )
  assert not (tmp_path / "cache").exists()


def test_an_address_and_a_size_that_is_none(checkpoint, tmp_path):
  with pytest.raises(SaveError, match="is an address, not a directory of this machine"):
    AutoModel.from_pretrained(checkpoint[0], cache_dir="gs://bucket/cache")
  with pytest.raises(ValueError, match="'much' is not a file size"):
    AutoModel.from_pretrained(checkpoint[0], cache_dir=tmp_path, max_cache_size="much")


def test_text_models_and_the_command(checkpoint, tmp_path, reads, capsys):
  tokenizers = pytest.importorskip("tokenizers")
  path = tmp_path / "model"
  shutil.copytree(checkpoint[0], path)
  engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"up": 0, "down": 1}, unk_token="up"))
  engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  engine.save(str(path / "tokenizer.json"))
  for _ in range(2):
    load_text_model(path, dtype="bfloat16", cache_dir=tmp_path / "cache", progress=False)
  options = ["--dtype", "bfloat16", "--cache-dir", str(tmp_path / "cache"), "--max-new-tokens", "2"]
  assert main(["generate", str(path), "up", *options]) == 0
  assert len(reads) == 1
