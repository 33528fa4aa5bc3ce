import dataclasses

from models_core.rope_scaling import LinearScaling
from models_core.testing import FamilyContract
from models_gemma.gemma import FAMILY, model
from models_gemma.gemma.model import AttentionType
from models_gemma.gemma3 import FAMILY as FAMILY_3
from models_gemma.gemma3 import model as model_3

LOCAL, GLOBAL = AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL

SIZES = {
  "num_layers": 2,
  "num_embed": 67,
  "embed_dim": 48,
  "hidden_dim": 60,
  "num_heads": 6,
  "head_dim": 10,
  "num_kv_heads": 3,
  "norm_eps": 1e-3,
  "rope_theta": 700.0,
  "query_pre_attn_scalar": 7,
  "attention_types": (LOCAL, GLOBAL),
  "sliding_window_size": 3,
}
# Two units of two layers, and one layer more.
DEEP = {"num_layers": 5, "attention_types": (LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL)}
CHANGES = {
  "num_layers": 1,
  "num_embed": 71,
  "embed_dim": 40,
  "hidden_dim": 64,
  "num_heads": 9,
  "head_dim": 12,
  "num_kv_heads": 2,
  "norm_eps": 0.2,
  "rope_theta": 20.0,
  "query_pre_attn_scalar": 2,
  "attention_types": (GLOBAL, LOCAL),
  "sliding_window_size": 5,
  "final_logit_softcap": 1.5,
  "weight_tying": False,
}


class TestGemma1(FamilyContract):
  family = FAMILY
  deep = DEEP
  config = model.ModelConfig(
    **SIZES | {"num_kv_heads": 1},
    final_logit_softcap=None,
    use_post_attn_norm=False,
    use_post_ffw_norm=False,
  )
  changes = CHANGES | {
    "attn_logits_soft_cap": 0.5,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
  }


class TestGemma2(FamilyContract):
  family = FAMILY
  deep = DEEP
  config = model.ModelConfig(
    **SIZES,
    final_logit_softcap=3.0,
    attn_logits_soft_cap=2.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
  )
  changes = CHANGES | {
    "attn_logits_soft_cap": None,
    "use_post_attn_norm": False,
    "use_post_ffw_norm": False,
  }


class TestGemma3(FamilyContract):
  family = FAMILY_3
  deep = DEEP
  config = model_3.ModelConfig(**SIZES, local_rope_theta=30.0, rope_scaling=LinearScaling(2.0))
  changes = CHANGES | {
    "local_rope_theta": 3.0,
    "rope_scaling": dataclasses.replace(config.rope_scaling, factor=8.0),
  }
