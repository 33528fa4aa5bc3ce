"""Saving Orbax trees: what Orbax restores, cells, forms, what comes along, and directories that stay whole."""

import dataclasses
import errno
import itertools
import json
import os
import resource
import subprocess
import sys
import threading

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError, ConfigError, SaveError
from models_core.extras import MissingExtraError
from models_core.family import Family
from models_core.formats.files import LocalFiles
from models_core.formats.gguf import GGUF
from models_core.formats.orbax import ORBAX, read_orbax
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import orbax_writer
from models_core.saving.base import Base
from models_core.saving.orbax_saver import save_parameters_to_orbax
from models_core.saving.orbax_writer import cell_shape
from models_core.weights.table import Form, Ignored, WeightTable

from ..toys import made_of

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Config:
  wide: bool = False


def family(model_class=object, **weights):
  return Family(
    name="tiny",
    model_types=("tiny",),
    model_class=model_class,
    config_class=Config,
    read_config=lambda raw: Config(raw["wide"]),
    write_config=lambda config: {"model_type": "tiny", "wide": config.wide},
    weights=weights,
  )


def random(*shape, dtype=BF16):
  return np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)


FLAT = {
  "embed.w": random(6, 4),
  "layers.0.q": random(2, 4, 4),
  "layers.1.q": random(2, 4, 4) + BF16.type(1),
  "layers.1.zeros": np.zeros((3, 5), np.float32),
  "steps": np.int32(3),
  "empty": np.zeros((0, 4), np.float32),
}
# A fused array, one whose axes are turned, and two layouts under one name.
FUSED = WeightTable(
  ("layers.{i}.gate", [Form("layer_{i}/gating.w", "0/2 f d -> f d"), Form("layer_{i}/gating.w", "0/2 d f -> f d", lambda c: c.wide)]),
  ("layers.{i}.up", [Form("layer_{i}/gating.w", "1/2 f d -> f d"), Form("layer_{i}/gating.w", "1/2 d f -> f d", lambda c: c.wide)]),
  ("out", "top/out.w", "n h d -> d n h"),
  ("rows", "top/rows.w", "(n h) d -> n h d"),
  ignored=[Ignored("tower.**", "no part of the model"), Ignored("opt_state.**", "training", repeated=False)],
)  # fmt: skip
PARAMETERS = {
  "layers.0.gate": random(10, 6),
  "layers.0.up": random(10, 6) * BF16.type(2),
  "out": random(6, 3, 5),
  "rows": random(3, 5, 6),
}


def save(parameters, directory, table=None, config=Config(), **options):
  weights = {"huggingface": WeightTable()} | ({"orbax": table} if table else {})
  save_parameters_to_orbax(
    parameters,
    parameters.__getitem__,
    directory,
    family=family(made_of(parameters), **weights),
    config=config,
    **options,
  )


def restored(directory):
  """By Orbax, as a flat dictionary."""
  tree = ocp.StandardCheckpointer().restore(directory)
  flat, _ = jax.tree.flatten_with_path(tree)
  return {".".join(key.key for key in path): leaf for path, leaf in flat}


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


def read(directory):
  """By our own reader."""
  checkpoint = read_orbax(LocalFiles(str(directory)))
  assert not checkpoint.problems
  reader = checkpoint.open(())
  return {n: reader.read_box(i, tuple(slice(0, s) for s in i.shape)) for n, i in checkpoint.tensors.items()}


def contents(directory):
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in directory.rglob("*")
    if path.is_file()
  }


def test_orbax_restores_it(tmp_path):
  save(FLAT, tmp_path / "tree")
  assert_same(restored(tmp_path / "tree"), FLAT)
  assert_same(read(tmp_path / "tree"), FLAT)
  nested = ocp.PyTreeCheckpointer().restore(tmp_path / "tree")
  assert list(nested["layers"]) == ["0", "1"]
  assert nested["layers"]["0"]["q"].tobytes() == FLAT["layers.0.q"].tobytes()


def test_orbax_restores_it_onto_devices(tmp_path):
  save({"a.w": random(8, 4), "b": random(4)}, tmp_path / "tree")
  mesh = jax.make_mesh((4,), ("x",))
  sharding = NamedSharding(mesh, P("x", None))
  target = {"a": {"w": jax.ShapeDtypeStruct((8, 4), BF16, sharding=sharding)}, "b": jax.ShapeDtypeStruct((4,), BF16)}  # fmt: skip
  found = ocp.StandardCheckpointer().restore(tmp_path / "tree", target)
  assert found["a"]["w"].sharding == sharding
  assert np.asarray(found["a"]["w"]).tobytes() == random(8, 4).tobytes()


