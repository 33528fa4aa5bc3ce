"""Loading an Orbax tree beside its safetensors twin: time, processor time, and host memory over the model's own bytes.

    uv run python benchmarks/orbax_trees.py [--directory DIR] [--rounds 3]

Writes a Gemma 2 model of about 1 GB with random bf16 weights: as safetensors, as a tree whose arrays are one cell
each, as one whose cells are a sixteenth, as eight or more devices write them, and as one of such cells uncompressed.
Each load is a process of its own, on warm files.

Two more rows tell what the sixteenths cost by themselves: `zstd alone` decodes what is in memory already into memory that
is reused, on all cores, which no load can beat; `TensorStore` reads the arrays, and nothing else is done with them.
Seconds are of the fastest round, and depend on what else the machine does; CPU seconds hardly do.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
import tensorstore as ts
import zstandard
from flax import nnx

from models_core.dummy_model_creator import create_dummy_model
from models_core.formats import LocalFiles, TensorInfo, read_orbax, read_safetensors
from models_core.loading import abstract_model, load, plan_load
from models_core.testing import to_tensors, write_checkpoint
from models_core.weights import Row, WeightTable
from models_gemma.gemma import FAMILY
from models_gemma.gemma.model import Gemma, ModelConfig

# How each tree's arrays are stored: cells along the longest axis, which devices shard, and their compressor.
ZSTD = {"id": "zstd", "level": 1}
TREES = {"whole arrays": (1, ZSTD), "sixteenths": (16, ZSTD), "uncompressed": (16, None)}
LIMITS = ("zstd alone", "TensorStore")


def config() -> ModelConfig:
  """Gemma 2 2B's shapes, cut in layers and vocabulary."""
  return dataclasses.replace(ModelConfig.gemma2_2b(), num_layers=6, num_embed=16384)


def write(directory: pathlib.Path) -> None:
  """All forms of one model."""
  model = create_dummy_model(Gemma, config(), dtype="bfloat16")
  (directory / "safetensors").mkdir(parents=True)
  write_checkpoint(directory / "safetensors", FAMILY, config(), model)
  google = WeightTable()
  google.rows = tuple(Row(row.ours, row.forms[:1]) for row in FAMILY.weights["orbax"].rows)
  tensors = to_tensors(model, google)
  for variant, (parts, compressor) in TREES.items():
    base = {"driver": "file", "path": f"{directory / variant}/"}
    for name, tensor in tensors.items():
      axis = int(np.argmax(tensor.shape))
      cell = [-(-size // parts) if at == axis else size for at, size in enumerate(tensor.shape)]
      metadata = {"chunks": cell, "compressor": compressor}
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


def load_model(place: pathlib.Path) -> int:
  """Loads a model and says how many bytes it has."""
  files = LocalFiles(str(place))
  checkpoint = read_safetensors(files) if place.name == "safetensors" else read_orbax(files)
  plan = plan_load(checkpoint, abstract_model(Gemma, config()), FAMILY.weights[checkpoint.format.naming])
  jax.block_until_ready(jax.tree.leaves(nnx.state(load(plan))))
  return sum(planned.nbytes for planned in plan.parameters)


def read_arrays(place: pathlib.Path) -> int:
  """Has TensorStore read a tree's arrays, several at a time, and says how many bytes they have."""
  checkpoint = read_orbax(LocalFiles(str(place)))
  reader = checkpoint.open(())

  def one(info: TensorInfo) -> int:
    return reader.read_box(info, tuple(slice(0, size) for size in info.shape)).nbytes

  with concurrent.futures.ThreadPoolExecutor(reader.threads) as pool:
    return sum(pool.map(one, checkpoint.tensors.values()))


def decode(values: list[bytes]) -> int:
  """Decodes cells, several at a time, into memory that is reused, and says how many bytes they have."""

  def one(value: bytes) -> int:
    reader, memory = zstandard.ZstdDecompressor().stream_reader(value), bytearray(512 << 10)
    return sum(iter(lambda: reader.readinto(memory), 0))

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return sum(pool.map(one, values))


def measure(directory: pathlib.Path, variant: str) -> dict[str, float]:
  """One load, or one limit of it."""
  place = directory / ("sixteenths" if variant in LIMITS else variant)
  for file in place.rglob("*"):
    if file.is_file():
      file.read_bytes()
  jax.devices()
  work = functools.partial(load_model, place)
  if variant == "TensorStore":
    work = functools.partial(read_arrays, place)
  if variant == "zstd alone":
    base = {"driver": "file", "path": f"{place}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    cells = [key for key in store.list().result() if not key.endswith(b"/.zarray")]
    work = functools.partial(decode, [store.read(key).result().value for key in cells])
  before, peak, done = anonymous(), 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, anonymous())

  watcher = threading.Thread(target=watch)
  watcher.start()
  start, processor = time.perf_counter(), time.process_time()
  nbytes = work()
  wall, cpu = time.perf_counter() - start, time.process_time() - processor
  done.set()
  watcher.join()
  return {"wall": wall, "cpu": cpu, "peak": max(0, peak - before) / nbytes, "bytes": nbytes}


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
    if not (directory / "safetensors").exists():
      write(directory)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ("safetensors", *TREES, *LIMITS)}
    for _ in range(options.rounds):
      for variant, found in results.items():
        command = [sys.executable, __file__, "--directory", str(directory), "--measure", variant]
        found.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
  print(f"{'variant':14} {'s':>6} {'/ twin':>7} {'GB/s':>6} {'CPU s':>6} {'peak / model':>13}")
  twin = min(r["wall"] for r in results["safetensors"])
  for variant, found in results.items():
    best, cpu = (min(r[figure] for r in found) for figure in ("wall", "cpu"))
    rate, peak = found[0]["bytes"] / best / 1e9, max(r["peak"] for r in found)
    print(f"{variant:14} {best:6.2f} {best / twin:7.2f} {rate:6.2f} {cpu:6.2f} {peak:13.2f}")


if __name__ == "__main__":
  main()
