"""Templates alone: what they find, and what they may not do."""

import dataclasses
import datetime
import json

import numpy as np
import pytest

from models_automodel.text.chat_template import ChatTemplate, choose, plain_messages, render
from models_core.errors import ConfigError


@pytest.mark.parametrize(
  ("template", "variables", "text"),
  [
    ("{{ x | tojson }}", {"x": {"a": "<é>"}}, '{"a": "<é>"}'),
    ("{{ x | tojson(indent=1) }}", {"x": [1]}, "[\n 1\n]"),
    (
      "{{ x | tojson(ensure_ascii=True, sort_keys=True) }}",
      {"x": {"b": "é", "a": 1}},
      r'{"a": 1, "b": "\u00e9"}',
    ),
    ("{{ x | tojson(separators=(',', ':')) }}", {"x": {"b": 1.5, "a": None}}, '{"b":1.5,"a":null}'),
    ("{{ strftime_now('%Y') }}", {}, str(datetime.datetime.now().year)),
    ("{% for i in x %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {"x": [1, 2, 3]}, "1"),
    ("{% for i in x %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", {"x": [1, 2, 3]}, "13"),
    ("a{% generation %}b{{ x }}{% endgeneration %}c", {"x": 1}, "ab1c"),
    ("{% if x %}\n  {% set y = 1 %}\n{{ y }}\n{% endif %}\n", {"x": 1}, "1\n"),
    ("{{ missing }}", {}, ""),
    (
      "{{ x }} {{ x[0] }} {{ y }}",
      {"x": (1, "a"), "y": {"k": [True, None]}},
      "(1, 'a') 1 {'k': [True, None]}",
    ),
    (
      "{%- set ns = namespace(n=0) -%}\n{%- for i in x -%}\n{%- set ns.n = ns.n + i -%}\n{%- endfor -%}\n{{ ns.n }}",
      {"x": [1, 2]},
      "3",
    ),
    ("{% set t %}a{{ x }}{% endset %}{{ t | upper ~ t | trim | length }}", {"x": "b"}, "AB2"),
    (
      "{{ x[::-1] | join(',') }} {{ x[1:][0].split('</think>')[-1].lstrip('\\n') }}",
      {"x": ["u", "t</think>\n\nv"]},
      "t</think>\n\nv,u v",
    ),
    (
      "{% macro m(a, b='?') %}[{{ a }}{{ b }}{{ caller() if caller else '' }}]{% endmacro %}{{ m(1) }}{% call m(2, b='!') %}x{% endcall %}",
      {},
      "[1?][2!x]",
    ),
    (
      "{% for m in x if m.role != 'system' %}{{ loop.index0 }}{{ m['content'] }}{{ '' if loop.last else loop.nextitem.role }}{% endfor %}",
      {"x": [{"role": "system"}, {"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
      "0atool1b",
    ),
    (
      "{{ x is string }}{{ x is mapping }}{{ x is iterable }}{{ x is sequence }}{{ y is defined }}{{ z is none }}",
      {"x": {"a": 1}, "z": None},
      "FalseTrueTrueTrueFalseTrue",
    ),
    (
      "{{ x | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('|') }}",
      {"x": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
      "a|b",
    ),
    (
      "{% for k, v in x | dictsort %}{{ k }}{{ v }}{% endfor %}{% for k, v in x.items() %}{{ k }}{% endfor %}",
      {"x": {"b": 1, "a": 2}},
      "a2b1ba",
    ),
    (
      "{% filter upper %}{{ x.get('k', 'none') }}{% endfilter %}{{ '%s-%05.1f' % (x.j, 2) }}",
      {"x": {"j": "y"}},
      "NONEy-002.0",
    ),
    (
      "{{ x | safe | replace('a', 'b') | title }} {{ '{}:{!r}'.format(x, x) }}",
      {"x": "<a>"},
      "<B> <a>:'<a>'",
    ),
    ("{{ 'a' if x else 'b' }}{{ x or 'c' }}{{ 7 // 2 }}{{ 'x' in 'xyz' and not x }}", {"x": ""}, "bc3True"),
    ("{{ x }}", {"x": "\ud83d lone"}, "\ud83d lone"),
    (
      "{{ raise_exception is defined }}{{ range(3) | list }}{{ dict(a=1) }}{# no #}",
      {},
      "True[0, 1, 2]{'a': 1}",
    ),
  ],
)
def test_templates_find_what_they_expect(template, variables, text):
  assert render(template, variables) == text


@pytest.mark.parametrize(
  "template",
  [
    "{{ ''.__class__.__mro__ }}",
    "{{ x.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ (x | attr('__class__')).x }}",
    "{% set ns = namespace() %}{{ ns.__init__.x }}",
    "{% if %}",
    "{{ missing.deeper }}",
  ],
)
def test_templates_are_confined(template):
  with pytest.raises(ConfigError, match="the chat template refuses"):
    render(template, {"x": []})


@pytest.mark.parametrize(
  ("template", "message"),
  [
    (
      "{{ raise_exception('roles must alternate é') }}",
      "^the chat template of a refuses these messages: roles must alternate é$",
    ),
    (
      "{{ 'a' + 1 }}",
      "^the chat template of a fails with these messages: TypeError: can only concatenate str",
    ),
    ("{{ 1 / 0 }}", "fails with these messages: ZeroDivisionError: division by zero"),
    ("{{ range(10**9) | list }}", "fails with these messages: OverflowError: Range too big"),
    ("{% include '/etc/passwd' %}", "fails with these messages: TypeError: no loader"),
  ],
)
def test_an_error_of_the_template_is_told_in_its_own_words(template, message):
  with pytest.raises(ConfigError, match=message):
    render(template, {}, origin="of a")


@dataclasses.dataclass
class Message:
  role: str
  content: object


class Model:
  """As objects of pydantic."""

  def model_dump(self):
    return {"role": "user", "content": Text("a")}


class Text(str):
  def danger(self):
    return "called"


def test_templates_find_plain_data_alone():
  values = {
    "a": Message("user", Model()),
    "n": np.float32(0.5),
    "o": object,
    "t": Text("b"),
    "b": np.bool_(False),
  }
  template = "{{ a.content.content }}{{ n * 2 }}{{ o }}{{ t.danger is defined }}{{ b or 'no' }}"
  assert render(template, values) == "a1.0<type>Falseno"


def nested(depth):
  value: list = []
  for _ in range(depth):
    value = [value]
  return value


def test_variables_that_contain_themselves():
  x: list = []
  x.append(x)
  for value in (x, nested(101), nested(100_000)):
    with pytest.raises(ConfigError, match="nested more than 100 levels deep, or contains itself"):
      render("", {"x": value})
    with pytest.raises(ConfigError, match="nested more than 100 levels deep, or contains itself"):
      plain_messages([{"content": value}])
  assert render("{{ x | tojson }}", {"x": nested(100)}) == json.dumps(nested(100))


def test_messages_are_plain():
  found = plain_messages(
    [Message("user", None), Model(), {"role": "assistant", "reasoning": "r", "content": "c"}]
  )
  assert found == [
    {"role": "user"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "c", "reasoning": "r", "thinking": "r", "reasoning_content": "r"},
  ]
  with pytest.raises(ConfigError, match=r"messages\[0\] is a list, expected a dict .* one by one"):
    plain_messages([[{"role": "user", "content": "a"}]])


DEFAULT, TOOLS, RAG = (ChatTemplate(source, source) for source in ("d", "t", "r"))


@pytest.mark.parametrize(
  ("templates", "asked", "tools", "chosen"),
  [
    ({"default": DEFAULT, "tool_use": TOOLS, "rag": RAG}, None, None, "d"),
    ({"default": DEFAULT, "tool_use": TOOLS, "rag": RAG}, None, [{}], "t"),
    ({"default": DEFAULT, "tool_use": TOOLS, "rag": RAG}, None, [], "t"),
    ({"default": DEFAULT, "tool_use": TOOLS, "rag": RAG}, "rag", [{}], "r"),
    ({"default": DEFAULT, "rag": RAG}, None, [{}], "d"),
    ({"tool_use": TOOLS, "rag": RAG}, None, [{}], "t"),
    ({"default": DEFAULT}, "{{ own }}", None, "{{ own }}"),
    ({}, "{{ own }}", None, "{{ own }}"),
  ],
)
def test_which_template_is_taken(templates, asked, tools, chosen):
  assert choose(templates, asked, tools=tools).source == chosen


def test_a_name_that_no_template_has():
  with pytest.raises(
    ConfigError, match=r"no chat template 'rga': choose one of default, rag, or pass Jinja source"
  ):
    choose({"default": DEFAULT, "rag": RAG}, "rga")


def test_several_templates_without_a_default():
  with pytest.raises(ConfigError, match=r"several chat templates and no default: .* tool_use, rag$"):
    choose({"tool_use": TOOLS, "rag": RAG})
