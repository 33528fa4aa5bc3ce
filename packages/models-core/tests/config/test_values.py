import types
from collections.abc import Mapping

import pytest

from models_core.config.fields import check_decoder
from models_core.config.keys import ConfigKeys
from models_core.errors import ConfigError


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
