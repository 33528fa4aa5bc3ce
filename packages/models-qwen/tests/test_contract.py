import dataclasses

import numpy as np
import pytest
from flax import nnx

from models_core.rope_scaling import YarnScaling
from models_core.testing import FamilyContract
from models_qwen import qwen2, qwen3
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen3.model import ModelConfig as Qwen3Config

FIELDS = {
  "num_layers": 2,
  "vocab_size": 67,
  "embed_dim": 48,
  "hidden_dim": 60,
  "num_heads": 6,
  "head_dim": 10,
  "num_kv_heads": 3,
  "rope_theta": 700.0,
  "norm_eps": 1e-3,
  "rope_scaling": YarnScaling(4.0, 8, beta_fast=3.0, beta_slow=0.5),
  "sliding_window": 3,
  "max_window_layers": 1,
}
CHANGES = {
  "num_layers": 3,
  "vocab_size": 71,
  "embed_dim": 40,
  "hidden_dim": 64,
  "num_heads": 9,
  "head_dim": 12,
  "num_kv_heads": 2,
  "rope_theta": 20.0,
  "norm_eps": 0.2,
  "rope_scaling": dataclasses.replace(FIELDS["rope_scaling"], attention_factor=2.0),
  "use_tied_embedding": True,
  "sliding_window": 2,
  "max_window_layers": 0,
}
EXPERTS = {
  "num_experts": 6,
  "num_experts_per_tok": 2,
  "moe_hidden_dim": 20,
  "norm_topk_prob": False,
  "decoder_sparse_step": 2,
  "mlp_only_layers": (1,),
}
SPARSE = Qwen3Config(**FIELDS | EXPERTS | {"num_layers": 4, "max_window_layers": 0})


class TestQwen2(FamilyContract):
  family = qwen2.FAMILY
  config = Qwen2Config(**FIELDS)
  changes = CHANGES


class TestQwen3(FamilyContract):
  family = qwen3.FAMILY
  config = Qwen3Config(**FIELDS)
  changes = CHANGES
  others = (SPARSE,)


class TestQwen3Sparse(FamilyContract):
  """Layers 0 and 2 are dense by decoder_sparse_step, layer 1 by mlp_only_layers."""

  family = qwen3.FAMILY
  config = SPARSE
  # Dense and sparse layers in turn after two dense ones.
  deep = {"num_layers": 6, "mlp_only_layers": (1,)}
  changes = {name: value for name, value in CHANGES.items() if name != "max_window_layers"} | {
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "moe_hidden_dim": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 3,
    "mlp_only_layers": (),
  }
  # Every layer slides, or none.
  others = (TestQwen3.config,)


@pytest.mark.parametrize(
  ("window", "first", "windows"),
  [(3, 1, (None, 3)), (3, 0, (3, 3)), (3, 2, (None, None)), (None, 0, (None, None)), (3, 9, (None, None))],
)
@pytest.mark.parametrize("contract", [TestQwen2, TestQwen3])
def test_windows_are_those_of_the_layers_and_rings_have_as_many_slots(contract, window, first, windows):
  config = dataclasses.replace(contract.config, sliding_window=window, max_window_layers=first)
  model = contract.make(config)
  assert model.windows() == windows
  cache = model.init_cache(2, 16, ring=True)
  assert [layer["k"].shape[-1] for layer in cache.values()] == [window or 16 for window in windows]


# First value of parameters that draw from nnx.Rngs(0), which depends on the order in which all parameters draw.
INITIAL = {
  "embedder.input_embedding": (0.0200803, 0.0200803),
  "layers.1.attn.q_proj.w": (-0.0187484, -0.011518),
  "layers.1.attn.k_proj.w": (-0.019858, -0.0187484),
  "layers.1.attn.v_proj.w": (0.00366574, 0.00585177),
  "layers.1.attn.o_proj.w": (-0.00831582, -0.019858),
  "layers.1.mlp.gate_proj.w": (0.0257412, -0.00831582),
  "layers.1.mlp.up_proj.w": (0.0357888, -0.00170063),
  "layers.1.mlp.down_proj.w": (-0.00295649, 0.0257412),
  "lm_head.w": (0.0076018, -0.00295649),
}


@pytest.mark.parametrize(("contract", "at"), [(TestQwen2, 0), (TestQwen3, 1)])
def test_a_seed_gives_the_same_model_in_every_version(contract, at):
  model = contract.family.model_class(contract.config, rngs=nnx.Rngs(0))
  values = {
    ".".join(map(str, path)): np.ravel(variable.get_value())[0]
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  expected = {name: numbers[at] for name, numbers in INITIAL.items()}
  assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
