"""Which part of a repository, a directory or a store is loaded, and what is said where that is not clear."""

import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

from models_automodel import AutoModel, CheckpointError, ConfigError, ModelNameError, SourceFilesError, Where
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.text import load_tokenizer
from models_automodel.verify import verify
from models_core.formats import SAFETENSORS, LocalFiles, read_safetensors
from models_sources.testing import StoreServer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 4976698672\n"


def same(a, b):
  equal = jax.tree.map(lambda x, y: bool((x == y).all()), nnx.state(a), nnx.state(b))
  return all(jax.tree.leaves(equal))


def load(place, **arguments):
  return AutoModel.from_pretrained(place, progress=False, **arguments)


@pytest.fixture
def store(monkeypatch):
  for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
    monkeypatch.delenv(name)
  with StoreServer() as server:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    yield server


@pytest.fixture
def ggufs(write_gguf, tmp_path):
  """Three GGUF files, one of them in a folder, and the one that is meant."""
  names = ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "BF16/m-BF16.gguf")
  content = write_gguf(tmp_path / "m.gguf").read_bytes()
  return dict.fromkeys(names, content), load(tmp_path / "m.gguf")[0]


def contents(directory):
  return {name: (directory / name).read_bytes() for name in ("config.json", "model.safetensors")}


class TestHub:
  @pytest.mark.parametrize(
    ("place", "arguments"),
    [
      ("org/m:Q8_0", {}),
      ("org/m/m-Q8_0.gguf", {}),
      ("org/m", {"file": "*Q8_0*"}),
      ("org/m", {"file": "m-Q8_0.gguf"}),
      ("org/m:BF16", {}),
      ("org/m/BF16", {}),
      ("org/m/BF16:BF16", {}),
      ("org/m", {"subfolder": "BF16"}),
    ],
    ids=range(8),
  )
  def test_a_gguf_file(self, hub, ggufs, place, arguments):
    hub.add("org/m", ggufs[0])
    model, path = load(place, **arguments)
    assert same(model, ggufs[1])
    # The path names what was loaded, for the tokenizer and for a base.
    assert same(load(path)[0], model)
    fetched = [
      name for _, _, names in os.walk(os.path.dirname(path)) for name in names if name.endswith(".gguf")
    ]
    assert len(fetched) == 1

  def test_several_are_listed(self, hub, ggufs):
    hub.add("org/m", ggufs[0])
    with pytest.raises(
      CheckpointError, match=r"several checkpoints \(m-Q4_K_M.gguf, m-Q8_0.gguf\): choose one with"
    ):
      load("org/m")
    with pytest.raises(
      CheckpointError, match=r"'Q5_0' names none: there are BF16/m-BF16.gguf, m-Q4_K_M.gguf, m-Q8"
    ):
      load("org/m:Q5_0")

  @pytest.mark.parametrize(
    ("place", "arguments"),
    [
      ("me/run", {"subfolder": "checkpoint-500"}),
      ("me/run/checkpoint-500", {}),
      ("me/run/checkpoint-500/", {}),
    ],
    ids=range(3),
  )
  def test_a_folder(self, hub, checkpoint, place, arguments):
    inner = {f"checkpoint-500/{name}": data for name, data in contents(checkpoint[0]).items()}
    hub.add("me/run", {"README.md": b"x", **inner})
    model, path = load(place, **arguments)
    assert same(model, load(checkpoint[0])[0])
    assert path.endswith("/checkpoint-500")
    with pytest.raises(
      CheckpointError, match=r"no weights at the top level, but in a folder.*'checkpoint-500'"
    ):
      load("me/run")
    with pytest.raises(
      CheckpointError, match="no folder checkpoint-50: the folders with a checkpoint are checkpoint-500"
    ):
      load("me/run/checkpoint-50")

  def test_a_folder_may_be_a_base(self, hub, checkpoint, tmp_path):
    hub.add("me/run", {f"step/{name}": data for name, data in contents(checkpoint[0]).items()})
    model, path = load("me/run/step")
    AutoModel.save_pretrained(model, tmp_path / "out", base=path, progress=False)
    assert same(load(tmp_path / "out")[0], model)

  def test_an_unknown_argument_of_transformers_names_ours(self, hub, ggufs):
    hub.add("org/one", {"m-Q8_0.gguf": ggufs[0]["m-Q8_0.gguf"]})
    with pytest.raises(TypeError, match="'gguf_file': did you mean 'file'"):
      load("org/one", gguf_file="m-Q8_0.gguf")


