"""Configurations as published, windows, defaults, and what is refused."""

import pytest

from models_core.errors import ConfigError
from models_qwen import qwen2, qwen3

SLIDES, FULL = "sliding_attention", "full_attention"

# As published in the repositories, without token ids and versions.
QWEN_2_5_7B = {
  "architectures": ["Qwen2ForCausalLM"],
  "attention_dropout": 0.0,
  "hidden_act": "silu",
  "hidden_size": 3584,
  "intermediate_size": 18944,
  "max_position_embeddings": 131072,
  "max_window_layers": 28,
  "model_type": "qwen2",
  "num_attention_heads": 28,
  "num_hidden_layers": 28,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 131072,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "use_sliding_window": False,
  "vocab_size": 152064,
}
QWEN_3_0_6B = {
  "architectures": ["Qwen3ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "max_position_embeddings": 40960,
  "max_window_layers": 28,
  "model_type": "qwen3",
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "use_sliding_window": False,
  "vocab_size": 151936,
}
QWEN_3_30B = QWEN_3_0_6B | {
  "architectures": ["Qwen3MoeForCausalLM"],
  "decoder_sparse_step": 1,
  "hidden_size": 2048,
  "intermediate_size": 6144,
  "max_window_layers": 48,
  "mlp_only_layers": [],
  "model_type": "qwen3_moe",
  "moe_intermediate_size": 768,
  "norm_topk_prob": True,
  "num_attention_heads": 32,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 48,
  "num_key_value_heads": 4,
  "output_router_logits": False,
  "router_aux_loss_coef": 0.001,
  "tie_word_embeddings": False,
}
MODULES = {"qwen2": (qwen2, QWEN_2_5_7B), "qwen3": (qwen3, QWEN_3_0_6B), "qwen3_moe": (qwen3, QWEN_3_30B)}


def read(name, **changes):
  module, raw = MODULES[name]
  raw = raw | changes
  return module.FAMILY.read_config({key: value for key, value in raw.items() if value is not ...})


@pytest.mark.parametrize(
  ("name", "preset"), [("qwen2", "qwen2p5_7b"), ("qwen3", "qwen3_0p6b"), ("qwen3_moe", "qwen3_30b_a3b")]
)
def test_published_configurations_are_the_presets(name, preset):
  assert read(name) == getattr(MODULES[name][0].FAMILY.config_class, preset)()


@pytest.mark.parametrize(
  ("name", "head_dim"),
  [
    ("qwen2", 3584 // 28),
    ("qwen3", 128),  # whatever the width: 1024 / 16 heads are 64
    ("qwen3_moe", 2048 // 32),
  ],
)
def test_a_head_s_dimension_where_none_is_stated(name, head_dim):
  assert read(name, head_dim=...).head_dim == head_dim


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
  ("pattern", "first"),
  [([FULL, SLIDES, SLIDES], 1), ([SLIDES] * 3, 0), ([FULL, FULL, SLIDES], 2), ([FULL] * 3, 3)],
)
def test_the_last_layers_may_slide(name, pattern, first):
  config = read(
    name,
    num_hidden_layers=3,
    layer_types=pattern,
    use_sliding_window=True,
    sliding_window=7,
    max_window_layers=9,
  )
  assert (config.sliding_window, config.max_window_layers) == (7, first)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("pattern", [[SLIDES, FULL, SLIDES], [SLIDES, FULL, FULL], [FULL, SLIDES, FULL]])
def test_other_patterns_of_sliding_layers_are_refused(name, pattern):
  count = pattern.count(SLIDES)
  with pytest.raises(
    ConfigError, match=f"layer_types has {count} sliding layers, which are not the last ones"
  ):
    read(name, num_hidden_layers=3, layer_types=pattern, use_sliding_window=True, sliding_window=7)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_sliding_layers_and_use_sliding_window_must_agree(name):
  with pytest.raises(ConfigError, match="use_sliding_window is false: correct one of them"):
    read(name, num_hidden_layers=2, layer_types=[FULL, SLIDES])
  assert read(name, num_hidden_layers=2, layer_types=[FULL, FULL]).sliding_window is None


@pytest.mark.parametrize("name", list(MODULES))
def test_a_window_that_is_null_is_none(name):
  for change in ({"sliding_window": None}, {"sliding_window": None, "layer_types": [FULL, FULL]}):
    config = read(name, num_hidden_layers=2, use_sliding_window=True, **change)
    assert config.sliding_window is None
  with pytest.raises(ConfigError, match="sliding_window is missing"):
    read(name, use_sliding_window=True, sliding_window=...)
  with pytest.raises(ConfigError, match="layer_types"):
    read(name, num_hidden_layers=2, use_sliding_window=True, sliding_window=None, layer_types=[FULL, SLIDES])


@pytest.mark.parametrize("name", list(MODULES))
def test_numbers_of_kv_heads_that_are_null_or_missing(name):
  config = read(name, num_key_value_heads=None)
  assert config.num_kv_heads == config.num_heads
  with pytest.raises(ConfigError, match="num_key_value_heads is missing"):
    read(name, num_key_value_heads=...)


@pytest.mark.parametrize(
  ("name", "key", "value"),
  [
    ("qwen2", "num_experts", 8),
    ("qwen2", "use_qk_norm", True),
    ("qwen3", "attention_bias", True),
    ("qwen3", "qkv_bias", True),
    ("qwen3", "use_qk_norm", False),
    ("qwen3", "num_experts", 8),
    ("qwen3_moe", "shared_expert_intermediate_size", 8),
    ("qwen3_moe", "n_shared_experts", 1),
    ("qwen3_moe", "attention_bias", True),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(name, key, value):
  with pytest.raises(ConfigError, match=key):
    read(name, **{key: value})


@pytest.mark.parametrize(
  ("name", "key", "value"),
  [
    ("qwen2", "attention_bias", True),
    ("qwen2", "qkv_bias", True),
    ("qwen2", "head_dim", None),
    ("qwen2", "use_mrope", True),
    ("qwen2", "dual_chunk_attention_config", {"chunk_size": 262144}),
    ("qwen3", "use_qk_norm", True),
    ("qwen3", "qkv_bias", False),
    ("qwen3", "max_sequence_length", 4096),
    ("qwen3_moe", "shared_expert_intermediate_size", 0),
    ("qwen3_moe", "mlp_only_layers", None),
  ],
)
def test_what_the_model_does_anyway_may_be_said(name, key, value):
  assert read(name, **{key: value}) == read(name)


def test_all_layers_with_experts_slide_or_none():
  windows = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 7}
  config = read("qwen3_moe", **windows, layer_types=[SLIDES, SLIDES])
  assert (config.sliding_window, config.max_window_layers) == (7, 0)
  with pytest.raises(ConfigError, match="layer_types differs from use_sliding_window=True"):
    read("qwen3_moe", **windows, layer_types=[FULL, SLIDES])
  with pytest.raises(ConfigError, match="layer_types differs from use_sliding_window=False"):
    read("qwen3_moe", num_hidden_layers=2, layer_types=[SLIDES, SLIDES])
