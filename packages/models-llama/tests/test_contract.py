import dataclasses

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
  }
