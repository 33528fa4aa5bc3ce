"""A prefill and a decode step against google-tunix and transformers: the shape of Qwen 2.5 0.5B on the CPU.

Each library runs in a process of its own, all of them in turn, with random weights. A decode step cannot be faster than
one pass over the weights, which is timed as well. A prefill asks for the logits of its last position alone, where the
library can leave out the others: google-tunix' Qwen 2 cannot. Caches are donated. With `--train`, a training step by
stochastic gradient descent is timed as well, the loss of the next tokens as each library computes it; transformers is
left out.

  python benchmarks/steps.py
  python benchmarks/steps.py --cache 16384 --prefill 4096 --dtype bfloat16
  python benchmarks/steps.py --train 256

Needs google-tunix, torch and transformers beside models-qwen; those that are missing are left out.
"""

import argparse
import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time

STEPS = 16
# Numbers that the command's options set: slots of the cache, and tokens of the prefill.
CACHE, PREFILL, DTYPE, TRAIN = 512, 128, "float32", 0
VARIANTS = {
  "weights read once": "models_qwen",
  "models-qwen": "models_qwen",
  "google-tunix": "tunix",
  "transformers": "torch",
}


def fastest(call, rounds):
  """Seconds of the fastest of some calls, after one that compiles."""
  call()
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return min(times)


def ours(layers):
  """Seconds of a decode step and of a prefill."""
  from models_core.dummy_model_creator import create_dummy_model
  from models_core.layers import mean_cross_entropy
  from models_qwen.qwen2.model import ModelConfig, Qwen2

  model = create_dummy_model(Qwen2, _config(ModelConfig.qwen2p5_0p5b(), layers), dtype=DTYPE)

  def loss(model, tokens):
    return mean_cross_entropy(model(tokens)[0][:, :-1], tokens[:, 1:])

  return _jax_times(model, model.init_cache(1, CACHE), lambda end, T: None, loss)


def tunix(layers):
  """The same of tunix' model, which takes a mask over all slots of the cache."""
  import jax
  import jax.numpy as jnp
  import optax
  from flax import nnx
  from tunix.models.qwen2.model import ModelConfig, Qwen2

  config = _config(ModelConfig.qwen2p5_0p5b(), layers)
  model = Qwen2(config, rngs=nnx.Rngs(0))
  nnx.update(model, jax.tree.map(lambda x: x.astype(DTYPE), nnx.state(model, nnx.Param)))
  slots = (1, CACHE, config.num_kv_heads, config.head_dim)
  empty = lambda: jnp.zeros(slots, DTYPE)
  layer = lambda: {"k": empty(), "v": empty(), "end_index": jnp.zeros(1, jnp.int32)}
  cache = {f"layer_{i}": layer() for i in range(config.num_layers)}
  mask = lambda end, T: jnp.arange(CACHE)[None, None] <= end + jnp.arange(T)[None, :, None]

  def loss(model, tokens):
    causal = jnp.tril(jnp.ones((TRAIN, TRAIN), bool))[None]
    logits, _ = model(tokens, jnp.arange(TRAIN)[None], None, causal)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()

  return _jax_times(model, cache, mask, loss)


def _config(config, layers):
  import dataclasses

  return config if layers is None else dataclasses.replace(config, num_layers=layers)


def _jax_times(model, cache, mask, loss):
  import jax
  import jax.numpy as jnp
  from flax import nnx

  graphdef, state = nnx.split(model)
  can_skip = "decode_only_last_token" in inspect.signature(type(model).__call__).parameters
  last_alone = {"decode_only_last_token": True} if can_skip else {}

  @jax.jit
  def prefill(state, cache, tokens):
    positions = jnp.arange(PREFILL)[None]
    logits, cache = nnx.merge(graphdef, state)(tokens, positions, cache, mask(0, PREFILL), **last_alone)
    return logits[:, -1:], cache

  @functools.partial(jax.jit, donate_argnums=1)
  def decode(state, cache, token, end):
    logits, cache = nnx.merge(graphdef, state)(token, end[None, None], cache, mask(end, 1))
    return jnp.argmax(logits, -1), cache

  tokens = jnp.ones((1, PREFILL), jnp.int32)
  prefilled = prefill(state, cache, tokens)[1]

  def steps():
    cache, token = jax.block_until_ready((jax.tree.map(jnp.copy, prefilled), tokens[:, :1]))
    start = time.perf_counter()
    for step in range(STEPS):
      token, cache = decode(state, cache, token, jnp.int32(PREFILL + step))
    jax.block_until_ready(token)
    return time.perf_counter() - start

  steps()
  found = [
    min(steps() for _ in range(3)) / STEPS,
    fastest(lambda: jax.block_until_ready(prefill(state, cache, tokens)[0]), 3),
  ]
  return [*found, _training_step(graphdef, state, loss)] if TRAIN else found