def test_config_and_companions_lie_beside_it(tmp_path):
  (tmp_path / "base").mkdir()
  (tmp_path / "base" / "config.json").write_text('{"model_type": "tiny", "wide": false, "more": [1]}')
  (tmp_path / "base" / "tokenizer.json").write_text("{}")
  save(FLAT, tmp_path / "base", overwrite=True)
  base = Base.of(tmp_path / "base", ORBAX)
  save(FLAT, tmp_path / "tree", base=base)
  config = json.loads((tmp_path / "tree" / "config.json").read_text())
  assert (config["model_type"], config["wide"], config["dtype"]) == ("tiny", False, "bfloat16")
  assert (tmp_path / "tree" / "tokenizer.json").read_text() == "{}"
  assert not (tmp_path / "tree" / "merges.txt").exists()


@pytest.mark.parametrize("cell", [1, 40, 100, 1 << 20])
@pytest.mark.parametrize("wide", [False, True])
def test_a_table_s_names_and_layouts(wide, cell, tmp_path, monkeypatch):
  monkeypatch.setattr(orbax_writer, "CELL", cell)
  save(PARAMETERS, tmp_path / "tree", FUSED, Config(wide))
  gating = np.stack([PARAMETERS["layers.0.gate"], PARAMETERS["layers.0.up"]])
  expected = {
    "layer_0/gating.w": gating.swapaxes(1, 2) if wide else gating,
    "top/out.w": PARAMETERS["out"].transpose(1, 2, 0),
    "top/rows.w": PARAMETERS["rows"].reshape(15, 6),
  }
  assert_same(restored(tmp_path / "tree"), {name: np.ascontiguousarray(a) for name, a in expected.items()})


def test_many_batches_are_many_files(tmp_path, monkeypatch):
  monkeypatch.setattr(orbax_writer, "CELL", 16)
  monkeypatch.setattr(orbax_writer, "_BATCH", 64)
  totals, counted = [], []
  save(FLAT, tmp_path / "tree", on_total=totals.append, on_bytes=counted.append)
  assert_same(restored(tmp_path / "tree"), FLAT)
  assert totals == [sum(counted)] == [sum(np.asarray(array).nbytes for array in FLAT.values())]
  assert len(counted) > 3


def test_parameters_on_devices(tmp_path):
  mesh = jax.make_mesh((2, 2), ("x", "y"))
  spread = {
    "embed.w": jax.device_put(FLAT["embed.w"], NamedSharding(mesh, P("x", "y"))),
    "layers.0.q": jax.device_put(FLAT["layers.0.q"], NamedSharding(mesh, P(None, "y"))),
  }
  save(spread, tmp_path / "tree")
  assert_same(read(tmp_path / "tree"), {name: FLAT[name] for name in spread})


@pytest.mark.parametrize("at", [0, 2])
def test_an_error_while_arrays_are_created_comes_through(at, tmp_path, monkeypatch):
  """TensorStore's own context manager would wait forever for the arrays that are being created."""
  calls, create = itertools.count(), ts.open

  def fail(*args, **kwargs):
    if next(calls) == at:
      raise KeyboardInterrupt
    return create(*args, **kwargs)

  monkeypatch.setattr(ts, "open", fail)
  raised = []

  def attempt():
    try:
      save(FLAT, tmp_path / "tree")
    except BaseException as error:
      raised.append(type(error))

  thread = threading.Thread(target=attempt, daemon=True)
  thread.start()
  thread.join(30)
  assert raised == [KeyboardInterrupt]
  assert os.listdir(tmp_path) == []


def test_another_dtype(tmp_path):
  save(FLAT, tmp_path / "tree", dtype="float32")
  assert read(tmp_path / "tree")["embed.w"].tobytes() == FLAT["embed.w"].astype(np.float32).tobytes()
  assert read(tmp_path / "tree")["steps"].dtype == np.int32
  with pytest.raises(SaveError, match=r"a: 100000\.0 does not fit into float16"):
    save({"a": np.array([1e5], np.float32)}, tmp_path / "new", dtype="float16")
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wide", [False, True])
def test_a_base_decides_the_form_and_gives_what_the_model_has_not(wide, tmp_path, monkeypatch):
  monkeypatch.setattr(orbax_writer, "CELL", 16)
  gating = np.zeros((2, 6, 10) if wide else (2, 10, 6), BF16)
  tower = {"k": random(5, 7, dtype=np.float32)}
  tree = {"layer_0/gating": {"w": gating}, "tower": tower, "opt_state": {"mu": np.zeros(3, np.float32)}}
  tree["top/out"], tree["top/rows"] = {"w": random(3, 5, 6)}, {"w": random(15, 6)}
  ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(tmp_path / "base", tree)
  checkpoint = read_orbax(LocalFiles(str(tmp_path / "base")))
  save(PARAMETERS, tmp_path / "tree", FUSED, Config(not wide), base=Base(checkpoint.files, checkpoint))
  found = restored(tmp_path / "tree")
  assert found.keys() == {"layer_0/gating.w", "top/out.w", "top/rows.w", "tower.k"}
  assert found["layer_0/gating.w"].shape == gating.shape
  assert found["tower.k"].tobytes() == tower["k"].tobytes()


