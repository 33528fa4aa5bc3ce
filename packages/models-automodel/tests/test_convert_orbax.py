"""`automodel convert --to orbax`, and directories that it wrote."""

import json
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx

from models_automodel import AutoModel, CheckpointError, ConfigError, SaveError
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.digest import digest
from models_automodel.verify import verify
from models_core.loading.opened import OpenedPlan
from models_core.testing import MESHES
from models_sources.testing import StoreServer


def bits(model):
  return {
    ".".join(map(str, path)): np.asarray(variable.get_value()).tobytes()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


@pytest.fixture(scope="module")
def tree(checkpoint, tmp_path_factory):
  """The model as a tree of its own names."""
  source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("orbax") / "tree"
  shutil.copytree(checkpoint[0], source, dirs_exist_ok=True)
  (source / "tokenizer.json").write_text("{}")
  (source / "generation_config.json").write_text('{"eos_token_id": 3}')
  (source / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": dict.fromkeys(checkpoint[1], "model.safetensors")})
  )
  assert main(["convert", str(source), str(directory), "--to", "orbax"]) == 0
  return directory


@pytest.mark.parametrize("mesh", [None, "explicit", "auto"])
def test_it_loads_as_its_source_does(checkpoint, tree, mesh):
  model, path = AutoModel.from_pretrained(str(tree), mesh and MESHES[mesh](), progress=False)
  source, _ = AutoModel.from_pretrained(str(checkpoint[0]), progress=False)
  assert path == str(tree)
  assert bits(model) == bits(source)
  assert model.config == source.config
  assert digest(str(tree), progress=False) == digest(str(checkpoint[0]), progress=False)


def test_what_lies_there(checkpoint, tree):
  names = {path.name for path in tree.iterdir()}
  assert {"config.json", "tokenizer.json", "generation_config.json", "manifest.ocdbt", "_METADATA"} <= names
  assert not any("safetensors" in name for name in names)
  found = ocp.StandardCheckpointer().restore(tree)
  assert sorted(found["layers"]) == ["0", "1"]
  source, _ = AutoModel.from_pretrained(str(checkpoint[0]), progress=False)
  ours = source.layers[1].attn.q_proj.w.get_value()
  assert found["layers"]["1"]["attn"]["q_proj"]["w"].tobytes() == np.asarray(ours).tobytes()


def test_and_back(checkpoint, tree, tmp_path):
  convert(str(tree), tmp_path / "back", progress=False)
  convert(str(checkpoint[0]), tmp_path / "same", progress=False)
  for name in ("model.safetensors", "config.json"):
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
  assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
  convert(str(tree), tmp_path / "again", to="orbax", progress=False)
  assert digest(str(tmp_path / "again"), progress=False) == digest(str(tree), progress=False)


def test_another_dtype(checkpoint, tmp_path):
  assert (
    main(["convert", str(checkpoint[0]), str(tmp_path / "out"), "--to", "orbax", "--dtype", "bfloat16"]) == 0
  )
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
  norm = ocp.StandardCheckpointer().restore(tmp_path / "out")["final_norm"]["w"]
  assert norm.tobytes() == checkpoint[1]["model.norm.weight"].astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize(
  "wrap",
  [
    nnx.to_pure_dict,
    lambda state: state,
    lambda state: {"params": state, "step": np.int32(7), "opt_state": {"mu": np.zeros(3, np.float32)}},
  ],
  ids=["arrays", "variables", "a training run"],
)
def test_what_orbax_saved_of_a_model_of_ours(checkpoint, wrap, tmp_path):
  model, _ = AutoModel.from_pretrained(str(checkpoint[0]), progress=False)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(tmp_path / "tree", wrap(nnx.state(model, nnx.Param)))
  (tmp_path / "tree" / "config.json").write_bytes((checkpoint[0] / "config.json").read_bytes())
  again, _ = AutoModel.from_pretrained(str(tmp_path / "tree"), progress=False)
  assert bits(again) == bits(model)
  convert(str(tmp_path / "tree"), tmp_path / "out", to="orbax", progress=False)
  assert digest(str(tmp_path / "out"), progress=False) == digest(model)
  assert not {"step", "opt_state", "params"} & ocp.StandardCheckpointer().restore(tmp_path / "out").keys()


def test_from_the_hub(checkpoint, tree, hub, tmp_path):
  files = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
  hub.add("some/tree", files)
  model, _ = AutoModel.from_pretrained("some/tree", progress=False)
  convert("some/tree", tmp_path / "out", progress=False)
  assert digest(model) == digest(str(checkpoint[0]), progress=False)
  assert digest(str(tmp_path / "out"), progress=False) == digest(model)


def test_from_a_store(checkpoint, tree, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
  with StoreServer() as store:
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
      monkeypatch.setenv(name, store.endpoint)
    monkeypatch.setenv("GCE_METADATA_ROOT", store.endpoint.removeprefix("http://"))
    for path in tree.rglob("*"):
      if path.is_file():
        store.put(f"bucket/tree/{path.relative_to(tree).as_posix()}", path.read_bytes())
    for naming in ("huggingface", "orbax"):
      convert("gs://bucket/tree", tmp_path / naming, to=naming, progress=False)
  for naming in ("huggingface", "orbax"):
    found = digest(str(tmp_path / naming), progress=False)
    assert found == digest(str(checkpoint[0]), progress=False)
    assert (tmp_path / naming / "tokenizer.json").read_text() == "{}"
  assert not (tmp_path / "home").exists()


def test_a_cut_of_layers(tree):
  plan = AutoModel.plan(str(tree), layers=range(1), progress=False)
  assert {name.split(".")[1] for name in plan.model.parameters if name.startswith("layers.")} == {"0"}
  assert any("layers from 1 on" in reason for _, reason in plan.ignored)


def test_a_tree_that_does_not_fit_is_named(tree, tmp_path):
  shutil.copytree(tree, tmp_path / "tree")
  raw = json.loads((tree / "config.json").read_text())
  (tmp_path / "tree" / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 3}))
  with pytest.raises(CheckpointError, match=r"layers\.2\.input_layernorm\.w is missing"):
    verify(tmp_path / "tree")
  (tmp_path / "tree" / "config.json").write_text(json.dumps(raw | {"intermediate_size": 25}))
  with pytest.raises(CheckpointError, match="has shape"):
    verify(tmp_path / "tree")


