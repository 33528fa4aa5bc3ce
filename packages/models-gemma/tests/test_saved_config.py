"""config.json of a saved model: the base's keys stay, those that the configuration changes do not."""

import dataclasses
import json
import pathlib

import pytest

from models_core.rope_scaling import LinearScaling
from models_core.saving.config_json import config_json
from models_gemma import gemma, gemma3
from models_gemma.attention_types import AttentionType

FOLDER = pathlib.Path(__file__).parent / "transformers_configs"
FAMILIES = {
  "gemma": gemma.FAMILY,
  "gemma2": gemma.FAMILY,
  "gemma3_text": gemma3.FAMILY,
  "gemma3": gemma3.FAMILY,
}
WRITTEN = {
  (model_type, version): raw
  for model_type in FAMILIES
  for version, raw in json.loads((FOLDER / f"{model_type}.json").read_text()).items()
}


def _without_dtype(raw):
  return {
    key: _without_dtype(value) if key == "text_config" else value
    for key, value in raw.items()
    if key not in ("dtype", "torch_dtype")
  }


@pytest.mark.parametrize(("model_type", "version"), WRITTEN)
def test_keys_of_the_base_stay(model_type, version):
  base, family = WRITTEN[model_type, version] | {"mine": 1}, FAMILIES[model_type]
  saved = _without_dtype(config_json(family, family.read_config(base), base, "float32"))
  base = _without_dtype(base)
  if "text_config" in base:
    text = base.pop("text_config")
    assert text == {key: saved["text_config"][key] for key in text}
  assert {key: saved[key] for key in base} == base


def test_only_the_language_model_of_a_multimodal_base_changes():
  base = WRITTEN["gemma3", "4.51.3"]
  config = dataclasses.replace(gemma3.FAMILY.read_config(base), rope_scaling=LinearScaling(8.0))
  saved = config_json(gemma3.FAMILY, config, base, "float32")
  text, former = saved["text_config"], base["text_config"]
  assert {key for key in former if text[key] != former[key]} <= {"rope_scaling", "torch_dtype"}
  assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
  assert saved["architectures" if "architectures" in base else "model_type"] == base.get(
    "architectures", "gemma3"
  )
  assert gemma3.FAMILY.read_config(saved) == config


def test_keys_that_repeat_text_config_change_with_it():
  base = WRITTEN["gemma3", "4.57.1"] | {"rms_norm_eps": 1e-3, "vocab_size": 101, "tie_word_embeddings": True}
  config = dataclasses.replace(gemma3.FAMILY.read_config(base), norm_eps=0.5)
  saved = config_json(gemma3.FAMILY, config, base, "float32")
  assert saved["rms_norm_eps"] == saved["text_config"]["rms_norm_eps"] == 0.5
  assert (saved["vocab_size"], saved["tie_word_embeddings"], saved["model_type"]) == (101, True, "gemma3")


def test_a_pattern_that_no_longer_holds_is_left_out(caplog):
  base = WRITTEN["gemma3_text", "4.51.3"]
  assert base["sliding_window_pattern"] == 6
  types = (AttentionType.GLOBAL, AttentionType.LOCAL_SLIDING)
  config = dataclasses.replace(gemma3.FAMILY.read_config(base), attention_types=types)
  saved = config_json(gemma3.FAMILY, config, base, "float32")
  assert "sliding_window_pattern" not in saved
  assert gemma3.FAMILY.read_config(saved) == config
  assert "contradicts: sliding_window_pattern" in caplog.text


def test_keys_that_are_refused_beside_text_config_are_left_out(caplog):
  base = WRITTEN["gemma3", "4.57.1"]
  config = gemma3.FAMILY.read_config(base)
  text = base["text_config"] | {"logit_scale": 2.0}
  saved = config_json(
    gemma3.FAMILY, config, base | {"residual_multiplier": 0.2, "text_config": text}, "float32"
  )
  assert "contradicts: residual_multiplier, logit_scale" in caplog.text
  assert gemma3.FAMILY.read_config(saved) == config
