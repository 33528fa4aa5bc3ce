"""Google's Orbax trees through AutoModel: found, named or recognised by their shapes, from a directory and from Kaggle."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx

from models_automodel import AutoModel, CheckpointError, ConfigError, ModelSource, SourceFilesError
from models_core.dummy_model_creator import create_dummy_model
from models_core.formats import LocalFiles, read_orbax
from models_core.loading import abstract_model
from models_core.weights import letter_sizes, pieces, put_back
from models_gemma.gemma import FAMILY
from models_gemma.gemma.model import AttentionType, Gemma, ModelConfig
from models_gemma.gemma3 import FAMILY as FAMILY_3
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_sources import kaggle
from models_sources.retry import Policy
from models_sources.testing import StoreServer
from models_sources.testing_kaggle import KaggleServer

HANDLE = "google/gemma-2/flax/gemma2-2b-it"
CONFIG = ModelConfig(
  num_layers=2,
  num_embed=32,
  embed_dim=16,
  hidden_dim=24,
  num_heads=2,
  head_dim=4,
  num_kv_heads=1,
  norm_eps=1e-6,
  rope_theta=700.0,
  query_pre_attn_scalar=7,
  attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
  sliding_window_size=3,
  final_logit_softcap=3.0,
  attn_logits_soft_cap=2.0,
  use_post_attn_norm=True,
  use_post_ffw_norm=True,
)


def tensors_of(model_class, config, table):
  """Shapes of all tensors of a tree, and the pieces that fill them."""
  found = {}
  for name, parameter in abstract_model(model_class, config).parameters.items():
    ((row, at),) = [(row, at) for row in table.rows if (at := row.match(name)) is not None]
    for piece in pieces(row, row.forms[0], at, parameter.shape, letter_sizes(config)):
      found.setdefault(piece.tensor, (piece.shape, []))[1].append((name, piece))
  return found


@pytest.fixture(scope="module")
def model():
  return create_dummy_model(Gemma, CONFIG, scale=0.3)


@pytest.fixture(scope="module")
def tree(model, tmp_path_factory):
  """A directory with a tree in a folder, beside a tokenizer."""
  values = {}
  for name, (shape, filled) in tensors_of(Gemma, CONFIG, FAMILY.weights["orbax"]).items():
    tensor = np.zeros(shape, np.float32)
    for parameter, piece in filled:
      value = model
      for part in parameter.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
      put_back(np.asarray(value.get_value())[piece.target], piece, tensor)
    key, _, leaf = name.rpartition(".")
    values.setdefault(key, {})[leaf] = tensor
  directory = tmp_path_factory.mktemp("tree")
  ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(directory / "gemma2-2b-it", values)
  (directory / "tokenizer.model").write_bytes(b"pieces")
  return directory


def write_shapes(directory, model_class, config, table):
  """A tree of full size whose arrays hold nothing: what was never written takes no room."""
  base = {"driver": "file", "path": f"{directory}/"}
  for name, (shape, _) in tensors_of(model_class, config, table).items():
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    ts.open({"driver": "zarr", "kvstore": kvstore}, create=True, dtype=ts.bfloat16, shape=shape).result()


def test_a_tree_beside_a_configuration(tree, model, tmp_path):
  (tmp_path / "gemma2-2b-it").symlink_to(tree / "gemma2-2b-it")
  (tmp_path / "config.json").write_text(json.dumps(FAMILY.write_config(CONFIG)))
  loaded, path = AutoModel.from_pretrained(str(tmp_path))
  assert path == str(tmp_path)
  np.testing.assert_array_equal(
    loaded.embedder.input_embedding.get_value(), model.embedder.input_embedding.get_value()
  )


def test_a_name_decides_and_shapes_must_agree(tree):
  with pytest.raises(CheckpointError, match=r"layer_2/pre_attention_norm\.scale is missing"):
    AutoModel.plan(HANDLE, model_source="local", model_path=tree)


def test_a_fine_tuned_model_is_recognised_by_its_shapes(tmp_path):
  small = Gemma3Config.gemma3_270m()
  write_shapes(tmp_path / "my-own", Gemma3, small, FAMILY_3.weights["orbax"])
  plan = AutoModel.plan(str(tmp_path / "my-own"))
  assert plan.num_parameters == 268_098_176
  assert plan.checkpoint.format.naming == "orbax"
  assert len(plan.model.parameters) == 3 + small.num_layers * 13 - 1


def test_shapes_of_no_published_size_are_refused(tree):
  with pytest.raises(
    ConfigError,
    match=r"no preset of .*gemma.* has its shapes: put the config\.json beside it, or pass config=",
  ):
    AutoModel.plan(str(tree))
  plan = AutoModel.plan(str(tree), config=CONFIG)
  assert plan.model.parameters["embedder.input_embedding"].shape == (32, 16)


@pytest.fixture
def server(monkeypatch, tmp_path, tree):
  with KaggleServer() as found:
    for name, value in found.environment.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kaggle, "POLICY", Policy(sleep=lambda seconds: None))
    files = {p.relative_to(tree).as_posix(): p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    found.add_version(HANDLE, files)
    yield found


@pytest.mark.parametrize("model_id", [HANDLE, "google/gemma-2-2b-it", f"{HANDLE}/1"])
def test_kaggle(server, model, tmp_path, model_id):
  loaded, path = AutoModel.from_pretrained(
    model_id, model_source=ModelSource.KAGGLE, model_download_path=str(tmp_path / "cache"), config=CONFIG
  )
  assert path == str(tmp_path / "cache/models" / HANDLE / "1")
  assert (pathlib.Path(path) / "gemma2-2b-it/_METADATA").exists()
  np.testing.assert_array_equal(
    loaded.layers[1].attn.k_proj.w.get_value(), model.layers[1].attn.k_proj.w.get_value()
  )


def test_a_tree_in_a_store_is_read_where_it_lies(tree, model, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
  with StoreServer() as store:
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
      monkeypatch.setenv(name, store.endpoint)
    monkeypatch.setenv("GCE_METADATA_ROOT", store.endpoint.removeprefix("http://"))
    root = tree / "gemma2-2b-it"
    for file in root.rglob("*"):
      if file.is_file():
        store.put(f"data/checkpoints/gemma2-2b-it/{file.relative_to(root)}", file.read_bytes())
    address = "gs://data/checkpoints/gemma2-2b-it"
    loaded, path = AutoModel.from_pretrained(
      "google/gemma-2-2b-it", model_source=ModelSource.GCS, model_path=address, config=CONFIG
    )
  assert path == address
  assert not [file for file in tmp_path.rglob("*") if file.is_file()]
  np.testing.assert_array_equal(
    loaded.embedder.input_embedding.get_value(), model.embedder.input_embedding.get_value()
  )


def test_a_licence_that_is_not_accepted(server, tmp_path):
  server.add_version("google/gemma/flax/2b", {"2b/_METADATA": b"{}"}, licensed=True)
  with pytest.raises(SourceFilesError, match=r"accept the licence at .*models/google/gemma"):
    AutoModel.plan("google/gemma-2b", model_source="kaggle", model_download_path=str(tmp_path))


def test_a_tree_without_data_says_so(tmp_path):
  (tmp_path / "_METADATA").write_text("[]")
  with pytest.raises(CheckpointError, match="not the metadata of an Orbax checkpoint"):
    read_orbax(LocalFiles(str(tmp_path)))


class TestIntermediate:
  def load(self, tree, directory, **options):
    return AutoModel.from_pretrained(
      "google/gemma-2b",
      model_source="local",
      model_path=tree,
      intermediate_ckpt_dir=directory,
      rng_seed=42,
      config=CONFIG,
      **options,
    )

  def test_the_second_call_reads_what_the_first_one_kept(self, tree, model, tmp_path):
    first, path = self.load(tree, tmp_path / "kept")
    again, kept = self.load(tree, tmp_path / "kept")
    assert (path, kept) == (str(tree), str(tmp_path / "kept"))
    for found in (first, again):
      for ours, theirs in zip(
        jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(model)), strict=True
      ):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]
    plain, _ = AutoModel.from_pretrained(kept)
    assert plain.config == CONFIG

  def test_another_call_is_refused(self, tree, tmp_path):
    self.load(tree, tmp_path / "kept")
    with pytest.raises(
      ConfigError, match=r"kept holds the result of another call, with dtype=None instead of 'bfloat16'"
    ):
      self.load(tree, tmp_path / "kept", dtype="bfloat16")

  def test_a_foreign_directory_is_refused_and_not_touched(self, tree, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"no readable origin\.json; it stays as it is"):
      self.load(tree, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

  def test_a_broken_one_is_named(self, tree, tmp_path):
    _, _ = self.load(tree, tmp_path / "kept")
    weights = tmp_path / "kept/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"kept.*\n.*truncated"):
      self.load(tree, tmp_path / "kept")
