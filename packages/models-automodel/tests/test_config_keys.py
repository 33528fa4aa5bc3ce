"""Keys of config.json that no architecture reads: noted, refused by name, left out on request, and kept by saving."""

import json

import pytest
import safetensors.numpy

from models_automodel import AutoModel, ConfigError
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.families import family_of_model_type
from models_automodel.verify import verify

NOTE = "config.json: not read by this architecture: max_sequence_length, tokenizer_padding_side"
EXTRA = {"max_sequence_length": 2048, "tokenizer_padding_side": "right"}
ASKED = "config.json: not read, as ignore_config_keys asks: residual_multiplier"


def load(path, **options):
  return AutoModel.from_pretrained(str(path), progress=False, **options)


def config_of(directory):
  return json.loads((directory / "config.json").read_text())


def test_keys_that_are_not_read_are_in_the_plan_and_once_in_the_log(edit_config, caplog):
  path = edit_config(**EXTRA)
  plan = AutoModel.plan(path)
  assert plan.notes() == [NOTE]
  assert NOTE in str(plan)
  assert not caplog.records
  load(path)
  (record,) = caplog.records
  assert record.getMessage() == f"{path}:\n{NOTE}"


def test_saving_and_converting_keep_them(edit_config, tmp_path):
  path = edit_config(**EXTRA, rope_scaling=config_of(edit_config())["rope_scaling"] | {"finetuned": True})
  model, _ = load(path)
  AutoModel.save_pretrained(model, tmp_path / "saved", base=path, progress=False)
  convert(path, tmp_path / "converted", progress=False)
  for directory in (tmp_path / "saved", tmp_path / "converted"):
    assert config_of(directory) == config_of(path) | {"torch_dtype": "float32", "dtype": "float32"}


def test_a_refused_key_may_be_ignored(edit_config, tmp_path, caplog, capsys):
  path = edit_config(residual_multiplier=0.2)
  with pytest.raises(ConfigError, match=r"residual_multiplier=0\.2 \(a key of granite\): not known"):
    AutoModel.plan(path)
  keys = ["residual_multiplier", "not_there"]
  assert AutoModel.plan(path, ignore_config_keys=keys).notes() == [ASKED]
  model, _ = load(path, ignore_config_keys=keys)
  assert ASKED in caplog.text
  AutoModel.save_pretrained(model, tmp_path / "saved", base=path, progress=False)
  assert "which the model does not implement or contradicts: residual_multiplier" in caplog.text
  convert(path, tmp_path / "converted", ignore_config_keys=keys, progress=False)
  verify(path, ignore_config_keys=keys)
  for directory in (tmp_path / "saved", tmp_path / "converted"):
    assert config_of(directory).keys() == config_of(path).keys() - {"residual_multiplier"} | {
      "dtype",
      "torch_dtype",
    }
    assert load(directory)[0].config == model.config
  assert main(["plan", str(path)]) == 1
  assert "--ignore-config-key residual_multiplier" in capsys.readouterr().err
  assert main(["plan", str(path), "--ignore-config-key", "residual_multiplier"]) == 0
  assert ASKED in capsys.readouterr().out
  assert main(["verify", str(path), "--ignore-config-key", "residual_multiplier"]) == 0
  assert main(["show", str(path), "--ignore-config-key", "residual_multiplier"]) == 0


def test_a_key_of_an_object_and_one_that_is_needed(edit_config):
  path = edit_config(rope_scaling={"factor": 8.0}, rope_parameters=...)
  with pytest.raises(ConfigError, match=r"rope_scaling has factor=8\.0, but rope_type is missing"):
    AutoModel.plan(path)
  plan = AutoModel.plan(path, ignore_config_keys=["rope_scaling.factor"])
  assert plan.config.rope_scaling is None
  with pytest.raises(ConfigError, match="hidden_size is missing"):
    AutoModel.plan(path, ignore_config_keys=["rope_scaling", "hidden_size"])


def test_a_single_text_is_no_list_of_keys(edit_config):
  with pytest.raises(TypeError, match=r"write \['sliding_window'\]"):
    AutoModel.plan(edit_config(), ignore_config_keys="sliding_window")


def test_a_kept_model_is_that_of_the_same_keys(edit_config, tmp_path):
  path, kept = edit_config(residual_multiplier=0.2, logit_scale=2.0), tmp_path / "kept"
  keys = ["residual_multiplier", "logit_scale"]
  first, _ = load(path, intermediate_ckpt_dir=kept, ignore_config_keys=keys)
  again, _ = load(path, intermediate_ckpt_dir=kept, ignore_config_keys=tuple(reversed(keys)))
  assert first.config == again.config
  with pytest.raises(ConfigError, match="ignore_config_keys"):
    load(path, intermediate_ckpt_dir=kept, ignore_config_keys=[*keys, "another"])


def test_no_keys_at_all_are_the_same_as_none(checkpoint, tmp_path):
  load(checkpoint[0], intermediate_ckpt_dir=tmp_path / "kept")
  load(checkpoint[0], intermediate_ckpt_dir=tmp_path / "kept", ignore_config_keys=[])


def test_keys_of_a_language_model_beside_a_vision_tower(tmp_path):
  family = family_of_model_type("gemma3", "gemma3")
  text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
  text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "logit_scale": 2.0}
  raw = {"model_type": "gemma3", "text_config": text, "logits_scaling": 4.0}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  safetensors.numpy.save_file({}, tmp_path / "model.safetensors")
  with pytest.raises(ConfigError, match=r"config\.json: logits_scaling=4\.0"):
    family.read_config(raw)
  with pytest.raises(ConfigError, match=r"text_config: logit_scale=2\.0"):
    AutoModel.plan(tmp_path, ignore_config_keys=["logits_scaling"])
  with pytest.raises(ValueError, match="is missing: the parameter"):
    AutoModel.plan(tmp_path, ignore_config_keys=["logits_scaling", "logit_scale"])
