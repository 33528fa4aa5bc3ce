import re

import pytest

from models_core.errors import ConfigError
from models_core.formats import LocalFiles, read_json

WRONG = {
  "empty": (b"", "is not valid JSON"),
  "truncated": (b'{"a": 1', "is not valid JSON"),
  "not UTF-8": (b'{"a": "\xff"}', "is not valid JSON: 'utf-8' codec"),
  "with a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
  "too deep": (b'{"a": ' + b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
  "a duplicate key": (b'{"a": 1, "a": 1}', "is not valid JSON: the key 'a' occurs twice"),
  "a duplicate key in a nested object": (
    b'{"a": {"b": 1, "b": 1}}',
    "is not valid JSON: the key 'b' occurs twice",
  ),
  "a list": (b"[]", "holds a value of type list, expected a JSON object"),
  "null": (b"null", "holds a value of type NoneType, expected a JSON object"),
  "a text": (b'"a"', "holds a value of type str, expected a JSON object"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_object_is_one_error_that_names_the_file(tmp_path, content, message):
  (tmp_path / "x.json").write_bytes(content)
  with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))}/x.json {re.escape(message)}"):
    read_json(LocalFiles(str(tmp_path)), "x.json")


def test_an_object_is_read_as_it_is(tmp_path):
  (tmp_path / "x.json").write_text('{"b": [1, 2.5, null], "a": {"é": true}}')
  found = read_json(LocalFiles(str(tmp_path)), "x.json")
  assert found == {"b": [1, 2.5, None], "a": {"é": True}}
  assert list(found) == ["b", "a"]


def test_a_missing_file_is_the_system_s_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    read_json(LocalFiles(str(tmp_path)), "x.json")
