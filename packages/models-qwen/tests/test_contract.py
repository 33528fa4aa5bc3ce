import dataclasses

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
  """Layers 0 and 2 are dense by their step, layer 1 by its number."""

  family = qwen3.FAMILY
  config = SPARSE
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
