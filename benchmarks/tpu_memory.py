"""Memory of a gradient on TPU v5e, by the account of its compiler, without a TPU.

The shape is Llama 3.2 1B's with 4 layers, bfloat16, 8 sequences of 1024 tokens, on 2 x 2 devices: logits, the loss of the
next tokens, and the gradient of all weights, sharded as these. Compiling a variant takes a minute or more.

  pip install --no-deps --target DIR libtpu==0.0.42    # 650 MB, for jax 0.10.2: the version that jax's extra `tpu` names
  python benchmarks/tpu_memory.py --libtpu DIR

Needs google-tunix beside models-llama; without it, its row is left out.
"""

import argparse
import dataclasses
import importlib.util
import os

B, T, LAYERS = 8, 1024, 4


def devices(libtpu: str):
  """Four devices that programs can be compiled for."""
  # Read when jax is imported.
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LIBRARY_PATH": os.path.join(libtpu, "libtpu", "libtpu.so"),
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
  }
  from jax.experimental import topologies

  return topologies.get_topology_desc("v5e:2x2", "tpu").devices


def optax_loss(logits, targets):
  import optax

  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def our_loss(logits, targets):
  from models_core.layers import mean_cross_entropy

  return mean_cross_entropy(logits, targets)


def ours(mesh, loss, remat="NONE", act_btv=None):
  """A function of parameters and tokens, the parameters, and the calls' loss."""
  import jax
  import jax.numpy as jnp

  from models_core.layers import RematConfig
  from models_core.loading import abstract_model
  from models_llama.llama3.model import Llama3, ModelConfig

  config = ModelConfig.llama3p2_1b()
  config = dataclasses.replace(
    config,
    num_layers=LAYERS,
    remat_config=RematConfig[remat],
    shd_config=dataclasses.replace(config.shd_config, act_btv=act_btv),
  )
  abstract = abstract_model(Llama3, config, mesh)
  parameters = {
    name: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=p.sharding)
    for name, p in abstract.parameters.items()
  }

  def call(parameters, tokens):
    logits, _ = abstract.fill(parameters)(tokens, jnp.broadcast_to(jnp.arange(T), (B, T)))
    return loss(logits[:, :-1], tokens[:, 1:])

  return call, parameters


def tunix(mesh, loss, remat="NONE"):
  """The same of tunix' model."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax.sharding import NamedSharding, PartitionSpec
  from tunix.models.llama3 import model as lib

  # It constrains activations only where the host's own devices are no CPUs.
  lib.shard = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
  config = dataclasses.replace(
    lib.ModelConfig.llama3p2_1b(), num_layers=LAYERS, remat_config=lib.RematConfig[remat]
  )
  with nnx.use_eager_sharding(False):
    model = nnx.eval_shape(lambda: lib.Llama3(config, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  parameters = jax.tree.map(
    lambda p, sharding: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=sharding),
    nnx.to_pure_dict(state),
    nnx.to_pure_dict(nnx.get_named_sharding(state, mesh)),
  )

  def call(parameters, tokens):
    copy = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(copy, parameters)
    positions, causal = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.tril(jnp.ones((1, T, T), bool))
    logits, _ = nnx.merge(graphdef, copy)(tokens, positions, None, causal)
    return loss(logits[:, :-1], tokens[:, 1:])

  return call, parameters


SHARDED = ("fsdp", None, "tp")
# name -> model, kind of axes, loss, arguments of the model
VARIANTS = {
  "optax": (ours, "Auto", optax_loss, {}),
  "optax, act_btv": (ours, "Auto", optax_loss, {"act_btv": SHARDED}),
  "cross_entropy": (ours, "Auto", our_loss, {}),
  "cross_entropy, act_btv": (ours, "Auto", our_loss, {"act_btv": SHARDED}),
  "Explicit, optax": (ours, "Explicit", optax_loss, {}),
  "Explicit, cross_entropy": (ours, "Explicit", our_loss, {}),
  "Explicit, cross_entropy, act_btv": (ours, "Explicit", our_loss, {"act_btv": SHARDED}),
  "google-tunix, optax": (tunix, "Auto", optax_loss, {}),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--libtpu", required=True, help="directory that libtpu was installed in")
  parser.add_argument("--remat", default="NONE", help="RematConfig of all variants")
  parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
  args = parser.parse_args()
  grid = devices(args.libtpu)

  import jax
  import numpy as np
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  print("| variant | temporaries GB | read and written GB |\n|---|---|---|")
  for name in args.variants:
    model, kind, loss, arguments = VARIANTS[name]
    if model is tunix and importlib.util.find_spec("tunix") is None:
      continue
    mesh = Mesh(np.array(grid).reshape(2, 2), ("fsdp", "tp"), axis_types=(AxisType[kind],) * 2)
    call, parameters = model(mesh, loss, args.remat, **arguments)
    tokens = jax.ShapeDtypeStruct((B, T), np.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    out = (NamedSharding(mesh, PartitionSpec()), jax.tree.map(lambda p: p.sharding, parameters))
    program = jax.jit(jax.value_and_grad(call), out_shardings=out).lower(parameters, tokens).compile()
    cost = program.cost_analysis()["bytes accessed"]
    print(
      f"| {name} | {program.memory_analysis().temp_size_in_bytes / 1e9:.2f} | {cost / 1e9:.1f} |", flush=True
    )


if __name__ == "__main__":
  main()
