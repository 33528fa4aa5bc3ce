import re

import pytest

from models_core.config.harmless import ADDED, UNIMPLEMENTED, WRITTEN, other_architectures
from models_core.config.keys import ConfigKeys, collect_notes
from models_core.errors import ConfigError

# Each changes logits of transformers' own models for some value.
STRICT = (
  "attention_bias",
  "attention_chunk_size",
  "attention_multiplier",
  "attn_logit_softcapping",
  "clip_qkv",
  "embedding_multiplier",
  "final_logit_softcapping",
  "head_dim",
  "kv_lora_rank",
  "layer_types",
  "logit_scale",
  "logits_scaling",
  "mlp_bias",
  "mm_tokens_per_image",
  "no_rope_layers",
  "num_experts",
  "num_experts_per_tok",
  "num_kv_shared_layers",
  "parallel_attn",
  "per_layer_config",
  "residual_multiplier",
  "rms_norm_eps",
  "rope_local_base_freq",
  "rope_scaling",
  "rope_theta",
  "rotary_pct",
  "sliding_window",
  "tie_word_embeddings",
  "use_qk_norm",
)
# What transformers, trainers and people leave in files of every architecture.
IGNORED = {
  "_model_name_or_path": "a/b",
  "attn_implementation": "flash_attention_2",
  "auto_map": {"AutoModel": "a.B"},
  "bias": False,
  "classifier_dropout": 0.1,
  "cls_token_id": 3,
  "embd_pdrop": 0.1,
  "freeze_mm_mlp_adapter": False,
  "gradient_checkpointing": True,
  "group_size_ratio": 0.25,
  "hidden_dropout_prob": 0.1,
  "image_token_id": 9,
  "layer_types": ["full_attention"] * 2,
  "loss_type": "ForCausalLM",
  "max_sequence_length": 2048,
  "mm_projector_type": "mlp2x_gelu",
  "model_max_length": 4096,
  "neftune_noise_alpha": 5.0,
  "no_rope_layers": [1, 1],
  "num_experts": 0,
  "num_labels": 2,
  "original_max_position_embeddings": 4096,
  "output_router_logits": True,
  "quantization": None,
  "residual_multiplier": 1.0,
  "router_aux_loss_coef": 0.01,
  "tokenizer_padding_side": "right",
  "unk_token_id": 0,
  "unsloth_version": "2026.1",
  "use_flash_attention_2": True,
  "wandb_run": "x1",
}


def test_a_key_is_in_one_table():
  assert not WRITTEN & ADDED
  assert not (WRITTEN | ADDED) & UNIMPLEMENTED.keys()


@pytest.mark.parametrize("key", STRICT)
def test_what_changes_logits_is_refused(key):
  with pytest.raises(ConfigError, match=rf"{key}=3 \(.*\): not known.*ignore_config_keys=\['{key}'\]"):
    ConfigKeys({key: 3}).done()


@pytest.mark.parametrize("key", IGNORED)
def test_what_changes_none_is_noted(key):
  with collect_notes() as notes:
    ConfigKeys({key: IGNORED[key]}).done()
  noted = [] if IGNORED[key] is None else [f"config.json: not read by this architecture: {key}"]
  assert notes == noted


@pytest.mark.parametrize(
  ("key", "value"),
  [("n_embd", 16), ("n_layer", 2), ("layer_norm_eps", 1e-5), ("activation_function", "silu")],
)
def test_another_name_may_repeat_a_value(key, value):
  own = {"hidden_size": 16, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
  ConfigKeys(own | {key: value}).done(own)
  with pytest.raises(ConfigError, match=f"{key}="):
    ConfigKeys(own | {key: "other"}).done(own)
  with pytest.raises(ConfigError, match=f"{key}="):
    ConfigKeys({key: value}).done()


@pytest.mark.parametrize(
  ("key", "neutral", "other"),
  [
    ("attention_softmax_in_fp32", True, False),
    ("decoder_sparse_step", 1, 2),
    ("no_bias", True, False),
    ("no_rope_layers", [1, 1], [1, 0]),
    ("layer_types", ["full_attention"], ["full_attention", "sliding_attention"]),
    ("parallel_attn", False, True),
    ("rotary_pct", 1.0, 0.25),
    ("scale_attn_weights", True, False),
    ("scale_emb", 1, 12),
    ("shared_expert_intermediate_size", 0, 24),
  ],
)
def test_what_another_architecture_may_say_without_effect(key, neutral, other):
  ConfigKeys({key: neutral}).done()
  with pytest.raises(ConfigError, match=rf"{key}=.* \(a key of "):
    ConfigKeys({key: other}).done()


def test_the_table_of_other_architectures_is_whole():
  table = other_architectures()
  assert len(table) > 2000
  assert all(re.fullmatch(r"[\w.-]+", who) for who, _ in table.values())
  assert table["residual_multiplier"] == ("granite", (1.0, 1.0))


def test_what_every_file_has_is_ignored_in_silence(caplog):
  ConfigKeys({"torch_dtype": "bfloat16", "use_cache": False, "id2label": {}, "top_k": 20}).done()
  assert not caplog.records


def test_what_others_add_is_named_once(caplog):
  raw = {
    "use_cache": True,
    "unsloth_fixed": True,
    "num_labels": 2,
    "pad_token": None,
    "torch_dtype": "float16",
  }
  for _ in range(2):
    ConfigKeys(raw, "a/config.json").done()
  (record,) = caplog.records
  assert (record.name, record.levelname) == ("models_core.config.keys", "WARNING")
  assert record.getMessage() == "a/config.json: not read by this architecture: num_labels, unsloth_fixed"


def test_notes_that_are_collected_are_not_logged(caplog):
  with collect_notes() as notes:
    for _ in range(2):
      ConfigKeys({"mine": 1}, "d/config.json").done()
  assert notes == ["d/config.json: not read by this architecture: mine"]
  assert not caplog.records


def test_what_an_architecture_reads_is_no_part_of_the_note(caplog):
  keys = ConfigKeys({"model_max_length": 8, "seq_length": 8, "max_seq_len": 8}, "b/config.json")
  keys.integer("model_max_length")
  keys.done(["seq_length"])
  (record,) = caplog.records
  assert record.getMessage().endswith("architecture: max_seq_len")


def test_a_refused_configuration_makes_no_note(caplog):
  with pytest.raises(ConfigError, match=r"c/config\.json: sliding_window=1"):
    ConfigKeys({"sliding_window": 1, "unsloth_version": "2026.1"}, "c/config.json").done()
  assert not caplog.records


@pytest.mark.parametrize(
  ("key", "neutral", "other"),
  [
    ("is_encoder_decoder", False, True),
    ("add_cross_attention", False, True),
    ("configuration_files", [], ["config.4.0.0.json"]),
    ("is_causal", True, False),
    ("use_bidirectional_attention", False, True),
    ("partial_rotary_factor", 1.0, 0.5),
    ("per_layer_config", {}, {"1": {"head_dim": 8}}),
    ("pruned_heads", {}, {"0": [1]}),
  ],
)
def test_what_transformers_reads_for_every_model(key, neutral, other, caplog):
  assert key in UNIMPLEMENTED
  ConfigKeys({key: neutral}).done()
  assert not caplog.records
  with pytest.raises(ConfigError, match=rf"{key}=.* \(read for every model\): not known"):
    ConfigKeys({key: other}).done()
