"""Configurations as published, in every spelling, and what is refused."""

import dataclasses

import pytest

from models_core.errors import ConfigError
from models_core.rope_scaling import LinearScaling
from models_gemma import gemma, gemma3
from models_gemma.gemma.model import AttentionType, Gemma
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config

LOCAL, GLOBAL = AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL

# As published in the repositories, without token ids and versions.
GEMMA_2B = {
  "architectures": ["GemmaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "head_dim": 256,
  "hidden_act": "gelu",
  "hidden_size": 2048,
  "intermediate_size": 16384,
  "max_position_embeddings": 8192,
  "model_type": "gemma",
  "num_attention_heads": 8,
  "num_hidden_layers": 18,
  "num_key_value_heads": 1,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "torch_dtype": "bfloat16",
  "vocab_size": 256000,
}
GEMMA_2_27B = {
  "architectures": ["Gemma2ForCausalLM"],
  "attn_logit_softcapping": 50.0,
  "cache_implementation": "hybrid",
  "final_logit_softcapping": 30.0,
  "head_dim": 128,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 4608,
  "intermediate_size": 36864,
  "model_type": "gemma2",
  "num_attention_heads": 32,
  "num_hidden_layers": 46,
  "num_key_value_heads": 16,
  "query_pre_attn_scalar": 144,
  "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "sliding_window_size": 4096,
  "torch_dtype": "float32",
  "vocab_size": 256000,
}
GEMMA_3_1B = {
  "architectures": ["Gemma3ForCausalLM"],
  "attn_logit_softcapping": None,
  "cache_implementation": "hybrid",
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152,
  "intermediate_size": 6912,
  "max_position_embeddings": 32768,
  "model_type": "gemma3_text",
  "num_attention_heads": 4,
  "num_hidden_layers": 26,
  "num_key_value_heads": 1,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "vocab_size": 262144,
}
VISION = {
  "architectures": ["Gemma3ForConditionalGeneration"],
  "boi_token_index": 255999,
  "eoi_token_index": 256000,
  "image_token_index": 262144,
  "mm_tokens_per_image": 256,
  "model_type": "gemma3",
  "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
GEMMA_3_4B = VISION | {
  "text_config": {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  }
}
GEMMA_3_27B = VISION | {
  "text_config": GEMMA_3_4B["text_config"]
  | {
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
  }
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
NESTED = {
  "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
  "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.mark.parametrize(
  ("read", "raw", "preset"),
  [
    (gemma.FAMILY.read_config, GEMMA_2B, GemmaConfig.gemma_2b()),
    (gemma.FAMILY.read_config, GEMMA_2_27B, GemmaConfig.gemma2_27b()),
    (gemma3.FAMILY.read_config, GEMMA_3_1B, Gemma3Config.gemma3_1b()),
    (gemma3.FAMILY.read_config, GEMMA_3_4B, Gemma3Config.gemma3_4b()),
    (gemma3.FAMILY.read_config, GEMMA_3_27B, Gemma3Config.gemma3_27b()),
  ],
  ids=["gemma-2b", "gemma-2-27b", "gemma-3-1b", "gemma-3-4b", "gemma-3-27b"],
)
def test_a_published_config_is_the_preset(read, raw, preset):
  assert read(raw) == preset


@pytest.mark.parametrize(
  "preset", [GemmaConfig.gemma_7b(), GemmaConfig.gemma2_9b(), Gemma3Config.gemma3_27b()], ids=["1", "2", "3"]
)
def test_a_preset_survives_config_json(preset):
  family = gemma3.FAMILY if isinstance(preset, Gemma3Config) else gemma.FAMILY
  raw = family.write_config(preset)
  assert raw["model_type"] in family.model_types
  assert family.read_config(raw) == preset


def test_gemma_1_and_2_are_written_as_what_they_are():
  write = gemma.FAMILY.write_config
  assert write(GemmaConfig.gemma_2b())["model_type"] == "gemma"
  assert write(GemmaConfig.gemma2_2b())["model_type"] == "gemma2"
  assert "use_post_attn_norm" not in write(GemmaConfig.gemma2_2b())


@pytest.mark.parametrize(
  "change",
  [
    {"hidden_activation": "gelu_pytorch_tanh"},
    {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu"},
    {"hidden_activation": None, "hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": None},
  ],
)
def test_gelu_of_gemma_1_is_the_tanh_form_whatever_its_name(change):
  assert gemma.FAMILY.read_config(GEMMA_2B | change) == GemmaConfig.gemma_2b()


@pytest.mark.parametrize(
  ("read", "raw"),
  [
    (gemma, GEMMA_2B | {"tie_word_embeddings": False}),
    (gemma, GEMMA_2_27B | {"tie_word_embeddings": False}),
    (gemma3, GEMMA_3_1B | {"tie_word_embeddings": False}),
    (gemma3, GEMMA_3_4B | {"tie_word_embeddings": False}),
    (gemma3, GEMMA_3_4B | {"text_config": GEMMA_3_4B["text_config"] | {"tie_word_embeddings": False}}),
  ],
)
def test_the_head_may_be_untied(read, raw):
  assert not read.FAMILY.read_config(raw).weight_tying


@pytest.mark.parametrize(
  ("read", "raw", "message"),
  [
    (gemma, GEMMA_2B | {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    (gemma, GEMMA_2B | {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "hidden_act is 'silu'"),
    (gemma, GEMMA_2B | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    (gemma, GEMMA_2B | {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    (gemma, GEMMA_2B | {"attention_bias": True}, "attention_bias is True"),
    (gemma, GEMMA_2B | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    (gemma, GEMMA_2B | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "LinearScaling"),
    (gemma, GEMMA_2B | {"sliding_window": 5}, "sliding_window=5"),
    (gemma, GEMMA_2_27B | {"layer_types": ["full_attention"]}, "layer_types is"),
    (gemma, GEMMA_2_27B | {"layer_types": ["banded"] * 46}, "layer_types is"),
    (gemma, GEMMA_2_27B | {"sliding_window": None}, "give sliding_window_size"),
    (gemma3, GEMMA_3_1B | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    (gemma3, GEMMA_3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    (gemma3, GEMMA_3_1B | {"layer_types": ["full_attention"] * 26}, "state different sliding layers"),
    (gemma3, GEMMA_3_1B | {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters has rope_theta"),
    (gemma3, GEMMA_3_1B | {"rope_parameters": NESTED, "rope_scaling": {"full_attention": LINEAR}}, "full_attention.*scaling is stated twice"),
    (gemma3, GEMMA_3_1B | {"rope_scaling": {"full_attention": LINEAR, "factor": 8.0}}, "rope_scaling has factor; expected an object"),
    (gemma3, GEMMA_3_1B | {"rope_scaling": {"full_attention": {"factor": 8.0}}}, "rope_scaling has factor=8.0, but rope_type is missing"),
    (gemma3, GEMMA_3_1B | {"rope_scaling": {"sliding_attention": LINEAR}}, "of sliding layers"),
    (gemma3, GEMMA_3_1B | {"rope_parameters": NESTED, "rope_theta": 5.0}, "full_attention.*differs"),
    (gemma3, GEMMA_3_1B | {"rope_parameters": NESTED, "rope_local_base_freq": 5.0}, "rope_local_base_freq.*differs"),
    (gemma3, GEMMA_3_1B | {"residual_multiplier": 3}, "residual_multiplier=3"),
    (gemma3, GEMMA_3_4B | {"residual_multiplier": 3}, "residual_multiplier=3"),
    (gemma3, GEMMA_3_4B | {"hidden_size": 2561}, "hidden_size=2561"),
    (
      gemma3,
      GEMMA_3_4B | {"tie_word_embeddings": True, "text_config": GEMMA_3_4B["text_config"] | {"tie_word_embeddings": False}},
      "states twice whether the head is the embedding",
    ),
    (gemma3, GEMMA_3_1B | {"num_attention_heads": None}, "num_attention_heads is missing"),
  ],
)  # fmt: skip
def test_what_is_missing_contradictory_or_unknown_is_refused(read, raw, message):
  with pytest.raises(ConfigError, match=message):
    read.FAMILY.read_config(raw)


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_cap_may_be_null_but_not_absent(key):
  config = gemma.FAMILY.read_config(GEMMA_2_27B | {key: None})
  assert None in (config.attn_logits_soft_cap, config.final_logit_softcap)
  with pytest.raises(ConfigError, match=f"{key} is missing"):
    gemma.FAMILY.read_config({k: v for k, v in GEMMA_2_27B.items() if k != key})


SPELLINGS = [
  {"sliding_window_pattern": 6},
  {"sliding_window_pattern": None},
  {"sliding_window_pattern": None, "_sliding_window_pattern": 6},
  {"sliding_window_pattern": None, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2},
  {"rope_parameters": NESTED},
  {"rope_parameters": NESTED, "rope_theta": None, "rope_local_base_freq": None},
  {"rope_theta": None, "rope_local_base_freq": None},
  {"rope_scaling": NESTED, "rope_theta": None},
  {"rope_scaling": {"full_attention": None, "sliding_attention": {"rope_type": "default"}}},
  {"hidden_act": "silu", "some_new_key": 3, "quantization_config": {}},
]  # fmt: skip


@pytest.mark.parametrize("change", SPELLINGS)
def test_spellings_of_layers_and_rope(change):
  assert gemma3.FAMILY.read_config(GEMMA_3_1B | change) == Gemma3Config.gemma3_1b()


def test_layer_types_count_where_the_private_pattern_says_otherwise():
  raw = GEMMA_3_1B | {"sliding_window_pattern": None, "layer_types": ["full_attention"] * 26}
  config = gemma3.FAMILY.read_config(raw | {"_sliding_window_pattern": 6})
  assert config.attention_types == (GLOBAL,) * 26


def test_the_private_pattern_is_not_read():
  raw = GEMMA_3_1B | {"sliding_window_pattern": None, "_sliding_window_pattern": 2}
  raw.pop("layer_types", None)
  assert gemma3.FAMILY.read_config(raw) == gemma3.FAMILY.read_config(GEMMA_3_1B)


def test_the_scaling_is_that_of_global_layers():
  assert gemma3.FAMILY.read_config(GEMMA_3_4B).rope_scaling == LinearScaling(8.0)
  raw = GEMMA_3_1B | {"rope_parameters": NESTED | {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}  # fmt: skip
  with pytest.raises(ConfigError, match="of sliding layers"):
    gemma3.FAMILY.read_config(raw)


def test_a_scaling_may_be_nested_under_either_name():
  for name in ("rope_scaling", "rope_parameters"):
    nested = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}
    assert gemma3.FAMILY.read_config(GEMMA_3_1B | {name: nested}).rope_scaling == LinearScaling(8.0)


def test_keys_that_repeat_text_config_beside_it():
  raw = GEMMA_3_4B | {"hidden_size": 2560, "vocab_size": 262208, "num_hidden_layers": 34, "some_new_key": 3}
  assert gemma3.FAMILY.read_config(raw) == Gemma3Config.gemma3_4b()


def test_null_in_text_config_is_no_default():
  text = GEMMA_3_4B["text_config"]
  with pytest.raises(ConfigError, match="give sliding_window_size"):
    gemma3.FAMILY.read_config(GEMMA_3_4B | {"text_config": text | {"sliding_window": None}})
  with pytest.raises(ConfigError, match="head_dim is missing"):
    gemma3.FAMILY.read_config(GEMMA_3_4B | {"text_config": text | {"head_dim": None}})


def test_a_model_that_is_cut_keeps_the_types_of_its_first_layers():
  config = dataclasses.replace(Gemma3Config.gemma3_1b(), num_layers=7)
  assert config.attention_types == (LOCAL,) * 5 + (GLOBAL, LOCAL)
  with pytest.raises(ConfigError, match="26 entries for 27 layers"):
    dataclasses.replace(Gemma3Config.gemma3_1b(), num_layers=27)


def test_attention_types_may_be_any_iterable():
  config = dataclasses.replace(GemmaConfig.gemma2_2b(), attention_types=[LOCAL, GLOBAL] * 13)
  assert config == GemmaConfig.gemma2_2b()
  hash(config)


def test_sliding_layers_need_a_window():
  with pytest.raises(ConfigError, match="give sliding_window_size"):
    dataclasses.replace(GemmaConfig.gemma2_2b(), sliding_window_size=None)


def test_classes_have_the_names_of_their_architectures():
  assert gemma.FAMILY.model_class is Gemma
  assert gemma3.FAMILY.model_class is Gemma3
