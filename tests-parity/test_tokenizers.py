"""Tokenizers and chat templates: the same texts and ids as transformers'."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from models_automodel.text import load_tokenizer
from models_core.errors import ConfigError

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL = ["<s>", "</s>", "<unk>", "<img>", "<|im_end|>", "<|endoftext|>"]
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "weather",
      "description": 'the "weather" of a <city> & more é',
      "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo"]}}},
    },
  }
]
CALL = {
  "id": "1",
  "type": "function",
  "function": {"name": "weather", "arguments": {"city": "Zürich", "n": None}},
}
TURNS = [
  {"role": "system", "content": " Be brief.\n"},
  {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
  {"role": "assistant", "content": None, "tool_calls": [CALL]},
  {"role": "tool", "tool_call_id": "1", "content": '{"t": 1.50}'},
  {"role": "assistant", "content": "<think>\nhm\n</think>\n\nCold.", "reasoning": "because"},
]
CHATML = """{%- macro text(content) %}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for item in content if item.type == 'text' or 'image' in item.type %}
      {{- image_token if item.type == 'image' else item.text | trim }}
    {%- endfor %}
  {%- endif %}
{%- endmacro %}
{%- set ns = namespace(last=-1, names=[]) %}
{{- bos_token }}
{%- if tools %}{{ '\\n'.join(['<tools>']) }}
{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{{ tool.function.parameters | tojson(indent=2) }}
{%- set ns.names = ns.names + [tool.function.name] %}{%- endfor %}
</tools>
{% endif %}
{% for message in messages %}
  {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
  {%- set content = text(message.content) if message.content else '' %}
  {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
  {{- '<|im_start|>' + message['role'] + '\\n' + content }}
  {%- if message.reasoning_content is defined and message.reasoning_content is not none %}[{{ message.reasoning_content }}]{% endif %}
  {%- for call in message.tool_calls or [] %}
    {%- for name, value in call.function.arguments.items() %}{{ name }}={{ value | tojson if value is not string else value }};{% endfor %}
  {%- endfor %}
  {%- if loop.first and not loop.last and loop.nextitem.role == 'user' %}{{ ' first ' }}{% endif %}
  {%- generation %}<|im_end|>{% endgeneration %}

{% endfor %}
{{ ns.last }} {{ ns.names | join('|') }} {{ messages[::-1][0].role | title }} {{ (messages | selectattr('role', 'equalto', 'tool') | list | length) }}
{%- for i in range(9) %}{% if i is divisibleby 2 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{%- if documents %}{{ documents[0]['title'] }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}<no>{% endif %}{% endif %}
"""
OPTIONS = [
  {},
  {"tools": TOOLS},
  {"tools": []},
  {"add_generation_prompt": True, "enable_thinking": False},
  {"documents": [{"title": "T", "text": "x"}]},
  {"bos_token": "mine"},
]


def engine(single=None):
  vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(SPECIAL)
  if single is not None:
    frames = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=frames)
  return made


def both(folder, config, single=None, files=None):
  """Our tokenizer of a directory, and transformers'."""
  folder.mkdir(exist_ok=True)
  engine(single).save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config)
  )
  for name, text in (files or {}).items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
  return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_template_with_common_constructs(options, tmp_path):
  ours, theirs = both(
    tmp_path, ROLES | {"chat_template": CHATML, "extra_special_tokens": {"image_token": "<img>"}}
  )
  options = {"add_generation_prompt": False} | options
  text = theirs.apply_chat_template(TURNS, tokenize=False, **options)
  assert ours.render(TURNS, **options) == text
  assert ours.chat(TURNS, **options) == theirs.apply_chat_template(TURNS, return_dict=False, **options)
  assert "<img>" in text


@pytest.mark.parametrize("field", [True, "content", "reasoning_content"])
@pytest.mark.parametrize("content", ["Cold ", [{"type": "text", "text": "Cold\n"}]], ids=["text", "parts"])
def test_the_last_message_is_continued(content, field, tmp_path):
  ours, theirs = both(tmp_path, ROLES | {"chat_template": CHATML})
  turns = [*TURNS[:2], {"role": "assistant", "content": content, "thinking": "be "}]
  options = {"continue_final_message": field}
  assert ours.render(turns, **options) == theirs.apply_chat_template(turns, tokenize=False, **options)


TWO = [
  {"name": "tool_use", "template": "T{{ tools | tojson }}"},
  {"name": "default", "template": "D{{ eos_token }}"},
]
NAMED = "additional_chat_templates/tool_use.jinja"


@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["without", "none", "with"])
@pytest.mark.parametrize(
  ("template", "files"),
  [
    ("S", {}),
    (TWO, {}),
    (TWO, {"chat_template.jinja": "J"}),
    (TWO, {"chat_template.jinja": "J", NAMED: "A"}),
    (TWO, {NAMED: "A", "additional_chat_templates/default.jinja": "B"}),
    ("S", {NAMED: "A"}),
  ],
)
def test_the_template_that_is_taken(template, files, tools, tmp_path):
  ours, theirs = both(tmp_path, ROLES | {"chat_template": template}, files=files)
  messages = [{"role": "user", "content": "a"}]
  try:
    text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
  except ValueError:
    with pytest.raises(ConfigError, match="no default"):
      ours.render(messages, tools=tools)
  else:
    assert ours.render(messages, tools=tools) == text


@pytest.mark.parametrize(
  "config",
  [
    {"extra_special_tokens": {"image_token": "<img>", "other": "x"}},
    {"extra_special_tokens": ["<img>"]},
    {"audio_token": "<img>"},
    {"tokenizer_class": "Qwen2Tokenizer"},
    {"bos_token": None},
  ],
  ids=str,
)
def test_the_special_tokens_that_a_template_finds(config, tmp_path):
  names = ["bos_token", "eos_token", "pad_token", "image_token", "other", "audio_token"]
  template = " ".join(f"{{{{ {name} }}}}" for name in names)
  ours, theirs = both(tmp_path, ROLES | {"chat_template": template} | config)
  messages = [{"role": "user", "content": "a"}]
  assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("single", [None, "$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
  "stated", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}], ids=str
)
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_what_frames_a_text(name, stated, single, tmp_path):
  ours, theirs = both(tmp_path, ROLES | {"tokenizer_class": name} | stated, single)
  assert ours.encode("ab<img>") == theirs("ab<img>")["input_ids"]
