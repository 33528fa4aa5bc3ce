"""The experts of a sparse layer against the dense form, which sends every token through every expert.

Then single products of rows in E groups: grouped, with all experts, and with one matrix alone.

Both are compiled, run in turns on the same arrays, and compared. The ratio of their fastest runs says how much the
sparse form saves; with E experts, n of them for each token, no form can save more than E / n.

  uv run python benchmarks/moe.py
  uv run python benchmarks/moe.py --experts 128 --per-token 8 --embed 2048 --hidden 768 --dtype bfloat16
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
from flax import nnx

from models_core.layers.grouped import grouped_dot
from models_core.layers.moe import Experts
from models_core.sharding import ShardingConfig

# Tokens of a call: decoding, and prefills or training steps.
TOKENS = (1, 8, 64, 512)


def dense(x, experts, weights, gate, up, down):
  """[T, D] -> [T, D]; one expert after the other, so that memory doesn't grow with their number."""

  def add(out, expert):
    number, gate, up, down = expert
    weight = jnp.sum(jnp.where(experts == number, weights, 0), -1)[:, None].astype(x.dtype)
    hidden = jax.nn.silu(x @ gate.T) * (x @ up.T)
    return out + (hidden @ down.T) * weight, None

  numbers = jnp.arange(gate.shape[0], dtype=experts.dtype)
  return jax.lax.scan(add, jnp.zeros_like(x), (numbers, gate, up, down))[0]


def fastest(functions, args, rounds: int) -> list[float]:
  """Seconds of each function's fastest run, measured in turns."""
  for function in functions:
    jax.block_until_ready(function(*args))
  times: list[list[float]] = [[] for _ in functions]
  for _ in range(rounds):
    for function, seconds in zip(functions, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(function(*args))
      seconds.append(time.perf_counter() - start)
  return [min(seconds) for seconds in times]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--experts", type=int, default=64, help="E")
  parser.add_argument("--per-token", type=int, default=8, help="n")
  parser.add_argument("--embed", type=int, default=1024, help="D")
  parser.add_argument("--hidden", type=int, default=384, help="F")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  E, n, D, F = args.experts, args.per_token, args.embed, args.hidden

  module = Experts(E, D, F, jax.nn.silu, ShardingConfig.get_default_sharding(), rngs=nnx.Rngs(0))
  stacks = [w[...].astype(args.dtype) for w in (module.gate_proj, module.up_proj, module.down_proj)]

  def sparse(x, experts, weights, gate, up, down):
    copy = nnx.clone(module)
    for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
      getattr(copy, name).set_value(value)
    return copy(x[None], experts[None], weights[None])[0]

  def gradient(function):
    def loss(x, experts, weights, *stacks):
      return jnp.sum(function(x, experts, weights, *stacks).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, (0, 3, 4, 5)))

  print(
    f"load {os.getloadavg()[0]:.1f}, {jax.devices()[0].device_kind}, {args.dtype}, E={E}, n={n}, D={D}, F={F}; at best {E / n:.1f} x"
  )
  print(
    f"{'tokens':>7} {'pass':>9} {'dense ms':>9} {'sparse ms':>10} {'dense / sparse':>15} {'difference':>11}"
  )
  for T in TOKENS:
    keys = jax.random.split(jax.random.key(T), 2)
    x = jax.random.normal(keys[0], (T, D), args.dtype)
    weights, experts = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[1], (T, E))), n)
    inputs = (x, experts, weights, *stacks)
    for name, forms in (
      ("forward", [jax.jit(dense), jax.jit(sparse)]),
      ("gradient", [gradient(dense), gradient(sparse)]),
    ):
      slow, fast = fastest(forms, inputs, args.rounds)
      results = [jax.tree.leaves(form(*inputs))[0].astype(jnp.float32) for form in forms]
      difference = float(jnp.abs(results[0] - results[1]).max() / jnp.abs(results[0]).max())
      print(
        f"{T:>7} {name:>9} {slow * 1e3:>9.1f} {fast * 1e3:>10.1f} {slow / fast:>15.2f} {difference:>11.1e}"
      )

  products(stacks[0], args.rounds)


def products(stack, rounds: int) -> None:
  """One product of rows in E groups, and its gradient by rows and matrices, in each form; a line for each size."""
  E, _, D = stack.shape

  def all_experts(rows, stack, sizes):
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
    products = jnp.einsum("md,efd->emf", rows, stack)
    return jnp.sum(jnp.where((group == jnp.arange(E)[:, None])[..., None], products, 0), axis=0)

  forms = [grouped_dot, all_experts, lambda rows, stack, sizes: rows @ stack[0].T]

  def gradient(form):
    loss = lambda rows, stack, sizes: jnp.sum(form(rows, stack, sizes).astype(jnp.float32) ** 2)
    return jax.jit(jax.grad(loss, (0, 1)))

  print(f"one product, load {os.getloadavg()[0]:.1f}")
  print(
    f"{'rows':>7} {'pass':>9} {'grouped ms':>11} {'all experts / grouped':>22} {'grouped / one matrix':>21}"
  )
  for M in (E, 8 * E, 64 * E):
    keys = jax.random.split(jax.random.key(M), 2)
    rows = jax.random.normal(keys[0], (M, D), stack.dtype)
    sizes = jnp.bincount(jax.random.randint(keys[1], (M,), 0, E), length=E).astype(jnp.int32)
    for name, wrapped in (("forward", map(jax.jit, forms)), ("gradient", map(gradient, forms))):
      grouped, every, one = fastest(list(wrapped), (rows, stack, sizes), rounds)
      print(f"{M:>7} {name:>9} {grouped * 1e3:>11.1f} {every / grouped:>22.2f} {grouped / one:>21.2f}")


if __name__ == "__main__":
  main()
