import dataclasses

import numpy as np
import pytest
from flax import nnx

from models_core.rope_scaling import Llama3Scaling
from models_core.testing import FamilyContract
from models_llama.llama3 import FAMILY
from models_llama.llama3.model import ModelConfig


class TestLlama3(FamilyContract):
  family = FAMILY
  config = ModelConfig(
    num_layers=2,
    vocab_size=67,
    embed_dim=48,
    hidden_dim=60,
    num_heads=6,
    head_dim=10,
    num_kv_heads=3,
    rope_theta=700.0,
    norm_eps=1e-3,
    rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 8),
  )
  changes = {
    "num_layers": 3,
    "vocab_size": 71,
    "embed_dim": 40,
    "hidden_dim": 64,
    "num_heads": 9,
    "head_dim": 12,
    "num_kv_heads": 2,
    "rope_theta": 20.0,
    "norm_eps": 0.2,
    "rope_scaling": dataclasses.replace(config.rope_scaling, factor=64.0),
    "weight_tying": True,
    "attention_bias": True,
    "mlp_bias": True,
  }


class TestBiases(FamilyContract):
  """All projections have biases."""

  family = FAMILY
  config = dataclasses.replace(TestLlama3.config, attention_bias=True, mlp_bias=True)
  changes = TestLlama3.changes | {"attention_bias": False, "mlp_bias": False}


def test_a_seed_gives_the_same_model_in_every_version():
  model = FAMILY.model_class(TestLlama3.config, rngs=nnx.Rngs(0))
  values = {
    ".".join(map(str, path)): np.ravel(variable.get_value())[0]
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  # First value of each parameter, which depends on the order in which all parameters draw.
  expected = {
    "embedder.input_embedding": 0.0200803,
    "layers.1.attn.q_proj.w": 0.00190253,
    "layers.1.attn.k_proj.w": -0.0102764,
    "layers.1.attn.v_proj.w": -0.011518,
    "layers.1.attn.o_proj.w": -0.0187484,
    "layers.1.mlp.gate_proj.w": -0.019858,
    "layers.1.mlp.up_proj.w": -0.0060655,
    "layers.1.mlp.down_proj.w": 0.00366574,
    "lm_head.w": -0.00831582,
  }
  assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
