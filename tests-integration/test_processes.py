"""Loading by several processes under `jax.distributed`, each with some of the mesh's devices."""

import dataclasses
import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys

import jax.numpy as jnp
import pytest
from safetensors.numpy import save_file

from models_automodel import AutoModel
from models_automodel.digest import digest
from models_core.dummy_model_creator import create_dummy_model
from models_core.testing import to_tensors, write_checkpoint
from models_llama.llama3 import FAMILY
from models_llama.llama3.model import Llama3, ModelConfig
from models_llama.llama3.params import save_lora_merged_model_as_safetensors
from models_qwen import qwen3
from models_qwen.qwen3.model import ModelConfig as Qwen3Config
from models_qwen.qwen3.model import Qwen3
from models_sources.testing import HubServer, StoreServer

WORKER = pathlib.Path(__file__).with_name("process_worker.py")
CONFIG = ModelConfig(
  num_layers=2,
  vocab_size=512,
  embed_dim=64,
  hidden_dim=256,
  num_heads=8,
  head_dim=16,
  num_kv_heads=2,
  rope_theta=1e4,
  norm_eps=1e-5,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  directory = tmp_path_factory.mktemp("checkpoint")
  model = create_dummy_model(Llama3, CONFIG, dtype=jnp.bfloat16)
  write_checkpoint(directory, FAMILY, CONFIG, model)
  return directory


def run(
  paths, mesh, names, *, devices=1, auto=False, verify=True, call=False, merge=None, hand=False, cache=None
):
  """Starts a process for each path. Returns their reports."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  workers = []
  for process, path in enumerate(paths):
    task = {
      "port": port, "process": process, "processes": len(paths), "devices": devices,
      "mesh": [mesh, names], "auto": auto, "path": str(path), "verify": verify, "call": call,
      "merge": merge and str(merge), "hand": hand, "cache": cache and str(cache),
    }  # fmt: skip
    command = [sys.executable, str(WORKER), json.dumps(task)]
    workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
  reports = []
  try:
    for worker in workers:
      out, err = worker.communicate(timeout=300)
      assert worker.returncode == 0, err[-4000:]
      reports.append(json.loads(out.splitlines()[-1]))
    return reports
  finally:
    for worker in workers:
      worker.kill()
      worker.communicate()


@pytest.mark.parametrize(
  ("processes", "devices", "mesh", "names", "auto"),
  [
    (4, 1, (4,), ("fsdp",), False),
    (4, 1, (4,), ("tp",), False),
    (4, 1, (2, 2), ("fsdp", "tp"), True),
    (2, 4, (2, 4), ("fsdp", "tp"), False),
    (2, 2, (4, 1), ("other", "tp"), False),
    (4, 1, (4, 1), ("other", "tp"), False),  # replicated
  ],
)
def test_each_byte_is_read_by_one_process(checkpoint, processes, devices, mesh, names, auto, tmp_path):
  # Of each kind of mesh one model is called, too; of one, an adapter is merged.
  call, merged = len(mesh) == 2 and mesh[1] > 1, tmp_path / "merged"
  reports = run(
    [checkpoint] * processes,
    mesh,
    names,
    devices=devices,
    auto=auto,
    call=call,
    merge=merged if call and not auto else None,
  )
  assert [r.get("wrong") for r in reports] == [[]] * processes, reports
  assert len({r["logits"] for r in reports}) == 1
  stored = reports[0]["stored"]
  assert sum(r["read"] for r in reports) == stored
  assert max(r["read"] for r in reports) <= 1.05 * stored / processes
  if call:
    assert {r["digest"] for r in reports} == {str(digest(checkpoint, progress=False))}
  if call and not auto:
    assert {r["merged"] for r in reports} == {str(digest(merged, progress=False))}
    model, _ = AutoModel.from_pretrained(str(checkpoint), progress=False)
    runpy.run_path(str(WORKER))["add_factors"](model)
    save_lora_merged_model_as_safetensors(checkpoint, tmp_path / "alone", model, 2, 3.0)
    for file in ("model.safetensors", "config.json"):
      assert (merged / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_quantised_weights_are_read_once_and_scales_by_each_process_that_needs_them(checkpoint, tmp_path):
  quantised = runpy.run_path(str(WORKER.with_name("test_quantised.py")))
  tensors, scales = {}, 0
  for name, tensor in quantised["read"](checkpoint).items():
    tensors[name] = tensor
    if tensor.ndim == 2 and "proj" in name:
      tensors[name], scale, _ = quantised["quantise"](tensor)
      tensors[f"{name}_scale_inv"] = scale
      scales += scale.nbytes
  said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
  config = json.loads((checkpoint / "config.json").read_text()) | {"quantization_config": said}
  directory = quantised["write"](tmp_path / "quantised", tensors, config)
  alone, _ = AutoModel.from_pretrained(str(directory), progress=False)
  reports = run([directory] * 4, (2, 2), ("fsdp", "tp"), verify=False, call=True)
  assert {r.get("digest") for r in reports} == {str(digest(alone))}, reports
  nbytes = sum(tensor.nbytes for tensor in tensors.values())
  # The mesh cuts blocks along both axes, so that four processes share one.
  assert nbytes <= sum(r["read"] for r in reports) <= nbytes + 3 * scales


SPARSE = Qwen3Config(
  num_layers=2, vocab_size=64, embed_dim=32, hidden_dim=32, num_heads=4, head_dim=8, num_kv_heads=2,
  rope_theta=1e4, norm_eps=1e-6, num_experts=4, num_experts_per_tok=2, moe_hidden_dim=16,
  norm_topk_prob=True, decoder_sparse_step=1,
)  # fmt: skip


@pytest.mark.parametrize("auto", [False, True], ids=["explicit", "auto"])
def test_weights_are_handed_over_by_all_processes_together(tmp_path, auto):
  model = create_dummy_model(Qwen3, SPARSE, dtype=jnp.bfloat16)
  write_checkpoint(tmp_path, qwen3.FAMILY, SPARSE, model)
  reports = run([tmp_path] * 2, (2, 2), ("tp", "fsdp"), devices=2, auto=auto, verify=False, hand=True)
  assert [r["handed"] for r in reports] == [[str(digest(model))] * 2] * 2


def test_a_process_needs_the_files_of_its_own_experts_alone(tmp_path):
  tensors = to_tensors(create_dummy_model(Qwen3, SPARSE), qwen3.FAMILY.weights["huggingface"])
  parts = {"rest": {}, "first": {}, "second": {}}
  for name, tensor in tensors.items():
    part = "rest" if ".experts." not in name else "second" if int(name.split(".")[5]) >= 2 else "first"
    parts[part][name] = tensor
  for part, own in parts.items():
    save_file(own, tmp_path / f"{part}.safetensors")
  weight_map = {name: f"{part}.safetensors" for part, own in parts.items() for name in own}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  (tmp_path / "config.json").write_text(json.dumps(qwen3.FAMILY.write_config(SPARSE)))
  reports = run([tmp_path] * 2, (2,), ("tp",))
  assert [r.get("wrong") for r in reports] == [[]] * 2, reports
  assert [r["files"] for r in reports] == [
    ["first.safetensors", "rest.safetensors"],
    ["rest.safetensors", "second.safetensors"],
  ]


def test_each_process_keeps_its_shards_and_all_of_them_use_the_cache_or_none(checkpoint, tmp_path):
  reports = run([checkpoint] * 2, (2, 2), ("fsdp", "tp"), devices=2, cache=tmp_path)
  expected = str(digest(checkpoint, dtype="float32", progress=False))
  assert [r["digests"] for r in reports] == [[expected] * 3] * 2
  assert [r["counts"] for r in reports] == [[1, 0, 1]] * 2
  stored = (checkpoint / "model.safetensors").stat().st_size
  # As float32, half of the parameters each, besides those that are replicated and the headers.
  assert all(r["held"] < 1.1 * stored for r in reports)


def test_where_one_process_fails_all_fail(checkpoint, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  for file in checkpoint.iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  with (other / "model.safetensors").open("r+b") as file:
    file.truncate(1000)
  first, second = run([checkpoint, other], (2,), ("fsdp",))
  assert second["error"] == "CheckpointError"
  assert first["error"] == "ProcessError"
  assert "process 1 failed" in first["message"]


def test_processes_that_see_different_checkpoints_find_out(checkpoint, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  write_checkpoint(other, FAMILY, CONFIG, create_dummy_model(Llama3, CONFIG))
  reports = run([checkpoint, other], (2,), ("fsdp",))
  assert [r["error"] for r in reports] == ["ProcessError"] * 2
  assert "process 1 sees a different checkpoint from process 0" in reports[0]["message"]


def test_one_process_asks_what_a_branch_is_and_each_file_is_downloaded_once(
  checkpoint, tmp_path, monkeypatch
):
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
  for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
    monkeypatch.delenv(name, raising=False)
  with HubServer() as hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.add("meta-llama/Llama-3.2-1B", {file.name: file.read_bytes() for file in checkpoint.iterdir()})
    reports = run(["meta-llama/Llama-3.2-1B"] * 3, (3,), ("fsdp",))
    assert [r.get("wrong") for r in reports] == [[]] * 3, reports
    assert sum("/revision/main" in line for line in hub.lines("hub")) == 1
    size = (checkpoint / "model.safetensors").stat().st_size
    whole = [r for r in hub.requests if r.host == "storage" and r.sent >= size]
    assert len(whole) == 1


def test_from_a_store_each_process_gets_the_bytes_of_its_own_part(tmp_path, monkeypatch):
  config = dataclasses.replace(CONFIG, vocab_size=8192, embed_dim=512, hidden_dim=2048)
  write_checkpoint(tmp_path, FAMILY, config, create_dummy_model(Llama3, config, dtype=jnp.bfloat16))
  for name in list(os.environ):
    if name.startswith(("GOOGLE_", "STORAGE_EMULATOR_HOST")):
      monkeypatch.delenv(name)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  with StoreServer() as store:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.endpoint)
    # A bucket for each process, so that the server can tell them apart.
    for process in range(4):
      for name in ("config.json", "model.safetensors"):
        store.put(f"bucket-{process}/model/{name}", (tmp_path / name).read_bytes())
    reports = run([f"gs://bucket-{process}/model" for process in range(4)], (4,), ("fsdp",), verify=False)
    got = [store.received(f"bucket-{process}/model/model.safetensors") for process in range(4)]
  shares = [report["held"] for report in reports]
  headers = 256 * 1024
  assert all(n <= 1.05 * share + headers for n, share in zip(got, shares, strict=True)), (got, shares)
  assert max(shares) <= 1.01 * reports[0]["stored"] / 4
