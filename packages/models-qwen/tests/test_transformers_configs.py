"""config.json as each version of transformers writes it, by tests-parity/make_configs.py."""

import json
import pathlib

import pytest

from models_qwen import qwen2, qwen3
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen3.model import ModelConfig as Qwen3Config

COMMON = {
  "num_layers": 2,
  "vocab_size": 101,
  "embed_dim": 48,
  "hidden_dim": 88,
  "num_heads": 6,
  "num_kv_heads": 2,
  "rope_theta": 321.5,
  "norm_eps": 1e-3,
}
EXPERTS = {
  "num_experts": 8,
  "num_experts_per_tok": 3,
  "moe_hidden_dim": 24,
  "norm_topk_prob": True,
  "decoder_sparse_step": 1,
  "mlp_only_layers": (),
}
# model_type -> (family, configuration).
CONFIGS = {
  "qwen2": (qwen2.FAMILY, Qwen2Config(**COMMON, head_dim=8)),
  "qwen3": (qwen3.FAMILY, Qwen3Config(**COMMON, head_dim=16)),
  "qwen3_moe": (qwen3.FAMILY, Qwen3Config(**COMMON, head_dim=16, **EXPERTS)),
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
