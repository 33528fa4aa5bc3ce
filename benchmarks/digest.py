"""Loads Llama 3.2 1B's shapes and takes the digest twice, on one device or several, beside one pass over the weights.

Each measurement is a fresh process. The first digest of a process compiles; both must be a fraction of the load.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from load import CONFIG, MIB, files, flat, parameter, path_of, ready, size_of, tensors, touch, write

LAYERS = 16


def measure(directory: pathlib.Path, devices: int) -> dict[str, float]:
  """Seconds of each step."""
  import jax

  import models_llama.llama3  # noqa: F401  (AutoModel imports a family when it is asked for)
  from models_automodel import AutoModel, digest

  mesh = jax.make_mesh((1, devices), ("fsdp", "tp"))
  for file in files(directory):
    with open(file, "rb", buffering=0) as f:
      while f.read(MIB):
        pass
  touch(2 * size_of(directory))
  start = time.perf_counter()
  model, _ = AutoModel.from_pretrained(str(directory), mesh, progress=False)
  ready(model)
  loaded = time.perf_counter()
  first = digest(model)
  compiled = time.perf_counter()
  second = digest(model)
  end = time.perf_counter()
  if first != second or len(first.parameters) != sum(1 for _ in tensors(directory)):
    sys.exit("the digests are not of all weights")
  seconds = {"load": loaded - start, "digest, first": compiled - loaded, "digest": end - compiled}
  if devices == 1:
    start = time.perf_counter()
    for name, _ in tensors(directory):
      np.bitwise_xor.reduce(flat(parameter(model, path_of(name, 0))))
    seconds["one pass, one core"] = time.perf_counter() - start
  return seconds


def main() -> None:
  """Makes the checkpoint where it is missing, measures in turns, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--directory", type=pathlib.Path, help="where the checkpoint is kept; else it is temporary"
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], help="faked, on this machine's cores")
  parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.directory, args.measure)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    directory = args.directory or pathlib.Path(temporary) / "checkpoint"
    if not (directory / "config.json").exists():
      write(directory, CONFIG | {"num_hidden_layers": LAYERS}, 8)
    print(f"{size_of(directory) / 10**9:.3f} GB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    results: dict[int, list[dict[str, float]]] = {devices: [] for devices in args.devices}
    for _ in range(args.rounds):
      for devices, rows in results.items():
        command = [sys.executable, __file__, "--directory", str(directory), "--measure", str(devices)]
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
          sys.exit(f"{devices} devices failed with exit code {done.returncode}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'devices':8}{'':20}  min s  / load")
    for devices, rows in results.items():
      least = {step: min(row[step] for row in rows) for step in rows[0]}
      for step, seconds in least.items():
        print(f"{devices:<8}{step:20}{seconds:7.2f}{seconds / least['load']:8.2f}")


if __name__ == "__main__":
  main()
