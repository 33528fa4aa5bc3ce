"""Saves one loaded model in turns: a plain copy of its files, models_automodel, and the safetensors library.

Each measurement is a fresh process that loads the checkpoint of load.py, touches more memory than it will need, and
saves beside it. What is written is compared with the checkpoint's bytes.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from load import (
  CONFIG,
  MIB,
  PeakMemory,
  files,
  one_device_mesh,
  parameter,
  path_of,
  ready,
  size_of,
  tensors,
  touch,
  write,
)


def sync(directory: pathlib.Path) -> None:
  """Puts all files on the disk."""
  for file in files(directory):
    with open(file, "rb") as f:
      os.fsync(f.fileno())


def copy(directory: pathlib.Path, target: pathlib.Path) -> Callable:
  """Reads and writes in pieces of 8 MiB: the least that has the bytes in another file."""

  def save() -> None:
    target.mkdir()
    for file in files(directory):
      with open(file, "rb", buffering=0) as source, open(target / file.name, "wb", buffering=0) as f:
        while data := source.read(8 * MIB):
          f.write(data)

  return save


def copy_synced(directory: pathlib.Path, target: pathlib.Path) -> Callable:
  """The same, until the disk has it."""
  save = copy(directory, target)

  def synced() -> None:
    save()
    sync(target)

  return synced


def loaded(directory: pathlib.Path):
  """The model, every page of it in memory."""
  from models_automodel import AutoModel

  model, path = AutoModel.from_pretrained(str(directory), one_device_mesh(), progress=False)
  ready(model)
  for name, _ in tensors(directory):
    np.bitwise_xor.reduce(parameter(model, path_of(name, 0)), axis=None)
  return model, path


def models_automodel(directory: pathlib.Path, target: pathlib.Path) -> Callable:
  """AutoModel.save_pretrained, in shards as the checkpoint has them; it ends when the disk has all."""
  from models_automodel import AutoModel

  model, path = loaded(directory)
  options = {"base": path, "max_shard_size": 400 * 10**6, "progress": False}
  return lambda: AutoModel.save_pretrained(model, target, **options)


def safetensors_library(directory: pathlib.Path, target: pathlib.Path) -> Callable:
  """safetensors.numpy.save_file, one call a shard, of arrays that need no copy."""
  import ml_dtypes
  import safetensors.numpy

  model, _ = loaded(directory)
  index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
  shards: dict[str, dict[str, np.ndarray]] = {}
  for name, array in tensors(directory):
    values = parameter(model, path_of(name, 0)).reshape(array.shape).view(ml_dtypes.bfloat16)
    shards.setdefault(index[name], {})[name] = values

  def save() -> None:
    target.mkdir()
    for file, shard in shards.items():
      safetensors.numpy.save_file(shard, target / file, {"format": "pt"})

  return save


def safetensors_synced(directory: pathlib.Path, target: pathlib.Path) -> Callable:
  """The same, until the disk has it."""
  save = safetensors_library(directory, target)

  def synced() -> None:
    save()
    sync(target)

  return synced


VARIANTS = {
  "copy": copy,
  "copy, synced": copy_synced,
  "models-automodel": models_automodel,
  "safetensors": safetensors_library,
  "safetensors, synced": safetensors_synced,
}


def measure(variant: str, directory: pathlib.Path) -> dict[str, float]:
  """Seconds to save, and the most that anonymous memory grew by meanwhile, in MB."""
  target = directory.parent / f"{directory.name}-saved"
  shutil.rmtree(target, ignore_errors=True)
  save = VARIANTS[variant](directory, target)
  touch(2 * size_of(directory))
  os.sync()
  peak = PeakMemory()
  peak.start()
  start = time.perf_counter()
  save()
  seconds = time.perf_counter() - start
  more = peak.more
  wanted, found = dict(tensors(directory)), dict(tensors(target))
  if wanted.keys() != found.keys() or not all(np.array_equal(found[n], wanted[n]) for n in wanted):
    sys.exit(f"{variant}: what was saved is not what was loaded")
  shutil.rmtree(target)
  return {"save": seconds, "peak": more / 10**6}


def main() -> None:
  """Makes the checkpoint where it is missing, measures in turns, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--directory", type=pathlib.Path, help="where the checkpoint is kept; else it is temporary"
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
  parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.measure, args.directory)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    directory = args.directory or pathlib.Path(temporary) / "checkpoint"
    if not (directory / "config.json").exists():
      write(directory, CONFIG, 64)
    print(f"{size_of(directory) / 10**9:.3f} GB in {len(files(directory))} files, {os.cpu_count()} cores\n")
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in args.variants}
    for number in range(args.rounds):
      for variant in args.variants:
        command = [sys.executable, __file__, "--directory", str(directory), "--measure", variant]
        done = subprocess.run(
          command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        if done.returncode:
          sys.exit(f"{variant} failed with exit code {done.returncode}")
        results[variant].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {number + 1}, {variant}: {results[variant][-1]['save']:.2f} s", file=sys.stderr)
    print("| variant | median s | min s | peak MB |\n|---|---|---|---|")
    for variant, rows in results.items():
      seconds = [row["save"] for row in rows]
      peak = max(row["peak"] for row in rows)
      print(f"| {variant} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {peak:.0f} |")


if __name__ == "__main__":
  main()
