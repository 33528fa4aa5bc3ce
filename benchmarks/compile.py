"""Seconds to trace, lower and compile a prefill: a list of layers, and stacked layers that a scan runs.

The shape is Llama 3's at narrow widths, so that the number of layers decides. Nothing is run.

  python benchmarks/compile.py
  python benchmarks/compile.py --rounds 1 --cache
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from models_core.loading import abstract_model
from models_llama.llama3.model import Llama3, ModelConfig

WIDTHS = {
  "vocab_size": 256,
  "embed_dim": 64,
  "hidden_dim": 128,
  "num_heads": 4,
  "num_kv_heads": 2,
  "head_dim": 16,
}
B, T = 1, 128


def seconds(layers: int, scan: bool, cache: bool) -> float:
  """Time from the call of `jit` to the compiled program, without a cache of programs."""
  config = dataclasses.replace(ModelConfig.llama3p1_8b(), **WIDTHS, num_layers=layers, scan_layers=scan)
  model = abstract_model(Llama3, config)
  parameters = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in model.parameters.items()}

  def prefill(parameters, tokens):
    lm = model.fill(parameters)
    return lm(tokens, cache=lm.init_cache(B, 2 * T) if cache else None)

  jax.clear_caches()
  start = time.perf_counter()
  jax.jit(prefill).lower(parameters, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile()
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--cache", action="store_true", help="the prefill fills a KV cache")
  arguments = parser.parse_args()
  variants = {
    "16 layers, stacked": functools.partial(seconds, 16, True),
    "80 layers, stacked": functools.partial(seconds, 80, True),
    "80 layers, a list": functools.partial(seconds, 80, False),
  }
  found = {name: [] for name in variants}
  seconds(1, False, arguments.cache)
  for _ in range(arguments.rounds):
    for name, run in variants.items():
      found[name].append(run(arguments.cache))
  least = {name: min(times) for name, times in found.items()}
  print("| variant | min s | / 16 stacked | / 80 list |\n|---|---|---|---|")
  for name, time_taken in least.items():
    ratios = (time_taken / least[other] for other in ("16 layers, stacked", "80 layers, a list"))
    print(f"| {name} | {time_taken:.2f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


if __name__ == "__main__":
  main()
