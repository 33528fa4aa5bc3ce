import itertools

import pytest

from models_core.config.harmless import ADDED, NEUTRAL, WRITTEN
from models_core.config.keys import ConfigKeys
from models_core.errors import ConfigError

# Each changes logits of transformers' own models for some value.
STRICT = (
  "attention_bias",
  "attention_chunk_size",
  "attn_logit_softcapping",
  "final_logit_softcapping",
  "head_dim",
  "layer_types",
  "mlp_bias",
  "mm_tokens_per_image",
  "num_experts_per_tok",
  "rms_norm_eps",
  "rope_scaling",
  "rope_theta",
  "sliding_window",
  "tie_word_embeddings",
  "transformers_weights",
)


def test_a_key_is_in_one_table():
  for a, b in itertools.combinations((WRITTEN, ADDED, frozenset(NEUTRAL)), 2):
    assert not a & b


@pytest.mark.parametrize("key", STRICT)
def test_what_changes_logits_is_refused(key):
  with pytest.raises(ConfigError, match=f"{key}=3: not known"):
    ConfigKeys({key: 3}).done()


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
  assert (
    record.getMessage()
    == "a/config.json: keys on which no logit depends are not read: num_labels, unsloth_fixed"
  )


def test_what_an_architecture_reads_is_no_part_of_the_note(caplog):
  keys = ConfigKeys({"model_max_length": 8, "seq_length": 8, "max_seq_len": 8}, "b/config.json")
  keys.integer("model_max_length")
  keys.done(["seq_length"])
  (record,) = caplog.records
  assert record.getMessage().endswith("not read: max_seq_len")


def test_a_refused_configuration_makes_no_note(caplog):
  with pytest.raises(ConfigError, match=r"c/config\.json: odd=1: not known"):
    ConfigKeys({"odd": 1, "unsloth_version": "2026.1"}, "c/config.json").done()
  assert not caplog.records


@pytest.mark.parametrize(
  ("key", "neutral", "other"),
  [
    ("is_encoder_decoder", False, True),
    ("add_cross_attention", False, True),
    ("is_causal", True, False),
    ("use_bidirectional_attention", False, True),
    ("partial_rotary_factor", 1.0, 0.5),
    ("pruned_heads", {}, {"0": [1]}),
  ],
)
def test_one_value_of_a_key_may_say_nothing_new(key, neutral, other, caplog):
  ConfigKeys({key: neutral}).done()
  assert not caplog.records
  with pytest.raises(ConfigError, match=f"{key}=.*: not known"):
    ConfigKeys({key: other}).done()