def test_one_parameter_is_read_at_a_time(checkpoint, tmp_path, monkeypatch):
  asked = []
  read_all = OpenedPlan.read_all

  def counted(opened, names=None):
    asked.append(list(names))
    return read_all(opened, asked[-1])

  monkeypatch.setattr(OpenedPlan, "read_all", counted)
  convert(str(checkpoint[0]), tmp_path / "out", to="orbax", progress=False)
  assert all(len(names) == 1 for names in asked)
  assert len(asked) == len(checkpoint[1])


def test_refusals(checkpoint, tree, tmp_path, capsys):
  with pytest.raises(
    ConfigError,
    match="max_shard_size is '1GB', but orbax checkpoints are not split into files by size: leave it out",
  ):
    convert(str(checkpoint[0]), tmp_path / "out", to="orbax", max_shard_size="1GB")
  with pytest.raises(SaveError, match="overwrite=True"):
    convert(str(checkpoint[0]), tree, to="orbax", progress=False)
  with pytest.raises(ConfigError, match="choose one of huggingface, orbax"):
    convert(str(tree), tmp_path / "out", to="gguf")
  with pytest.raises(SystemExit):
    main(["convert", str(tree), str(tree), "--to", "gguf"])
  assert "invalid choice: 'gguf'" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_what_has_no_place_in_the_tree_is_said(edit_config, checkpoint, tmp_path, caplog):
  directory = edit_config()
  more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
  safetensors.numpy.save_file(checkpoint[1] | more, directory / "model.safetensors")
  convert(str(directory), tmp_path / "same", progress=False)
  assert not caplog.messages
  convert(str(directory), tmp_path / "out", to="orbax", progress=False)
  assert "1 tensor not loaded: the RoPE frequencies follow from the configuration" in caplog.text


def test_in_the_place_of_its_source(checkpoint, tmp_path):
  shutil.copytree(checkpoint[0], tmp_path / "model")
  before = digest(str(checkpoint[0]), progress=False)
  convert(str(tmp_path / "model"), tmp_path / "model", to="orbax", overwrite=True, progress=False)
  assert not (tmp_path / "model" / "model.safetensors").exists()
  assert digest(str(tmp_path / "model"), progress=False) == before
  convert(str(tmp_path / "model"), tmp_path / "model", overwrite=True, progress=False)
  names = lambda directory: sorted(path.name for path in directory.iterdir())
  assert names(tmp_path / "model") == names(checkpoint[0])
  assert digest(str(tmp_path / "model"), progress=False) == before


def test_verify_reads_all_numbers(checkpoint, tree, tmp_path, capsys):
  assert main(["verify", str(tree), "--values"]) == 0
  assert "parameters" in capsys.readouterr().out
  (source := tmp_path / "source").mkdir()
  (source / "config.json").write_bytes((checkpoint[0] / "config.json").read_bytes())
  (broken := checkpoint[1]["model.layers.0.mlp.up_proj.weight"].copy())[3, 5] = np.inf
  safetensors.numpy.save_file(
    checkpoint[1] | {"model.layers.0.mlp.up_proj.weight": broken}, source / "model.safetensors"
  )
  convert(str(source), tmp_path / "out", to="orbax", progress=False)
  verify(tmp_path / "out")
  with pytest.raises(
    CheckpointError, match=r"layers\.0\.mlp\.up_proj\.w: 1 of \d+ numbers are NaN or infinite"
  ):
    verify(tmp_path / "out", values=True)


def test_verify_compares_checksums(tree, tmp_path, capsys):
  shutil.copytree(tree, tmp_path / "tree")
  assert main(["verify", str(tmp_path / "tree"), "--sha256"]) == 0
  (sums := tmp_path / "sums.txt").write_text(capsys.readouterr().out)
  assert main(["verify", str(tmp_path / "tree"), "--checksums", str(sums)]) == 0
  data = max((tmp_path / "tree" / "d").iterdir(), key=lambda path: path.stat().st_size)
  data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
  assert main(["verify", str(tmp_path / "tree"), "--checksums", str(sums)]) == 1
  assert f"d/{data.name} has SHA-256" in capsys.readouterr().err
  data.unlink()
  assert main(["verify", str(tmp_path / "tree"), "--checksums", str(sums)]) == 1
  assert main(["verify", str(tmp_path / "tree"), "--values"]) == 1
  assert "cannot be read" in capsys.readouterr().err
