"""Loads a checkpoint with several processes of one device each, under `jax.distributed`, beside one process alone.

Each process reports the bytes that it read, the bytes of its own shards, and the peak of its anonymous memory (RssAnon)
during the load, less what it held before. Bytes read are those of the loader's own reads, not of mapped pages.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import load

# Name of a row: shape and names of the mesh, and whether all parameters are replicated.
MESHES = {
  "fsdp=4": ((4,), ("fsdp",)),
  "tp=4": ((4,), ("tp",)),
  "fsdp=2, tp=2": ((2, 2), ("fsdp", "tp")),
  "replicated": ((4,), ("copies",)),
}


def work(directory: pathlib.Path, process: int, processes: int, port: int, name: str) -> dict[str, float]:
  """Loads in one of the processes."""
  import jax

  import models_llama.llama3  # noqa: F401
  from models_automodel import AutoModel
  from models_core.loading import load as load_plan

  if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)
  shape, names = MESHES[name] if processes > 1 else ((1,), ("fsdp",))
  mesh = jax.make_mesh(shape, names)
  size = load.settle(directory, cold=False)
  load.touch(size)
  if processes > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("start")
  counts: list[int] = []
  peak = load.PeakMemory()
  peak.start()
  start = time.perf_counter()
  model = load_plan(AutoModel.plan(str(directory), mesh), on_bytes=counts.append)
  arrays = load.ready(model)
  seconds = time.perf_counter() - start
  more = peak.more
  held = {
    shard.data.unsafe_buffer_pointer(): shard.data.nbytes for a in arrays for shard in a.addressable_shards
  }
  return {
    "seconds": seconds,
    "read": sum(counts),
    "held": sum(held.values()),
    "beside": more - sum(held.values()),
    "size": size,
  }


def run(directory: pathlib.Path, processes: int, name: str) -> list[dict[str, float]]:
  """What all processes of one load report."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-W", "ignore", __file__, "--directory", str(directory)]
  workers = [
    subprocess.Popen(
      [*command, "--work", str(process), str(processes), str(port), name],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    for process in range(processes)
  ]
  outputs = [worker.communicate()[0] for worker in workers]
  if any(worker.returncode for worker in workers):
    sys.exit(f"{name}: a process failed")
  return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
  """Makes the checkpoint where it is missing, measures in turns, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--directory", type=pathlib.Path, help="where the checkpoint is kept; else it is temporary"
  )
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    process, processes, port, name = args.work
    print(json.dumps(work(args.directory, int(process), int(processes), int(port), name)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    directory = (args.directory or pathlib.Path(temporary)) / "dense"
    if not directory.exists():
      load.write_dense(directory, 8)
    rows = {"one process": (1, "fsdp=4")} | {name: (4, name) for name in MESHES}
    found: dict[str, list[list[dict[str, float]]]] = {row: [] for row in rows}
    for _ in range(args.rounds):
      for row, (processes, name) in rows.items():
        found[row].append(run(directory, processes, name))
  print("| mesh | read, of the checkpoint | shards of a process, MB | memory beside them, MB | median s |")
  print("|---|---|---|---|---|")
  for row, rounds in found.items():
    of_all = [report for reports in rounds for report in reports]
    read = max(sum(report["read"] for report in reports) for reports in rounds) / of_all[0]["size"]
    held, beside = (max(report[key] for report in of_all) / 1e6 for key in ("held", "beside"))
    seconds = statistics.median(max(report["seconds"] for report in reports) for reports in rounds)
    print(f"| {row} | {read:.3f} | {held:,.0f} | {beside:,.0f} | {seconds:.2f} |")


if __name__ == "__main__":
  main()