@pytest.mark.parametrize(
  ("shape", "itemsize", "cell"),
  [
    ((), 4, []),
    ((0, 4), 4, [1, 4]),
    ((1000, 1000), 2, [1000, 1000]),
    ((256128, 2304), 2, [2001, 2304]),
    ((2, 9216, 2304), 2, [1, 2304, 2304]),
    ((128, 768, 2048), 2, [4, 768, 2048]),
    ((3, 1 << 26), 2, [1, 1 << 23]),
  ],
)
def test_cells(shape, itemsize, cell):
  assert cell_shape(shape, itemsize) == cell
  assert int(np.prod(cell, dtype=np.int64)) * itemsize <= orbax_writer.CELL


def test_what_is_stored(tmp_path):
  """Whatever reads zarr reads it: no compression, and zeros are stored like other numbers."""
  save(FLAT, tmp_path / "tree")
  store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/tree/"}).result()
  metadata = json.loads(store.read("layers.1.zeros/.zarray").result().value)
  assert (metadata["compressor"], metadata["dtype"], metadata["zarr_format"]) == (None, "<f4", 2)
  assert store.read("layers.1.zeros/0.0").result().value == bytes(60)


def test_an_existing_directory(tmp_path):
  save(FLAT, tmp_path / "tree")
  (tmp_path / "tree" / "notes.txt").write_text("mine")
  (tmp_path / "tree" / "own").mkdir()
  before = contents(tmp_path / "tree")
  with pytest.raises(SaveError, match="overwrite=True"):
    save(FLAT, tmp_path / "tree")
  assert contents(tmp_path / "tree") == before
  save({"a": random(3)}, tmp_path / "tree", overwrite=True)
  assert_same(restored(tmp_path / "tree"), {"a": random(3)})
  after = contents(tmp_path / "tree")
  assert after["notes.txt"] == b"mine"
  assert not {name for name in after if name.startswith("d/")} & before.keys()


def test_trees_and_safetensors_take_each_other_s_place(tmp_path):
  save_model_to_safetensors({"a": random(3)}, tmp_path / "target")
  save(FLAT, tmp_path / "target", overwrite=True)
  assert not list((tmp_path / "target").glob("*.safetensors*"))
  assert_same(read(tmp_path / "target"), FLAT)
  save_model_to_safetensors({"a": random(3)}, tmp_path / "target", overwrite=True)
  assert sorted(os.listdir(tmp_path / "target")) == ["config.json", "model.safetensors"]


def test_directories_of_arrays_are_replaced(tmp_path):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
    checkpointer.save(tmp_path / "target", {"old": {"w": random(3)}})
  # Neither is a part of that tree.
  (tmp_path / "target" / "own").mkdir()
  (tmp_path / "target" / "checkpoint").write_text('model_checkpoint_path: "mine"')
  save_model_to_safetensors({"a": random(3)}, tmp_path / "target", overwrite=True)
  assert sorted(os.listdir(tmp_path / "target")) == ["checkpoint", "model.safetensors", "own"]


def test_a_failure_leaves_what_was_there(tmp_path):
  save({"a": random(3)}, tmp_path / "target")
  before = contents(tmp_path / "target")

  def get(name):
    if name == "layers.1.q":
      raise CheckpointError("here", ["broken"])
    return FLAT[name]

  with pytest.raises(CheckpointError, match="broken"):
    save_parameters_to_orbax(
      FLAT, get, tmp_path / "target", family=family(made_of(FLAT)), config=Config(), overwrite=True
    )
  assert contents(tmp_path / "target") == before
  assert os.listdir(tmp_path) == ["target"]


def test_an_interrupt_leaves_what_was_there(tmp_path, monkeypatch, interrupt):
  monkeypatch.setattr(orbax_writer, "CELL", 16)
  monkeypatch.setattr(orbax_writer, "_BATCH", 64)
  save({"a": random(3)}, tmp_path / "target")
  before = contents(tmp_path / "target")
  with pytest.raises(KeyboardInterrupt):
    save(FLAT, tmp_path / "target", overwrite=True, on_bytes=interrupt)
  assert contents(tmp_path / "target") == before
  assert os.listdir(tmp_path) == ["target"]


