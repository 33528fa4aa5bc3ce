"""Attention block by block against all at once: time and memory by the length of the sequence, on this machine's device.

Causal attention of one sequence with the heads of Qwen 2.5 0.5B: its forward pass, and its gradient by queries, keys and
values. Both run in turn in one process; the fastest call counts.

  python benchmarks/attention.py
"""

import argparse
import time

import jax
import jax.numpy as jnp

from models_core.layers import attend
from models_core.layers.visibility import visible_keys

N, K, H = 14, 2, 64


def programs(kind, T, dtype):
  """The compiled forward pass and gradient of an implementation."""

  def forward(q, k, v):
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    return attend(q, k, v, visible_keys(positions), scale=H**-0.5, implementation=kind)

  def gradient(q, k, v):
    return jax.grad(lambda *args: forward(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

  shapes = [jax.ShapeDtypeStruct((1, T, heads, H), dtype) for heads in (N, K, K)]
  return [jax.jit(function).lower(*shapes).compile() for function in (forward, gradient)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  print(
    "| T | pass | dense ms | blockwise ms | ratio | dense MB | blockwise MB |\n|---|---|---|---|---|---|---|"
  )
  for T in args.lengths:
    arrays = [
      jax.random.normal(jax.random.key(i), (1, T, heads, H), args.dtype) for i, heads in enumerate((N, K, K))
    ]
    found = {kind: programs(kind, T, args.dtype) for kind in ("dense", "blockwise")}
    for at, name in enumerate(("forward", "gradient")):
      times = {kind: [] for kind in found}
      for _ in range(args.rounds + 1):
        for kind, compiled in found.items():
          start = time.perf_counter()
          jax.block_until_ready(compiled[at](*arrays))
          times[kind].append(1e3 * (time.perf_counter() - start))
      dense, blockwise = (min(values[1:]) for values in times.values())
      memory = [found[kind][at].memory_analysis().temp_size_in_bytes / 1e6 for kind in found]
      print(
        f"| {T} | {name} | {dense:.1f} | {blockwise:.1f} | {dense / blockwise:.1f} | {memory[0]:.0f} | {memory[1]:.0f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
