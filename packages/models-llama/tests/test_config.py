"""Configurations as published, and what is refused."""

import dataclasses

import numpy as np
import pytest

from models_core.errors import ConfigError
from models_core.rope_scaling import Llama3Scaling
from models_core.weights import arrange, pieces
from models_llama.llama3.model import ModelConfig
from models_llama.llama3.params import GGUF, read_config

# As published in the repositories, without token ids and versions.
LLAMA_3_2_1B = {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "vocab_size": 128256,
}


def test_a_published_configuration():
  assert read_config(LLAMA_3_2_1B) == ModelConfig(
    num_layers=16,
    vocab_size=128256,
    embed_dim=2048,
    hidden_dim=8192,
    num_heads=32,
    head_dim=64,
    num_kv_heads=8,
    rope_theta=500000.0,
    norm_eps=1e-5,
    rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    weight_tying=True,
  )


def test_what_a_configuration_may_leave_out():
  optional = ("head_dim", "num_key_value_heads", "rope_scaling", "tie_word_embeddings", "mlp_bias")
  config = read_config({key: value for key, value in LLAMA_3_2_1B.items() if key not in optional})
  assert (config.head_dim, config.num_kv_heads) == (64, 32)
  assert (config.rope_scaling, config.weight_tying) == (None, False)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("hidden_act", "gelu"),
    ("sliding_window", 4096),
    ("per_layer_config", {"0": {"head_dim": 32}}),
    ("residual_multiplier", 0.2),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
  with pytest.raises(ConfigError, match=key):
    read_config(LLAMA_3_2_1B | {key: value})


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_are_read(key):
  config = read_config(LLAMA_3_2_1B | {key: True})
  assert config == dataclasses.replace(read_config(LLAMA_3_2_1B), **{key: True})


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_what_the_model_does_anyway_may_be_said(key):
  assert read_config(LLAMA_3_2_1B | {key: False}) == read_config(LLAMA_3_2_1B)


@pytest.mark.parametrize(("part", "heads"), [("q", 6), ("k", 3)])
def test_biases_of_gguf_files_pair_neighbouring_rows_as_their_weights_do(part, heads):
  """llama.cpp's converter permutes both in the same way."""
  matrix, vector = (
    pieces(row, row.forms[0], {"i": "0"}, shape, {"n": 6, "k": 3, "h": 4})[0]
    for row, shape in (
      (GGUF.row_of(f"layers.0.attn.{part}_proj.w")[0], (heads * 4, 1)),
      (GGUF.row_of(f"layers.0.attn.{part}_proj.b")[0], (heads * 4,)),
    )
  )
  stored = np.arange(heads * 4)
  loaded = arrange(stored, vector, stored.shape)
  assert not np.array_equal(loaded, stored)
  np.testing.assert_array_equal(loaded, arrange(stored, matrix, (len(stored), 1))[:, 0])
