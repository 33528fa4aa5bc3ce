"""config.json as each version of transformers writes it, by tests-parity/make_configs.py."""

import json
import pathlib

import pytest

from models_llama.llama3.model import ModelConfig
from models_llama.llama3.params import read_config

WRITTEN = json.loads((pathlib.Path(__file__).parent / "transformers_configs" / "llama.json").read_text())
CONFIG = ModelConfig(
  num_layers=2,
  vocab_size=101,
  embed_dim=48,
  hidden_dim=88,
  num_heads=6,
  head_dim=16,
  num_kv_heads=2,
  rope_theta=321.5,
  norm_eps=1e-3,
)


@pytest.mark.parametrize("version", WRITTEN)
def test_what_transformers_writes_is_read_without_a_note(version, caplog):
  assert read_config(WRITTEN[version]) == CONFIG
  assert not caplog.records
