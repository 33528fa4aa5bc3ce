"""A family with what an adapter can change besides matrices: an embedding and a head, which may be one, biases, norms."""

import dataclasses

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from models_core.dummy_model_creator import create_dummy_model
from models_core.family import Family
from models_core.layers import dotted
from models_core.weights import Form, Tied, WeightTable

from .tiny import Leaves

V, D, F = 12, 8, 10
PREFIXES = ("model.", "model.language_model.")
L = "layers.{i}"


def _forms(name, layout):
  return [Form(prefix + name, layout) for prefix in PREFIXES]


TABLE = WeightTable(
  ("embed.w", _forms("embed_tokens.weight", "v d")),
  (f"{L}.norm.w", _forms(f"{L}.norm.weight", "d")),
  (f"{L}.q_proj.w", _forms(f"{L}.q_proj.weight", "f d")),
  (f"{L}.q_proj.b", _forms(f"{L}.q_proj.bias", "f")),
  (f"{L}.o_proj.w", _forms(f"{L}.o_proj.weight", "d f")),
  ("head.w", "lm_head.weight", "v d"),
  tied=[Tied("lm_head.weight", f"{prefix}embed_tokens.weight") for prefix in PREFIXES],
)


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int = V
  num_layers: int = 2
  weight_tying: bool = False


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.norm = Leaves(rngs, w=((D,), P()))
    self.q_proj = Leaves(rngs, w=((F, D), P("tp", "fsdp")), b=((F,), P("tp")))
    self.o_proj = Leaves(rngs, w=((D, F), P("fsdp", "tp")))


class Model(nnx.Module):
  def __init__(self, config, *, rngs):
    self.config = config
    self.embed = Leaves(rngs, w=((config.vocab_size, D), P("tp", "fsdp")))
    self.layers = nnx.List([Layer(rngs) for _ in range(config.num_layers)])
    if not config.weight_tying:
      self.head = Leaves(rngs, w=((config.vocab_size, D), P("tp", "fsdp")))


FAMILY = Family(
  name="pair",
  model_types=("pair",),
  model_class=Model,
  config_class=Config,
  read_config=lambda raw: Config(raw["vocab_size"], 2, raw["tie_word_embeddings"]),
  write_config=lambda config: {
    "model_type": "pair",
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.weight_tying,
  },
  weights={"huggingface": TABLE},
)


def plain(config, mesh=None, dtype="float32"):
  """A model without factors."""
  return create_dummy_model(Model, config, mesh, dtype=dtype, random_seed=0, scale=0.3)


def arrays(model):
  """Parameters by name, on the host."""
  return {dotted(p): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
