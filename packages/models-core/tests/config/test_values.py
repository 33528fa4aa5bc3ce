import enum
import types
from collections.abc import Mapping

import numpy as np
import pytest

from models_core.config.fields import check_decoder
from models_core.config.keys import ConfigKeys
from models_core.errors import ConfigError
from models_core.layers import RematConfig
from models_core.rope_scaling import LinearScaling
from models_core.sharding import ShardingConfig


def test_get_gives_the_value_as_it_is_and_marks_it_as_read():
  keys = ConfigKeys({"list": [1], "object": {"a": 1}, "null": None})
  assert keys.get("list", list) == [1]
  assert keys.get("object", Mapping) == {"a": 1}
  assert keys.get("null", list) is None
  assert keys.get("absent") is None
  keys.done()


def test_get_refuses_another_kind():
  with pytest.raises(ConfigError, match=r"layer_types is 6, expected a list"):
    ConfigKeys({"layer_types": 6}).get("layer_types", list)


def test_number_or_null_tells_null_from_absent():
  keys = ConfigKeys({"cap": 30.0, "none": None})
  assert keys.number_or_null("cap") == 30.0
  assert keys.number_or_null("none") is None
  keys.done()
  with pytest.raises(ConfigError, match="absent is missing"):
    keys.number_or_null("absent")


SIZES = {"num_layers": 2, "vocab_size": 9, "embed_dim": 8, "hidden_dim": 6, "num_heads": 4, "head_dim": 2}
NUMBERS = {"num_kv_heads": 2, "rope_theta": 1e4, "norm_eps": 1e-6}


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("num_layers", 0, "num_layers is 0, expected a positive whole number"),
    ("embed_dim", 8.0, "embed_dim is 8.0, expected"),
    ("vocab_size", None, "vocab_size is None"),
    ("hidden_dim", True, "hidden_dim is True"),
    ("rope_theta", "1e4", "rope_theta is '1e4', expected a positive number"),
    ("norm_eps", float("nan"), "norm_eps is nan"),
    ("num_kv_heads", 3, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ("head_dim", 3, "head_dim=3 is odd"),
  ],
)
def test_what_no_decoder_could_have_is_refused(field, value, message):
  check_decoder(types.SimpleNamespace(**SIZES, **NUMBERS))
  with pytest.raises(ConfigError, match=message):
    check_decoder(types.SimpleNamespace(**SIZES | NUMBERS | {field: value}))


REMATS = {
  RematConfig.NONE: (1, "none", "NONE", np.int64(1)),
  RematConfig.BLOCK: (2, "block", "Block", RematConfig.BLOCK),
  RematConfig.DECODER: (3, "decoder", "DECODER", np.int32(3)),
}


@pytest.mark.parametrize(("expected", "values"), REMATS.items(), ids=str)
def test_remat_config_is_a_member_its_name_or_its_number(expected, values):
  for value in values:
    config = types.SimpleNamespace(**SIZES, **NUMBERS, remat_config=value)
    check_decoder(config)
    assert config.remat_config is expected


# An enum of another library, whose members are no names.
Foreign = enum.Enum("Foreign", ["NONE"])


@pytest.mark.parametrize("value", [0, 4, -1, 1.0, True, False, None, "", "full", [1], Foreign.NONE], ids=str)
def test_another_remat_config_is_refused_with_the_choices(value):
  config = types.SimpleNamespace(**SIZES, **NUMBERS, remat_config=value)
  with pytest.raises(
    ConfigError, match=r"remat_config is .*, expected one of NONE \(1\), BLOCK \(2\), DECODER \(3\)"
  ):
    check_decoder(config)


class Halved:
  """A scaling that no architecture knows."""

  magnitude = 1.0

  def scale(self, inverse_frequencies):
    return inverse_frequencies / 2


def test_any_scaling_is_accepted():
  for scaling in (None, LinearScaling(8.0), Halved()):
    check_decoder(types.SimpleNamespace(**SIZES, **NUMBERS, rope_scaling=scaling))


@pytest.mark.parametrize(
  "value", ["linear", 8.0, {"rope_type": "linear", "factor": 8.0}, LinearScaling], ids=str
)
def test_what_is_no_scaling_is_refused_with_the_choices(value):
  with pytest.raises(
    ConfigError, match=r"rope_scaling is .*, expected None or a scaling.*LinearScaling, Llama3Scaling"
  ):
    check_decoder(types.SimpleNamespace(**SIZES, **NUMBERS, rope_scaling=value))


@pytest.mark.parametrize("value", [None, "fsdp", ShardingConfig], ids=str)
def test_what_is_no_sharding_config_is_refused(value):
  with pytest.raises(
    ConfigError, match=r"shd_config is .*, expected a models_core\.sharding\.ShardingConfig"
  ):
    check_decoder(types.SimpleNamespace(**SIZES, **NUMBERS, shd_config=value))
