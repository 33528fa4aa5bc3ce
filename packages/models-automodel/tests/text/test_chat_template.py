"""Templates alone: what they find, and what they may not do."""

import datetime

import pytest

from models_automodel.text.chat_template import render
from models_core.errors import ConfigError


@pytest.mark.parametrize(
  ("template", "variables", "text"),
  [
    ("{{ x | tojson }}", {"x": {"a": "<é>"}}, '{"a": "<é>"}'),
    ("{{ x | tojson(indent=1) }}", {"x": [1]}, "[\n 1\n]"),
    ("{{ strftime_now('%Y') }}", {}, str(datetime.datetime.now().year)),
    ("{% for i in x %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {"x": [1, 2, 3]}, "1"),
    ("a{% generation %}b{{ x }}{% endgeneration %}c", {"x": 1}, "ab1c"),
    ("{% if x %}\n  {% set y = 1 %}\n{{ y }}\n{% endif %}\n", {"x": 1}, "1\n"),
    ("{{ missing }}", {}, ""),
  ],
)
def test_templates_find_what_they_expect(template, variables, text):
  assert render(template, variables) == text


@pytest.mark.parametrize(
  "template", ["{{ ''.__class__.__mro__ }}", "{{ x.append(1) }}", "{% if %}", "{{ missing.deeper }}"]
)
def test_templates_are_confined(template):
  with pytest.raises(ConfigError, match="the chat template refuses"):
    render(template, {"x": []})