class TestLocal:
  def test_any_file_of_a_checkpoint_stands_for_it(self, checkpoint):
    model, path = load(checkpoint[0] / "model.safetensors")
    assert same(model, load(checkpoint[0])[0])
    assert path == str(checkpoint[0])

  @pytest.mark.parametrize("arguments", [{"subfolder": "step/5"}, {}])
  def test_a_folder(self, checkpoint, tmp_path, arguments):
    (tmp_path / "step").mkdir()
    os.symlink(checkpoint[0], tmp_path / "step" / "5")
    model, path = load(tmp_path if arguments else tmp_path / "step" / "5", **arguments)
    assert same(model, load(checkpoint[0])[0])
    assert path == str(tmp_path / "step" / "5")

  def test_a_quantisation(self, ggufs, tmp_path):
    (tmp_path / "d" / "BF16").mkdir(parents=True)
    for name, data in ggufs[0].items():
      (tmp_path / "d" / name).write_bytes(data)
    model, path = load(f"{tmp_path}/d:q8_0")
    assert same(model, ggufs[1])
    assert path == f"{tmp_path}/d/m-Q8_0.gguf"

  def test_a_variant(self, checkpoint, edit_config):
    directory = edit_config()
    (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")
    (directory / "model.safetensors").write_bytes(b"the other one")
    assert same(load(directory, variant="fp16")[0], load(checkpoint[0])[0])

  def test_config_json_may_name_the_weights(self, edit_config, checkpoint, tmp_path):
    directory = edit_config(transformers_weights="model.x.safetensors")
    (directory / "model.safetensors").rename(directory / "model.x.safetensors")
    (directory / "model.safetensors").write_bytes(b"the other one")
    model, path = load(directory)
    assert same(model, load(checkpoint[0])[0])
    (directory / "model.safetensors").unlink()
    AutoModel.save_pretrained(model, tmp_path / "out", base=path, progress=False)
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert same(load(tmp_path / "out")[0], model)

  def test_every_call_and_command_takes_them(self, edit_config, tmp_path, capsys):
    directory = edit_config()
    (directory / "a").mkdir()
    for name in ("config.json", "model.safetensors"):
      (directory / name).rename(directory / "a" / name)
    (directory / "a" / "model.safetensors").rename(directory / "a" / "model.x.safetensors")
    (directory / "a" / "model.safetensors").write_bytes(b"the other one")
    for chosen in ({"variant": "x"}, {"file": "*.x.*"}):
      place = {"subfolder": "a", **chosen}
      assert verify(directory, **place).files == ("model.x.safetensors",)
      assert AutoModel.plan(Where(str(directory), **place)).files == ("model.x.safetensors",)
      convert(directory, tmp_path / "out", overwrite=True, progress=False, **place)
      options = [text for name, value in place.items() for text in (f"--{name}", value)]
      for command in ("plan", "verify"):
        assert main([command, str(directory), *options]) == 0
    assert main(["convert", str(directory), str(tmp_path / "out2"), *options]) == 0
    assert same(load(tmp_path / "out")[0], load(tmp_path / "out2")[0])
    with pytest.raises(CheckpointError, match="header claims"):
      load(directory, subfolder="a")

  def test_a_kept_result_belongs_to_its_part(self, edit_config, checkpoint, tmp_path):
    directory, kept = edit_config(), tmp_path / "kept"
    load(directory, file="model.safetensors", intermediate_ckpt_dir=kept)
    load(directory, file="model.safetensors", intermediate_ckpt_dir=kept)
    with pytest.raises(ConfigError, match="holds the result of another call"):
      load(directory, variant="x", intermediate_ckpt_dir=kept)


def test_a_store(store, ggufs, checkpoint):
  for name, data in ggufs[0].items():
    store.put(f"bucket/dir/{name}", data)
  for name, data in contents(checkpoint[0]).items():
    store.put(f"bucket/runs/5/{name}", data)
  for place, arguments in (("gs://bucket/dir:Q8_0", {}), ("gs://bucket/dir", {"file": "*q8*"})):
    model, path = load(place, **arguments)
    assert same(model, ggufs[1])
    assert path == "gs://bucket/dir/m-Q8_0.gguf"
    assert same(load(path)[0], model)
  expected = load(checkpoint[0])[0]
  assert same(load("gs://bucket/runs", subfolder="5")[0], expected)
  assert same(load("gs://bucket/runs/5/model.safetensors")[0], expected)


class TestPaths:
  @pytest.mark.parametrize("place", ["./none", "../none", "~/none", "/none/none", "a\\b", "here/is/none"])
  def test_a_path_that_does_not_exist_is_no_repository(self, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "here" / "is").mkdir(parents=True)
    with pytest.raises(SourceFilesError, match="there is no file or directory "):
      load(place)

  def test_an_organisation_that_is_a_directory_here_too(self, hub, checkpoint, tmp_path, monkeypatch):
    """The directory says nothing against a repository, but comes first in the message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    hub.add("org/model", contents(checkpoint[0]))
    assert same(load("org/model")[0], load(checkpoint[0])[0])
    with pytest.raises(SourceFilesError, match="there is no file or directory org/none, and on the hub: "):
      load("org/none")


class TestConfiguration:
  def test_a_gguf_file_states_its_own(self, write_gguf, tmp_path):
    alone, both = write_gguf(tmp_path / "alone.gguf"), tmp_path / "both"
    both.mkdir()
    (both / "m.gguf").write_bytes(alone.read_bytes())
    (both / "config.json").write_text('{"model_type": "llama"}')
    assert same(load(both)[0], load(alone)[0])
    assert (
      "config.json is not read: the GGUF file states its own configuration" in AutoModel.plan(both).notes()
    )

  @pytest.mark.parametrize("name", ["Llama-3.2-1B", "llama-3.1-8b-instruct"])
  def test_a_known_name_without_config_json_says_so_first(self, checkpoint, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes((checkpoint[0] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError) as caught:
      load(tmp_path / name)
    first, second, *_ = caught.value.problems
    assert first.startswith("there is no config.json, and the preset of the name ")
    assert "put the config.json beside the weights" in first
    assert second.startswith("model.embed_tokens.weight has shape (64, 16), but the parameter")

  @pytest.mark.parametrize(
    ("target", "what"), [("nowhere", "which does not exist"), ("config.json", "that leads back to itself")]
  )
  def test_a_config_json_that_is_a_dead_link(self, edit_config, target, what):
    directory = edit_config()
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(target)
    with pytest.raises(ConfigError, match=f"config.json is a link .*{what}"):
      load(directory)

  def test_an_unknown_name_without_config_json_says_so_first(self, checkpoint, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((checkpoint[0] / "model.safetensors").read_bytes())
    with pytest.raises(ModelNameError, match=f"^{tmp_path} has no config.json"):
      load(tmp_path)


class TestProblems:
  def test_one_truncated_shard_is_one_problem(self, checkpoint, tmp_path, capsys):
    model, _ = load(checkpoint[0])
    AutoModel.save_pretrained(model, tmp_path / "m", base=checkpoint[0], max_shard_size="4KB", progress=False)
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    os.truncate(shard, os.path.getsize(shard) - 1)
    assert main(["plan", str(tmp_path / "m")]) == 1
    said = capsys.readouterr().err
    assert ": 1 problem\n" in said
    assert f"{shard.name}: the file has" in said

  @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
  def test_lfs_pointers_are_told(self, edit_config, name):
    pytest.importorskip("tokenizers")
    directory = edit_config()
    (directory / name).write_text(POINTER)
    action = load_tokenizer if name == "tokenizer.json" else load
    with pytest.raises(
      (CheckpointError, ConfigError), match=f"{name} is a Git LFS pointer, not the file: run `git lfs pull`"
    ):
      action(directory)


def test_a_base_without_the_prefix_gets_its_own_names_back(checkpoint, edit_config, tmp_path):
  """Embedding models are saved from the base class."""
  from safetensors.numpy import load_file, save_file

  directory = edit_config(tie_word_embeddings=True)
  tensors = load_file(directory / "model.safetensors")
  tensors.pop("lm_head.weight")
  bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
  save_file(bare, directory / "model.safetensors")
  model, path = load(directory)
  np.testing.assert_array_equal(np.asarray(model.embedder.input_embedding[...]), bare["embed_tokens.weight"])
  AutoModel.save_pretrained(model, tmp_path / "with", base=path, progress=False)
  AutoModel.save_pretrained(model, tmp_path / "without", progress=False)
  assert set(read_safetensors(LocalFiles(str(tmp_path / "with"))).tensors) == set(bare)
  assert set(read_safetensors(LocalFiles(str(tmp_path / "without"))).tensors) == set(tensors)
  for name in ("with", "without"):
    assert same(load(tmp_path / name)[0], model)
  assert json.loads((tmp_path / "with" / "config.json").read_text())["tie_word_embeddings"] is True
  assert AutoModel.plan(directory).checkpoint.format is SAFETENSORS
