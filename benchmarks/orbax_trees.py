"""Loading an Orbax tree beside its safetensors twin: time, and host memory over the model's own bytes.

    uv run python benchmarks/orbax_trees.py [--directory DIR] [--rounds 3]

Writes a Gemma 2 model of about 1 GB with random bf16 weights three times: as safetensors, as a tree whose arrays are
one cell each, and as one whose cells are a sixteenth, as eight or more devices write them. Each load is a process of its
own, on warm files.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from flax import nnx

from models_core.abstract import abstract_model
from models_core.checkpoint import LocalFiles
from models_core.dummy_model_creator import create_dummy_model
from models_core.loader import load
from models_core.orbax_checkpoint import read_orbax
from models_core.plan import plan_load
from models_core.safetensors_headers import read_safetensors
from models_core.testing import to_tensors, write_checkpoint
from models_core.weights import Row, WeightTable
from models_gemma.gemma import FAMILY
from models_gemma.gemma.model import Gemma, ModelConfig

VARIANTS = ("safetensors", "whole arrays", "sixteenths")


def config() -> ModelConfig:
  """Gemma 2 2B's shapes, cut in layers and vocabulary."""
  import dataclasses

  return dataclasses.replace(ModelConfig.gemma2_2b(), num_layers=6, num_embed=16384)


def write(directory: pathlib.Path) -> None:
  """The three forms of one model."""
  import tensorstore as ts

  model = create_dummy_model(Gemma, config(), dtype="bfloat16")
  (directory / "safetensors").mkdir(parents=True)
  write_checkpoint(directory / "safetensors", FAMILY, config(), model)
  google = WeightTable()
  google.rows = tuple(Row(row.ours, row.forms[:1]) for row in FAMILY.weights["orbax"].rows)
  tensors = to_tensors(model, google)
  for variant, parts in (("whole arrays", 1), ("sixteenths", 16)):
    base = {"driver": "file", "path": f"{directory / variant}/"}
    for name, tensor in tensors.items():
      # Devices shard the longest axis.
      axis = int(np.argmax(tensor.shape))
      cell = [-(-size // parts) if at == axis else size for at, size in enumerate(tensor.shape)]
      metadata = {"chunks": cell, "compressor": {"id": "zstd", "level": 1}}
      kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
      array = ts.open(
        {"driver": "zarr", "kvstore": kvstore, "metadata": metadata},
        create=True,
        dtype=ts.bfloat16,
        shape=tensor.shape,
      ).result()
      array.write(tensor).result()


def anonymous() -> int:
  """Bytes of this process that are no file's."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon"):
      return int(line.split()[1]) * 1024
  raise RuntimeError("no RssAnon in /proc/self/status")


def measure(directory: pathlib.Path, variant: str) -> dict[str, float]:
  """One load."""
  place = directory / variant
  for file in place.rglob("*"):
    if file.is_file():
      file.read_bytes()
  jax.devices()
  files = LocalFiles(str(place))
  start, before, peak, done = time.perf_counter(), anonymous(), 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, anonymous())

  watcher = threading.Thread(target=watch)
  watcher.start()
  checkpoint = read_safetensors(files) if variant == "safetensors" else read_orbax(files)
  plan = plan_load(checkpoint, abstract_model(Gemma, config()), FAMILY.weights[checkpoint.dialect])
  planned = time.perf_counter()
  jax.block_until_ready(jax.tree.leaves(nnx.state(load(plan))))
  stop = time.perf_counter()
  done.set()
  watcher.join()
  nbytes = sum(planned.nbytes for planned in plan.parameters)
  return {"load": stop - planned, "plan": planned - start, "peak": (peak - before) / nbytes, "bytes": nbytes}


def main() -> None:
  """Writes what there isn't yet, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--directory", type=pathlib.Path)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--measure")
  options = parser.parse_args()
  if options.measure:
    print(json.dumps(measure(options.directory, options.measure)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    directory = options.directory or pathlib.Path(temporary)
    if not (directory / VARIANTS[-1]).exists():
      write(directory)
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
      for variant in VARIANTS:
        command = [sys.executable, __file__, "--directory", str(directory), "--measure", variant]
        results[variant].append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
  print(f"{'variant':14} {'plan s':>7} {'load s':>7} {'/ twin':>7} {'GB/s':>6} {'peak / model':>13}")
  twin = min(r["load"] for r in results["safetensors"])
  for variant, found in results.items():
    best = min(r["load"] for r in found)
    plan, peak = min(r["plan"] for r in found), max(r["peak"] for r in found)
    print(
      f"{variant:14} {plan:7.2f} {best:7.2f} {best / twin:7.2f} {found[0]['bytes'] / best / 1e9:6.2f} {peak:13.2f}"
    )


if __name__ == "__main__":
  main()
