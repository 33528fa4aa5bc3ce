"""config.json as each version of transformers writes it, by tests-parity/make_configs.py."""

import json
import pathlib

import pytest

from models_gemma import gemma, gemma3
from models_gemma.attention_types import AttentionType
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_gemma.gemma3.model import ModelConfig as Gemma3Config

LOCAL, GLOBAL = AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL
COMMON = {
  "num_layers": 2,
  "num_embed": 101,
  "embed_dim": 48,
  "hidden_dim": 88,
  "num_heads": 6,
  "head_dim": 16,
  "num_kv_heads": 2,
  "rope_theta": 321.5,
  "norm_eps": 1e-3,
}
GEMMA1 = GemmaConfig(
  **COMMON,
  final_logit_softcap=None,
  attn_logits_soft_cap=None,
  sliding_window_size=None,
  use_post_attn_norm=False,
  use_post_ffw_norm=False,
  attention_types=(GLOBAL, GLOBAL),
  query_pre_attn_scalar=16,
)
GEMMA2 = GemmaConfig(
  **COMMON,
  final_logit_softcap=6.0,
  attn_logits_soft_cap=1.5,
  sliding_window_size=5,
  use_post_attn_norm=True,
  use_post_ffw_norm=True,
  attention_types=(LOCAL, GLOBAL),
  query_pre_attn_scalar=9,
)
GEMMA3 = Gemma3Config(
  **COMMON,
  attention_types=(LOCAL, LOCAL),
  local_rope_theta=33.0,
  query_pre_attn_scalar=9,
  sliding_window_size=5,
)
# model_type -> (family, configuration).
CONFIGS = {
  "gemma": (gemma.FAMILY, GEMMA1),
  "gemma2": (gemma.FAMILY, GEMMA2),
  "gemma3_text": (gemma3.FAMILY, GEMMA3),
  "gemma3": (gemma3.FAMILY, GEMMA3),
}
FOLDER = pathlib.Path(__file__).parent / "transformers_configs"
WRITTEN = {
  (model_type, version): raw
  for model_type in CONFIGS
  for version, raw in json.loads((FOLDER / f"{model_type}.json").read_text()).items()
}


@pytest.mark.parametrize(("model_type", "version"), WRITTEN)
def test_what_transformers_writes_is_read_without_a_note(model_type, version, caplog):
  family, config = CONFIGS[model_type]
  assert family.read_config(WRITTEN[model_type, version]) == config
  assert not caplog.records
