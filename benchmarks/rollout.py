"""Hands the weights of a trainer's model to a sampler's, on the devices and by files: seconds, and memory beside the models.

Each measurement is a fresh process with two models of one shape. What the sampler has at the end is compared with what
the trainer has.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from load import PeakMemory, ready, touch

RANK, ALPHA = 16, 32.0

# name -> whether the trainer's model has LoRA factors.
SHAPES = {"llama 1B": False, "llama 1B, LoRA": True, "qwen 1B, 64 experts": False}


def config_of(shape: str, layers: int | None):
  """The configuration, and the family."""
  import dataclasses

  if shape.startswith("llama"):
    from models_llama.llama3 import FAMILY
    from models_llama.llama3.model import ModelConfig

    config = ModelConfig.llama3p2_1b()
  else:
    from models_qwen.qwen3 import FAMILY
    from models_qwen.qwen3.model import ModelConfig

    config = dataclasses.replace(
      ModelConfig.qwen3_30b_a3b(), num_layers=4, num_experts=64, vocab_size=32768, use_tied_embedding=True
    )
  return dataclasses.replace(config, num_layers=layers or config.num_layers), FAMILY


def add_factors(model) -> None:
  """LoRA factors beside all projections of all layers."""
  import jax
  from flax import nnx

  for layer in model.layers:
    for block in (layer.attn, layer.mlp):
      for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        if (projection := getattr(block, name, None)) is not None:
          out, into = projection.w.get_value().shape
          keys = jax.random.split(jax.random.key(out))
          for side, key, shape in zip("ab", keys, ((into, RANK), (RANK, out)), strict=True):
            factor = jax.random.normal(key, shape, "bfloat16") * 0.1
            setattr(projection, f"w_lora_{side}", nnx.LoRAParam(factor))


def measure(shape: str, layers: int | None, devices: int) -> dict[str, dict[str, float]]:
  """Seconds and bytes of each step."""
  import jax

  from models_automodel import AutoModel, digest, from_checkpoint, iter_checkpoint, lazy_checkpoint
  from models_core.adapters import merge_lora
  from models_core.dummy_model_creator import create_dummy_model

  config, family = config_of(shape, layers)
  mesh = jax.make_mesh((1, devices), ("fsdp", "tp"))
  trainer, sampler = (
    create_dummy_model(family.model_class, config, mesh, dtype="bfloat16", random_seed=seed)
    for seed in range(2)
  )
  alpha = ALPHA if SHAPES[shape] else None
  if alpha:
    add_factors(trainer)
  ready(trainer), ready(sampler)
  sizes = [np.prod(one.shape) * 2 for one in lazy_checkpoint(trainer, alpha=alpha).shapes.values()]
  found = {"": {"model": float(sum(sizes)), "largest": float(max(sizes))}}

  def timed(step: str, run: Callable[[], None]) -> None:
    touch(2 * max(sizes))
    peak = PeakMemory()
    peak.start()
    start = time.perf_counter()
    run()
    found[step] = {"seconds": time.perf_counter() - start, "peak": float(peak.more)}

  def walk() -> None:
    for _, array in iter_checkpoint(trainer, alpha=alpha):
      array.block_until_ready()
      del array

  def hand_over() -> None:
    from_checkpoint(sampler, lazy_checkpoint(trainer, alpha=alpha))
    ready(sampler)

  with tempfile.TemporaryDirectory() as directory:

    def by_files() -> None:
      model = merge_lora(trainer, family, alpha=alpha) if alpha else trainer
      AutoModel.save_pretrained(model, directory, progress=False, overwrite=True)
      ready(AutoModel.from_pretrained(directory, mesh, progress=False)[0])

    for step, run in (("iter_checkpoint", walk), ("from_checkpoint", hand_over)):
      timed(f"{step}, first", run)
      timed(step, run)
    timed("by files", by_files)
  expected = merge_lora(trainer, family, alpha=alpha) if alpha else trainer
  if digest(sampler) != digest(expected):
    sys.exit(f"{shape}: the sampler has other weights than the trainer")
  return found


def main() -> None:
  """Measures in turns, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
  parser.add_argument("--layers", type=int, help="fewer than the shape has")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], help="faked, on this machine's cores")
  parser.add_argument("--measure", choices=SHAPES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.measure, args.layers, args.devices[0])))
    return
  print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
  for shape in args.shapes:
    for devices in args.devices:
      command = [sys.executable, __file__, "--measure", shape, "--devices", str(devices)]
      command += ["--layers", str(args.layers)] if args.layers else []
      flags = f"--xla_force_host_platform_device_count={devices}"
      environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
      rows = []
      for _ in range(args.rounds):
        done = subprocess.run(
          command, stdout=subprocess.PIPE, text=True, env=environment, cwd=pathlib.Path(__file__).parent
        )
        if done.returncode:
          sys.exit(f"{shape} on {devices} devices failed with exit code {done.returncode}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
      sizes = rows[0].pop("")
      print(
        f"\n{shape}, {devices} device{'s' * (devices > 1)}: {sizes['model'] / 10**9:.2f} GB, "
        f"the largest tensor has {sizes['largest'] / 10**6:.0f} MB"
      )
      print(f"{'':24}   min s   peak MB   / largest")
      for step in rows[0]:
        seconds, peak = (
          least(row[step][what] for row in rows) for least, what in ((min, "seconds"), (max, "peak"))
        )
        print(f"{step:24}{seconds:8.3f}{peak / 10**6:10.0f}{peak / sizes['largest']:12.2f}")


if __name__ == "__main__":
  main()
