"""Saving under `jax.distributed`: two processes write one directory together."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from models_sources.testing import StoreServer

SCRIPT = """
import json, os, sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
number, port, target, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=number)
from jax.sharding import NamedSharding, PartitionSpec as P
from models_core.saving import safetensors_writer
from models_core.errors import SaveError
from models_core.safetensors_saver import save_model_to_safetensors
from models_automodel.targets import open_target

mesh = jax.make_mesh((2, 2), ("fsdp", "tp"))
SPECS = {"rows": P("fsdp"), "columns": P(None, "fsdp"), "grid": P("fsdp", "tp"), "own": P("tp"), "whole": P(),
         "both": P(("tp", "fsdp"))}
state = {}
for i, (name, spec) in enumerate(SPECS.items()):
  values = np.random.default_rng(i).normal(size=(8, 12)).astype(np.float32)
  sharding = NamedSharding(mesh, spec)
  state[name] = jax.make_array_from_callback(values.shape, sharding, lambda index, v=values: v[index])
written = []
original = safetensors_writer._write_file
def write(path, *args):
  written.append(os.path.basename(path))
  if mode == "fails" and number == 1:
    raise OSError(28, "No space left on device")
  return original(path, *args)
safetensors_writer._write_file = write
try:
  save_model_to_safetensors(state, open_target(target), 800, overwrite=mode == "overwrite")
  outcome = "saved"
except SaveError as error:
  outcome = str(error)
print("RESULT", json.dumps({"written": written, "outcome": outcome}))
"""


def run(target, mode, **variables):
  """Both processes' results."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment |= {"JAX_PLATFORMS": "cpu", **variables}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", SCRIPT, str(number), str(port), str(target), mode],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for number in range(2)
  ]
  results = []
  try:
    for process in processes:
      out, err = process.communicate(timeout=180)
      assert process.returncode == 0, err[-3000:]
      (line,) = [line for line in out.splitlines() if "RESULT" in line]
      results.append(json.loads(line.partition("RESULT")[2]))
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return results


def expected():
  names = ["rows", "columns", "grid", "own", "whole", "both"]
  return {n: np.random.default_rng(i).normal(size=(8, 12)).astype(np.float32) for i, n in enumerate(names)}


def assert_saved(target):
  found = {}
  for file in target.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(file)
  assert found.keys() == expected().keys()
  for name, array in expected().items():
    np.testing.assert_array_equal(found[name], array, name)
  index = json.loads((target / "model.safetensors.index.json").read_text())
  assert index["weight_map"].keys() == found.keys()


@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_each_process_writes_files_of_its_own(mode, tmp_path):
  target = tmp_path / "target"
  if mode == "overwrite":
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"old")
    (target / "notes.txt").write_text("mine")
  first, second = run(target, mode)
  assert first["outcome"] == second["outcome"] == "saved"
  files = sorted(path.name for path in target.glob("*.safetensors"))
  assert len(files) == 3
  assert sorted(first["written"] + second["written"]) == files
  assert len(second["written"]) == 1
  assert_saved(target)
  assert mode == "new" or (target / "notes.txt").read_text() == "mine"
  assert os.listdir(tmp_path) == ["target"]


def test_where_one_process_fails_all_say_so_and_nothing_changes(tmp_path):
  first, second = run(tmp_path / "target", "fails")
  assert "another process could not write its part" in first["outcome"]
  assert "No space left on device" in second["outcome"]
  assert not os.listdir(tmp_path)


def test_a_target_that_exists_is_refused_in_all_processes(tmp_path):
  (tmp_path / "target").mkdir()
  (tmp_path / "target" / "model.safetensors").write_bytes(b"old")
  first, second = run(tmp_path / "target", "new")
  assert "overwrite=True" in first["outcome"]
  assert "is unchanged" in second["outcome"]
  assert (tmp_path / "target" / "model.safetensors").read_bytes() == b"old"


@pytest.fixture
def store():
  pytest.importorskip("obstore")
  with StoreServer() as server:
    server.make("bucket")
    yield server


def test_each_process_uploads_files_of_its_own(store):
  store.put("bucket/target/model.safetensors", b"old")
  store.put("bucket/target/notes.txt", b"mine")
  first, second = run("gs://bucket/target", "overwrite", STORAGE_EMULATOR_HOST=store.endpoint)
  assert first["outcome"] == second["outcome"] == "saved"
  objects = store.objects("bucket/target")
  files = [name for name in objects if name.endswith(".safetensors")]
  assert len(files) == 3
  assert objects.keys() - set(files) == {"model.safetensors.index.json", "notes.txt"}
  found = {}
  for name in files:
    found |= safetensors.numpy.load(objects[name])
  assert found.keys() == expected().keys()
  for name, array in expected().items():
    np.testing.assert_array_equal(found[name], array, name)


def test_where_one_process_cannot_upload_all_say_so_and_nothing_changes(store):
  store.put("bucket/target/model.safetensors", b"old")
  store.fail("PUT .*00002", status=403, times=9)
  first, second = run("gs://bucket/target", "overwrite", STORAGE_EMULATOR_HOST=store.endpoint)
  assert "another process could not write its part" in first["outcome"]
  assert "may not be written with these credentials" in second["outcome"]
  assert store.objects("bucket/target") == {"model.safetensors": b"old"}
