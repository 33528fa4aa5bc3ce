"""Loads through `cache_dir` in turns: without it, for the first time, and again.

Each measurement is a fresh process that imports what it uses, reads the files once into the page cache, and touches more
memory than it will need. Then the clock runs from the call to the last array that is ready. A second clock reads every
byte of the result once. The digest of the model must be that of a load without the cache.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from load import (
  DENSE,
  PeakMemory,
  combined,
  mesh_of,
  ready,
  settle,
  shapes,
  touch,
  write_dense,
  write_gguf,
  write_tree,
)

RANK = 16
# Row -> who writes the checkpoint, the folder that keeps it, the dtype asked for.
CHECKPOINTS = {
  "cast": (write_dense, "dense", "float32"),
  "adapter": (write_dense, "dense", None),
  "gguf": (write_gguf, "gguf", "bfloat16"),
  "orbax": (write_tree, "orbax", None),
}
VARIANTS = ("without", "first", "second")


def write_adapter(directory: pathlib.Path, base: pathlib.Path) -> None:
  """An adapter of the dense model, as peft writes it: factors beside all projections."""
  from safetensors.numpy import save_file

  random, tensors = np.random.default_rng(1), {}
  for name, shape in shapes(DENSE).items():
    if name.endswith("_proj.weight"):
      module = f"base_model.model.{name.removesuffix('.weight')}"
      for side, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
        tensors[f"{module}.lora_{side}.weight"] = random.standard_normal(size, np.float32) * 0.02
  directory.mkdir(parents=True, exist_ok=True)
  save_file(tensors, directory / "adapter_model.safetensors")
  projections = sorted({name.split(".")[-2] for name in shapes(DENSE) if name.endswith("_proj.weight")})
  config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": projections}
  config |= {"base_model_name_or_path": str(base)}
  (directory / "adapter_config.json").write_text(json.dumps(config))


def measure(kind: str, variant: str, root: pathlib.Path, devices: int) -> dict[str, float | str]:
  """Seconds to load, seconds to read the result once, the peak of anonymous memory over the result, and the digest."""
  import models_llama.llama3  # noqa: F401, AutoModel imports a family when it is asked for
  from models_automodel import AutoModel
  from models_core.digest import digest

  _, folder, dtype = CHECKPOINTS[kind]
  mesh, cache = mesh_of(devices), root / f"cache-{kind}-{devices}"
  if variant != "second":
    shutil.rmtree(cache, ignore_errors=True)
  size = settle(root / folder, cold=False)
  if cache.exists():
    settle(cache, cold=False)
  touch(3 * size)
  options = {} if variant == "without" else {"cache_dir": cache}
  place = root / ("adapter" if kind == "adapter" else folder)
  peak = PeakMemory()
  peak.start()
  start = time.perf_counter()
  model, _ = AutoModel.from_pretrained(place, mesh, dtype=dtype, progress=False, **options)
  arrays = ready(model)
  seconds = time.perf_counter() - start
  more, nbytes = peak.more, sum(array.nbytes for array in arrays)
  start = time.perf_counter()
  combined(arrays)
  reading = time.perf_counter() - start
  return {
    "load": seconds,
    "first read": reading,
    "peak": more / nbytes,
    "bytes": nbytes,
    "digest": str(digest(model)),
  }


def run(kind: str, variant: str, root: pathlib.Path, devices: int) -> dict[str, float | str]:
  """One measurement in a fresh process."""
  command = [sys.executable, __file__, "--directory", str(root), "--measure", kind, variant]
  env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  done = subprocess.run(
    [*command, "--devices", str(devices)], stdout=subprocess.PIPE, text=True, env=os.environ | env
  )
  if done.returncode:
    sys.exit(f"{kind}, {variant}: failed with exit code {done.returncode}")
  return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[tuple[str, int], dict[str, list[dict]]]) -> None:
  """A Markdown table, one line a variant; ratios are the medians of the rounds' ratios."""
  print("| load | devices | variant | GB | median s | min s | second is faster | min + first read s | peak |")
  print("|---" * 9 + "|")
  for (kind, devices), variants in results.items():
    second = variants["second"]
    for name, rows in variants.items():
      ratio = statistics.median(a["load"] / b["load"] for a, b in zip(rows, second, strict=True))
      seconds = [row["load"] for row in rows]
      cells = (
        f"{rows[0]['bytes'] / 1e9:.2f}",
        f"{statistics.median(seconds):.3f}",
        f"{min(seconds):.3f}",
        f"{ratio:.1f} x",
        f"{min(row['load'] + row['first read'] for row in rows):.3f}",
        f"{max(row['peak'] for row in rows):.2f}",
      )
      print(f"| {kind} | {devices} | {name} | " + " | ".join(cells) + " |")


def main() -> None:
  """Makes the checkpoints where they are missing, measures in turns, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--directory", type=pathlib.Path, help="where the checkpoints are kept; else it is temporary"
  )
  parser.add_argument("--checkpoints", nargs="+", default=list(CHECKPOINTS), choices=CHECKPOINTS)
  parser.add_argument("--devices", nargs="+", type=int, default=[1, 8], choices=[1, 8])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(*args.measure, args.directory, args.devices[0])))
    return
  with tempfile.TemporaryDirectory() as temporary:
    root = (args.directory or pathlib.Path(temporary)).absolute()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    results: dict[tuple[str, int], dict[str, list[dict]]] = {}
    for kind in args.checkpoints:
      make, folder, _ = CHECKPOINTS[kind]
      if not (root / folder).exists():
        make(root / folder, 8)
      if kind == "adapter":
        write_adapter(root / "adapter", root / folder)
      for devices in args.devices:
        rows = results.setdefault((kind, devices), {name: [] for name in VARIANTS})
        for _ in range(args.rounds):
          for name in VARIANTS:
            rows[name].append(run(kind, name, root, devices))
            print(f"{kind}, {devices}, {name}: {rows[name][-1]['load']:.3f} s", file=sys.stderr)
            if rows[name][-1]["digest"] != rows["without"][0]["digest"]:
              sys.exit(f"{kind}, {name}: the model is not that of a load without the cache")
        shutil.rmtree(root / f"cache-{kind}-{devices}", ignore_errors=True)
    report(results)


if __name__ == "__main__":
  main()
