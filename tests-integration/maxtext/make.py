"""Writes the trees and logits beside this file with MaxText 0.2.5, and computes the logits of other trees with it.

  python make.py write          writes all of them
  python make.py check NAME DIR  compares MaxText's logits of another tree of a variant with those beside this file

It needs an environment of its own: Python 3.12 and `pip install maxtext==0.2.5`, with as many of MaxText's
requirements as its models import.
"""

import os
import pathlib
import shutil
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from flax.training import train_state
from maxtext.common import checkpointing, train_state_nnx
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils

HERE = pathlib.Path(__file__).parent
SIZES = {
  "base_emb_dim": 8,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 2,
  "base_num_decoder_layers": 3,
  "base_mlp_dim": 12,
  "head_dim": 4,
  "vocab_size": 16,
  "normalization_layer_epsilon": 1e-5,
  "rope_max_timescale": 10_000,
  "mlp_activations": '["silu","linear"]',
}
UNTIED = {"logits_via_embedding": False}
TIED = {"logits_via_embedding": True, "normalize_embedding_logits": False}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "base_moe_mlp_dim": 12, "norm_topk_prob": True}
VARIANTS = {
  "llama3": {"decoder_block": "llama2", **UNTIED},
  "llama3.1": {"decoder_block": "llama2", "rope_type": "llama3.1", **UNTIED},
  "llama3.1-unscanned": {"decoder_block": "llama2", "rope_type": "llama3.1", "scan_layers": False, **UNTIED},
  "qwen2": {"decoder_block": "qwen2", "attention_bias": True, "use_qk_norm": False, **TIED},
  "qwen3": {"decoder_block": "qwen3", "use_qk_norm": True, **TIED},
  "qwen3-moe": {
    "decoder_block": "qwen3_moe",
    "use_qk_norm": True,
    "sparse_matmul": False,
    **EXPERTS,
    **UNTIED,
  },
}
EVERYWHERE = {
  "run_name": "golden",
  "enable_checkpointing": False,
  "dtype": "float32",
  "weight_dtype": "float32",
  "per_device_batch_size": 1,
  "max_target_length": 8,
  "attention": "dot_product",
  "matmul_precision": "highest",
  "hardware": "cpu",
  "skip_jax_distributed_system": True,
  "override_model_config": True,
}


def config_of(name):
  base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
  options = EVERYWHERE | SIZES | VARIANTS[name]
  return pyconfig.initialize(["make.py", base, *(f"{key}={value}" for key, value in options.items())])


def model_of(config):
  """A model in which no parameter has a constant."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(params=0, dropout=1))
  rng = np.random.default_rng(0)
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  for path, variable in flat:
    value = variable.get_value()
    value = value + jnp.asarray(rng.normal(size=value.shape, scale=0.1), jnp.float32)
    # MaxText rounds the embedding to bfloat16 where it is the head.
    variable.set_value(value.astype(jnp.bfloat16).astype(jnp.float32) if path[-1] == "embedding" else value)
  nnx.update(model, nnx.from_flat_state(flat))
  return model, mesh


def logits(model, mesh, tokens):
  with jax.set_mesh(mesh):
    positions = jnp.arange(tokens.shape[1])[None]
    segments = jnp.ones(tokens.shape, jnp.int32)
    found = model(jnp.asarray(tokens), positions, decoder_segment_ids=segments, enable_dropout=False)
  return np.asarray(found[0] if isinstance(found, tuple) else found, np.float32)


def write(name):
  config = config_of(name)
  model, mesh = model_of(config)
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 8)).astype(np.int32)
  target = HERE / name
  shutil.rmtree(target, ignore_errors=True)
  tree = train_state_nnx.to_checkpoint_dict(nnx.State({"model": nnx.state(model)}))
  # As in a training run, the optimizer has an array for each parameter.
  state = train_state.TrainState(
    step=0, apply_fn=None, params=tree["params"], tx=None, opt_state={"mu": {"decoder": jnp.ones(3)}}
  )
  manager = checkpointing.create_orbax_checkpoint_manager(
    str(target), True, False, 1, use_ocdbt=True, use_zarr3=True, enable_continuous_checkpointing=True
  )
  assert checkpointing.save_checkpoint(manager, 0, state, config=config)
  checkpointing.wait_until_finished(manager)
  for finished in target.rglob("commit_success.txt"):
    # Its text, which nobody reads, names the directory.
    finished.write_text("complete\n")
  np.savez(target / "logits.npz", tokens=tokens, logits=logits(model, mesh, tokens))


def check(name, directory):
  model, mesh = model_of(config_of(name))
  state = nnx.state(model, nnx.Param)
  # Whatever is not restored stays infinite.
  state = jax.tree.map(lambda value: jnp.full_like(value, jnp.inf), state)
  nnx.update(model, checkpointing.load_params_from_path(os.path.abspath(directory), state, 8))
  golden = np.load(HERE / name / "logits.npz")
  difference = np.abs(logits(model, mesh, golden["tokens"]) - golden["logits"]).max()
  print(f"{name}: MaxText's logits differ by at most {difference}")
  assert difference < 1e-5


if __name__ == "__main__":
  if sys.argv[1] == "check":
    check(*sys.argv[2:])
  else:
    for variant in VARIANTS:
      write(variant)