def _training_step(graphdef, state, loss):
  """Seconds of a step that changes the state in place."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, tokens):
    value, gradients = jax.value_and_grad(lambda state: loss(nnx.merge(graphdef, state), tokens))(state)
    return value, jax.tree.map(lambda x, dx: x - (1e-3 * dx).astype(x.dtype), state, gradients)

  tokens = jnp.arange(TRAIN, dtype=jnp.int32)[None]

  def run():
    nonlocal state
    value, state = step(state, tokens)
    jax.block_until_ready((value, state))

  return fastest(run, 3)


def transformers(layers):
  """The same of transformers' model."""
  import torch
  from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

  config = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers or 24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=CACHE,
  )  # fmt: skip
  model = Qwen2ForCausalLM(config).eval().to(getattr(torch, DTYPE))
  tokens = torch.ones((1, PREFILL), dtype=torch.long)
  cache = lambda: StaticCache(
    config=config, max_batch_size=1, max_cache_len=CACHE, dtype=getattr(torch, DTYPE)
  )

  @torch.no_grad()
  def prefill():
    held = cache()
    model(tokens, past_key_values=held, cache_position=torch.arange(PREFILL), logits_to_keep=1)
    return held

  @torch.no_grad()
  def steps():
    held, token = prefill(), tokens[:, :1]
    start = time.perf_counter()
    for step in range(STEPS):
      logits = model(token, past_key_values=held, cache_position=torch.tensor([PREFILL + step])).logits
      token = logits.argmax(-1)
    return time.perf_counter() - start

  return min(steps() for _ in range(3)) / STEPS, fastest(prefill, 3)


def weights_read_once(layers):
  """Seconds of a sum over all weights, for both."""
  import jax
  from flax import nnx

  from models_core.dummy_model_creator import create_dummy_model
  from models_qwen.qwen2.model import ModelConfig, Qwen2

  state = nnx.state(create_dummy_model(Qwen2, _config(ModelConfig.qwen2p5_0p5b(), layers), dtype=DTYPE))
  total = jax.jit(lambda state: sum(x.sum() for x in jax.tree.leaves(state)))
  return (fastest(lambda: jax.block_until_ready(total(state)), 5),) * 2


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--layers", type=int, help="of the model; all 24 if left out")
  parser.add_argument("--cache", type=int, default=CACHE, help="slots of the cache")
  parser.add_argument("--prefill", type=int, default=PREFILL, help="tokens of the prefill")
  parser.add_argument("--train", type=int, default=TRAIN, help="tokens of a training step; 0 leaves it out")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=DTYPE)
  parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  globals().update(CACHE=args.cache, PREFILL=args.prefill, DTYPE=args.dtype, TRAIN=args.train)
  if args.variant:
    run = {"models-qwen": ours, "google-tunix": tunix, "transformers": transformers}
    print(json.dumps(run.get(args.variant, weights_read_once)(args.layers)))
    return
  found: dict[str, list[list[float]]] = {}
  for _ in range(args.rounds):
    for variant, package in VARIANTS.items():
      if importlib.util.find_spec(package) is None or (
        args.train and variant in ("transformers", "weights read once")
      ):
        continue
      command = [sys.executable, "-W", "ignore", __file__, "--variant", variant]
      command += [
        f"--cache={args.cache}",
        f"--prefill={args.prefill}",
        f"--dtype={args.dtype}",
        f"--train={args.train}",
      ]
      command += [] if args.layers is None else ["--layers", str(args.layers)]
      out = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
      )
      found.setdefault(variant, []).append(json.loads(out.stdout.splitlines()[-1]))
  columns = ["decode ms", "prefill ms", *(["training step ms"] if args.train else [])]
  print("| variant |", *(f"{column} |" for column in columns))
  print("|---|" + "---|" * len(columns))
  for variant, times in found.items():
    print(f"| {variant} |", *(f"{1e3 * min(column):.1f} |" for column in zip(*times, strict=True)))


if __name__ == "__main__":
  main()