SCRIPT = """
import os, signal, numpy as np
from models_core.saving import orbax_writer
from models_core.saving.atomic import replace_directory
from models_core.saving.plan import plan_state
from models_core.formats import checkpoint_entries
orbax_writer._BATCH = 1000
state = {"a": np.zeros(3000), "b": np.zeros(3000)}
kill = lambda count: os.kill(os.getpid(), signal.SIGKILL)
with replace_directory(TARGET, overwrite=True, outdated=checkpoint_entries) as directory:
  orbax_writer.write_tree(directory, plan_state(state), state.__getitem__, on_bytes=kill)
"""


def test_a_killed_saver(tmp_path):
  save({"a": random(3)}, tmp_path / "target")
  before = contents(tmp_path / "target")
  script = SCRIPT.replace("TARGET", repr(str(tmp_path / "target")))
  killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "JAX_PLATFORMS": "cpu"})
  assert killed.returncode == -9
  assert contents(tmp_path / "target") == before
  assert len(os.listdir(tmp_path)) == 3  # what it was building, and its lock
  save(FLAT, tmp_path / "target", overwrite=True)
  assert os.listdir(tmp_path) == ["target"]
  assert_same(read(tmp_path / "target"), FLAT)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is this system's")
def test_a_file_system_that_refuses(tmp_path, monkeypatch):
  monkeypatch.setattr(orbax_writer, "_BATCH", 1000)
  save({"a": random(3)}, tmp_path / "target")
  before = contents(tmp_path / "target")
  large = {name: np.zeros(3000, np.float32) for name in "abc"}
  _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (9000, most))
  try:
    with pytest.raises(SaveError, match=r"File too large.*; its previous contents are unchanged") as caught:
      save(large, tmp_path / "target", overwrite=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
  assert caught.value.errno == errno.EFBIG
  assert contents(tmp_path / "target") == before
  assert os.listdir(tmp_path) == ["target"]


def test_config_json_must_state_the_configuration(tmp_path):
  other = dataclasses.replace(family(made_of(FLAT)), read_config=lambda raw: Config(True))
  with pytest.raises(ConfigError, match="wide would be read back with another value"):
    save_parameters_to_orbax(FLAT, FLAT.get, tmp_path / "tree", family=other, config=Config())


def test_without_tensorstore(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorstore", None)
  with pytest.raises(MissingExtraError, match=r"pip install .*\[orbax\]"):
    save(FLAT, tmp_path / "tree")
  assert os.listdir(tmp_path) == []


def test_a_family_without_a_table_keeps_its_names():
  shapes = {"layers.0.q": (2, 3), "layers.11.q": (2, 3), "blocks.1.experts.2.w": (4,), "steps": ()}
  table = family().table_of(ORBAX, shapes)
  assert [(row.ours, row.forms[0].name, row.forms[0].layout) for row in table.rows] == [
    ("layers.{i}.q", "layers.{i}.q", "a b"),
    ("blocks.{i}.experts.{j}.w", "blocks.{i}.experts.{j}.w", "a"),
    ("steps", "steps", ""),
  ]
  assert table.layer_of("layers.11.q") == 11
  assert family(orbax=FUSED).table_of(ORBAX, shapes) is FUSED
  with pytest.raises(ConfigError, match="the family tiny has no weight table for the naming scheme 'gguf'"):
    family().table_of(GGUF, shapes)


def test_weights_that_would_be_loaded_instead_are_not_left_beside_the_tree(tmp_path):
  target = tmp_path / "tree"
  target.mkdir()
  (target / "m.gguf").write_bytes(b"GGUF")
  safetensors.numpy.save_file({"a": np.zeros(2)}, target / "weights.safetensors")
  with pytest.raises(
    SaveError, match=r"tree holds m\.gguf, weights\.safetensors, which would be loaded instead"
  ):
    save(FLAT, target, overwrite=True)
  assert sorted(os.listdir(target)) == ["m.gguf", "weights.safetensors"]
  (target / "m.gguf").unlink()
  (target / "weights.safetensors").rename(target / "model.safetensors")
  save(FLAT, target, overwrite=True)
  assert not (target / "model.safetensors").exists()
  assert_same(read(target), FLAT)


def test_a_path_that_tensorstore_takes_for_another_is_refused(tmp_path):
  with pytest.raises(SaveError, match="TensorStore takes a backslash for a slash"):
    save(FLAT, tmp_path / "a\\b")
  assert os.listdir(tmp_path) == []
