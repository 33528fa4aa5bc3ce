from collections.abc import Mapping

import pytest

from models_core.config_keys import ConfigKeys
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
