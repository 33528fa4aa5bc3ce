"""Checkpoints that go up to the hub, come back, and are compared with what the hub states."""

import os
import shutil

import pytest
from flax import nnx

from models_automodel import (
  AutoModel,
  CheckpointError,
  ModelNameError,
  SaveError,
  SourceFilesError,
  Where,
  digest,
  push_to_hub,
  upload,
)
from models_automodel.cli import main
from models_automodel.verify import check_hub

# Of the hub's client, to its own HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def writable(hub, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  hub.writers = frozenset({"mine"})
  monkeypatch.setenv("HF_TOKEN", "mine")
  return hub


@pytest.fixture
def directory(checkpoint, tmp_path):
  """A copy of the tiny checkpoint, with a file that stays here."""
  copy = tmp_path / "copy"
  shutil.copytree(checkpoint[0], copy)
  (copy / ".note").write_text("private")
  return copy


def same(model, other):
  ours, theirs = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (model, other))
  return all((a[1][...] == b[1][...]).all() for a, b in zip(ours, theirs, strict=True))


class TestUpload:
  def test_what_goes_up_comes_back(self, writable, directory):
    commit = upload(directory, "me/tiny", base_model="org/base", progress=False)
    files = writable.files("me/tiny")
    assert files.keys() == {".gitattributes", "README.md", *os.listdir(directory)} - {".note"}
    for address in ("me/tiny", "hf://me/tiny", f"hf://models/me/tiny@{commit}"):
      model, _ = AutoModel.from_pretrained(address, progress=False)
      assert same(model, AutoModel.from_pretrained(directory, progress=False)[0])
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: models-automodel\n")
    assert "\nbase_model: org/base\n" in card
    assert f"\n{digest(directory)}\n" in card
    assert 'AutoModel.from_pretrained("me/tiny")' in card

  def test_a_card_is_kept(self, writable, directory):
    (directory / "README.md").write_text("# Mine\n")
    upload(directory, "me/tiny", progress=False)
    assert writable.files("me/tiny")["README.md"] == b"# Mine\n"

  def test_a_model_in_memory_replaces_shards(self, writable, directory):
    model, path = AutoModel.from_pretrained(directory, progress=False)
    push_to_hub(model, "me/tiny", base=path, max_shard_size="8KB", progress=False)
    sharded = writable.files("me/tiny")
    assert "model.safetensors.index.json" in sharded
    assert sum(name.endswith(".safetensors") for name in sharded) > 1
    push_to_hub(model, "me/tiny", base=path, progress=False)
    assert [n for n in writable.files("me/tiny") if "safetensors" in n] == ["model.safetensors"]
    assert same(AutoModel.from_pretrained("hf://me/tiny", progress=False)[0], model)

  def test_what_is_refused_before_anything_is_sent(self, writable, directory, tmp_path):
    with pytest.raises(SaveError, match="is no directory of files that can be uploaded"):
      upload(directory / "model.safetensors", "me/tiny")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(CheckpointError):
      upload(directory, "me/tiny")
    assert writable.requests == []

  def test_without_the_right_to_write(self, writable, directory):
    with pytest.raises(SourceFilesError, match="does not let this token write to me/tiny"):
      upload(directory, "me/tiny", token="theirs", progress=False)

  def test_the_command(self, writable, directory, capsys):
    assert main(["upload", str(directory), "me/tiny", "--message", "first"]) == 0
    commit = capsys.readouterr().out.split()[-1]
    assert main(["verify", str(directory), "--hub", "me/tiny", "--revision", commit]) == 0
    assert f"all files are those of me/tiny at commit {commit}\n" in capsys.readouterr().out
    (directory / "config.json").write_bytes(b" " + (directory / "config.json").read_bytes())
    assert main(["verify", str(directory), "--hub", "me/tiny"]) == 1
    assert f"config.json differs from that of me/tiny at commit {commit}" in capsys.readouterr().err


class TestCheckHub:
  def test_hashes_of_the_hub(self, hub, directory):
    (directory / ".note").unlink()
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    commit = hub.add("org/model", files)
    hub.requests.clear()
    assert check_hub(directory, "org/model") == commit
    assert len(hub.requests) == 1
    hub.add("org/model", files | {"model.safetensors": b"other", "more.safetensors": b""})
    (directory / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
      check_hub(directory, "org/model")
    assert [problem.partition(" of org")[0] for problem in caught.value.problems] == [
      next(p for p in caught.value.problems if p.startswith("extra.json is not in org/model")),
      "model.safetensors differs from that",
      "more.safetensors",
    ]


class TestAddresses:
  @pytest.mark.parametrize(
    ("address", "model_id", "revision"),
    [
      ("hf://org/repo", "org/repo", None),
      ("hf://models/org/repo", "org/repo", None),
      ("hf://org/repo@v1.0", "org/repo", "v1.0"),
      ("hf://org/repo@v1/folder/model.gguf", "org/repo/folder/model.gguf", "v1"),
      ("hf://org/repo:Q8_0", "org/repo:Q8_0", None),
    ],
  )
  def test_parts(self, address, model_id, revision):
    where = Where.of(address)
    assert (where.model_id, where.revision, where.source) == (model_id, revision, "huggingface")
    assert Where.of("name", model_path=address) == where

  @pytest.mark.parametrize("address", ["hf://org", "hf://datasets/org/data", "hf://", "hf://org/repo@"])
  def test_what_names_no_model(self, address):
    with pytest.raises(ModelNameError, match="names no model: write hf://org/repo"):
      AutoModel.from_pretrained(address)

  def test_two_revisions(self):
    with pytest.raises(ModelNameError, match="are two revisions"):
      Where.of("hf://org/repo@a", revision="b")

  def test_saving_in_place_says_what_to_do(self, directory):
    model, _ = AutoModel.from_pretrained(directory, progress=False)
    with pytest.raises(SaveError, match=r"save to a directory, then `models_automodel\.upload` it"):
      AutoModel.save_pretrained(model, "hf://me/tiny")
