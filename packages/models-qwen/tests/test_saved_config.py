"""config.json of a saved model: the base's keys stay, those that the configuration changes do not."""

import dataclasses
import json
import pathlib

import pytest

from models_core.saving.config_json import config_json
from models_qwen import qwen2, qwen3

FOLDER = pathlib.Path(__file__).parent / "transformers_configs"
FAMILIES = {"qwen2": qwen2.FAMILY, "qwen3": qwen3.FAMILY, "qwen3_moe": qwen3.FAMILY}
WRITTEN = {
  (model_type, version): raw
  for model_type in FAMILIES
  for version, raw in json.loads((FOLDER / f"{model_type}.json").read_text()).items()
}
# As published: 28 layers of which none slides, whatever these say.
WINDOWS = {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}


@pytest.mark.parametrize(("model_type", "version"), WRITTEN)
def test_keys_of_the_base_stay(model_type, version):
  base, family = WRITTEN[model_type, version] | WINDOWS | {"mine": 1}, FAMILIES[model_type]
  saved = config_json(family, family.read_config(base), base, "float32")
  assert {key: saved[key] for key in base} == base | {key: "float32" for key in base if "dtype" in key}
  assert list(saved)[: len(base)] == list(base)
  added = saved.keys() - base.keys()
  assert added <= family.write_config(family.read_config(base)).keys() | {"dtype", "torch_dtype"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_changes_is_written_and_nothing_else(model_type):
  family = FAMILIES[model_type]
  base = WRITTEN[model_type, "4.51.3"] | WINDOWS | {"rope_scaling": None}
  config = dataclasses.replace(family.read_config(base), rope_theta=7.5)
  saved = config_json(family, config, base, "float32")
  assert {key for key in base if saved[key] != base[key]} == {"rope_theta"}
  assert saved["rope_parameters"]["rope_theta"] == 7.5
  assert family.read_config(saved) == config


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_window_that_changes_is_written_in_every_spelling(model_type):
  family = FAMILIES[model_type]
  base = WRITTEN[model_type, "4.57.1"] | WINDOWS
  config = dataclasses.replace(family.read_config(base), sliding_window=4, max_window_layers=1)
  saved = config_json(family, config, base, "float32")
  changed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
  assert saved == base | changed | {"layer_types": ["full_attention", "sliding_attention"]} | {
    key: saved[key] for key in saved.keys() - base.keys() | {"dtype"}
  }


def test_null_stays_only_where_it_still_says_the_same():
  family = qwen2.FAMILY
  base = WRITTEN["qwen2", "4.46.3"] | {"head_dim": None, "num_key_value_heads": None}
  config = family.read_config(base)
  saved = config_json(family, config, base, "float32")
  assert saved["head_dim"] is saved["num_key_value_heads"] is None
  wider = dataclasses.replace(config, embed_dim=60)
  saved = config_json(family, wider, base, "float32")
  assert (saved["hidden_size"], saved["head_dim"]) == (60, config.head_dim)
  assert family.read_config(saved) == wider
