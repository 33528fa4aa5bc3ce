from models_core.rope_scaling import LinearScaling
from models_core.testing import FamilyContract
from models_olmo2 import FAMILY
from models_olmo2.model import ModelConfig


class TestOlmo2(FamilyContract):
  family = FAMILY
  # No field has its default, and no two sizes are the same.
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
    rope_scaling=LinearScaling(2.0),
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
    "rope_scaling": None,
    "weight_tying": True,
  }
