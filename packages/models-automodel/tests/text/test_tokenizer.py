import json
import random
import re
import sys

import gguf
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from models_automodel.text import load_tokenizer
from models_automodel.text.chat_template import render
from models_core.errors import CheckpointError, ConfigError, ModelsError
from models_core.formats import SafetensorsCheckpoint, as_files, read_gguf

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
CORPUS = [
  "The quick brown fox doesn't jump over the lazy dogs; we've seen it, they're HERE.",
  "def f(x):\n    return x + 12345 - 67 * 890\n\n\nprint(f(3.14159))\r\n\tend",
  "größe naïve café señor 日本語のテスト 한국어 русский текст 😀 🎉🎉 ‰",
  "  leading and trailing   spaces  \n \n\n  ",
] * 3
TRICKY = [
  "",
  " ",
  "   ",
  "\n",
  "\n\n\n",
  "Hello world",
  " Hello world ",
  "  two  spaces\n\n\ttabs 12345 67",
  "1234567890 3.14159 1,000,000 x2y",
  "don't I'LL we've They'Re",
  "😀🎉 👩‍👩‍👧 日本語 ñandú \u00a0nbsp\r\n",
  "e\u0301 decomposed",
  "<|im_start|>user\nhi there<|im_end|>\n",
  "a<|endoftext|> b",
  "a" * 50,
  "def f(x):\n    return x  # comment\n",
  "!?!?...--- «quoted» $100",
]
TEMPLATE = (
  "{% for message in messages %}\n"
  "  {% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
  "{% endfor %}\n"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def cl100k(digits):
  split = pre_tokenizers.Split(Regex(CL100K.replace("DIGITS", digits)), "isolated")
  return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2():
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# tokenizer.ggml.pre -> what the published tokenizer.json files of this kind hold.
PUBLISHED = {
  "default": (gpt2(), None),
  "gpt-2": (gpt2(), None),
  "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()]), None),
  "llama-bpe": (cl100k(r"\p{N}{1,3}"), None),
  "qwen2": (cl100k(r"\p{N}"), normalizers.NFC()),
  "deepseek-r1-qwen": (cl100k(r"\p{N}"), normalizers.NFC()),
}


def train(pre):
  engine = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
  engine.pre_tokenizer, normalizer = PUBLISHED[pre]
  if normalizer is not None:
    engine.normalizer = normalizer
  engine.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(
    vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
  )
  engine.train_from_iterator(CORPUS, trainer)
  return engine


def write_json(folder, engine, **files):
  folder.mkdir(exist_ok=True)
  engine.save(str(folder / "tokenizer.json"))
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


def write_gguf(path, engine, pre, **keys):
  """The same vocabulary and merges, as a converter writes them."""
  raw = json.loads(engine.to_str())
  tokens = sorted(engine.get_vocab(), key=engine.get_vocab().get)
  control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types([control if t in SPECIAL else normal for t in tokens])
  writer.add_token_merges([" ".join(merge) for merge in raw["model"]["merges"]])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  for name, value in keys.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


@pytest.fixture(scope="module", params=PUBLISHED)
def pair(request, tmp_path_factory):
  """One tokenizer, from tokenizer.json and from GGUF."""
  folder = tmp_path_factory.mktemp("tokenizer")
  engine = train(request.param)
  path = write_gguf(folder / "m.gguf", engine, request.param, add_bos_token=False)
  return load_tokenizer(write_json(folder / "json", engine)), load_tokenizer(path)


@pytest.mark.parametrize("text", TRICKY)
def test_both_forms_agree(pair, text):
  published, converted = pair
  ids = published.encode(text)
  assert converted.encode(text) == ids
  assert converted.decode(ids) == published.decode(ids)
  assert converted.decode(ids, skip_special_tokens=False) == published.decode(ids, skip_special_tokens=False)


def test_random_texts_agree_and_return(pair):
  published, converted = pair
  rng = random.Random(0)
  alphabet = "abc XYZ 019 \n\t'\u00e9\u65e5\U0001f600.,!<|>" + "".join(SPECIAL)
  for _ in range(300):
    text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
    ids = converted.encode(text)
    assert ids == published.encode(text)
    assert converted.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_ids(pair):
  _, converted = pair
  ids = converted.encode("<|im_start|>x<|im_end|>")
  assert (ids[0], ids[-1]) == (1, 2)
  assert converted.decode(ids) == "x"


@pytest.mark.parametrize("text", TRICKY)
def test_streams_are_whole(pair, text):
  for tokenizer in pair:
    ids = tokenizer.encode(text)
    pieces = list(tokenizer.stream(iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(piece and not piece.endswith("\ufffd") for piece in pieces)


@pytest.fixture(scope="module")
def engine():
  return train("smollm")


def test_a_stream_holds_half_a_character_back(engine, tmp_path):
  tokenizer = load_tokenizer(write_json(tmp_path, train_bytes()))
  ids = tokenizer.encode("a😀b")
  assert len(ids) == 6
  sent = []

  def source():
    for i in ids:
      sent.append(i)
      yield i

  arrivals = [(len(sent), piece) for piece in tokenizer.stream(source())]
  assert arrivals == [(1, "a"), (5, "😀"), (6, "b")]
  # What never becomes whole comes at the end.
  assert list(tokenizer.stream(ids[:3])) == ["a", "\ufffd"]


def train_bytes():
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  engine = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
  engine.pre_tokenizer, engine.decoder = gpt2(), decoders.ByteLevel()
  return engine


# What stands in front of a text, and what ends one.


@pytest.mark.parametrize(
  ("keys", "before", "after"),
  [
    ({"add_bos_token": True}, [1], []),
    ({"add_bos_token": False}, [], []),
    ({}, [], []),
    ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
  ],
)
def test_gguf_framing(engine, tmp_path, keys, before, after):
  tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", engine, "smollm", **keys))
  plain = engine.encode("hello", add_special_tokens=False).ids
  assert tokenizer.encode("hello") == [*before, *plain, *after]
  # Not doubled.
  assert tokenizer.encode("<|im_start|>hello") == [1, *plain, *after]


def test_llama_bpe_has_a_bos_by_default(tmp_path):
  tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", train("llama-bpe"), "llama-bpe"))
  assert tokenizer.encode("") == [1]


def test_a_post_processor_frames(engine, tmp_path):
  framed = tokenizers.Tokenizer.from_str(engine.to_str())
  framed.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
  )
  framed.enable_truncation(4)
  framed.enable_padding(length=64)
  tokenizer = load_tokenizer(write_json(tmp_path, framed))
  plain = engine.encode("hello there, you", add_special_tokens=False).ids
  assert tokenizer.encode("hello there, you") == [1, *plain, 2]


ROLES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
BOS, BOTH = "<|im_start|> $A", "<|im_start|> $A <|im_end|>"


@pytest.mark.parametrize(
  ("name", "processor", "stated", "frame", "noted"),
  [
    # The post-processor alone decides.
    ("PreTrainedTokenizerFast", None, {}, "", None),
    ("PreTrainedTokenizerFast", BOTH, {}, "be", None),
    (
      "PreTrainedTokenizerFast",
      None,
      {"add_bos_token": True},
      "",
      "PreTrainedTokenizerFast goes by .* nothing before",
    ),
    (
      "PreTrainedTokenizerFast",
      BOS,
      {"add_bos_token": False},
      "b",
      "add_bos_token is false, but .* a token before",
    ),
    ("Qwen2Tokenizer", None, {"add_bos_token": False}, "", None),
    ("Qwen2TokenizerFast", BOS, {"add_eos_token": True}, "b", "add_eos_token is true, but .* nothing after"),
    ("GPT2Tokenizer", None, {"add_bos_token": True}, "", "GPT2Tokenizer goes by"),
    ("TokenizersBackend", BOTH, {"add_eos_token": False}, "be", "TokenizersBackend goes by"),
    # The class decides, whatever the post-processor is.
    ("LlamaTokenizer", BOS, {}, "b", None),
    (
      "LlamaTokenizerFast",
      None,
      {},
      "b",
      "LlamaTokenizerFast puts its bos_token before a text, as in transformers 4",
    ),
    (
      "LlamaTokenizerFast",
      BOS,
      {"add_bos_token": False},
      "",
      "LlamaTokenizerFast puts nothing before a text",
    ),
    ("LlamaTokenizerFast", BOTH, {"add_bos_token": True, "add_eos_token": True}, "be", None),
    ("GemmaTokenizer", BOTH, {}, "b", "GemmaTokenizer puts nothing after a text"),
    (
      "GemmaTokenizerFast",
      None,
      {"add_bos_token": None, "add_eos_token": True},
      "be",
      "GemmaTokenizerFast puts its",
    ),
    ("CohereTokenizerFast", None, {"add_bos_token": False}, "", None),
    ("GPTNeoXTokenizerFast", BOS, {}, "", "GPTNeoXTokenizerFast puts nothing before"),
    # Without a class, what is stated.
    (None, None, {"add_bos_token": True}, "b", None),
    (None, BOTH, {"add_eos_token": False}, "b", None),
    (None, BOTH, {}, "be", None),
  ],
)
def test_what_frames_a_text_is_the_rule_of_the_class(
  engine, tmp_path, caplog, name, processor, stated, frame, noted
):
  framed = tokenizers.Tokenizer.from_str(engine.to_str())
  if processor:
    framed.post_processor = tokenizers.processors.TemplateProcessing(
      single=processor, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
  named = {} if name is None else {"tokenizer_class": name}
  tokenizer = load_tokenizer(write_json(tmp_path, framed, tokenizer_config={**ROLES, **stated, **named}))
  assert (tokenizer.before, tokenizer.after) == ((1,) * ("b" in frame), (2,) * ("e" in frame))
  assert [record.levelname for record in caplog.records][:1] == (["WARNING"] if noted else [])
  assert re.search(noted or "", caplog.text)


def test_the_class_of_the_model_is_taken_if_none_is_named(engine, tmp_path):
  for model_type, before in (("gemma2", (1,)), ("llama", (1,)), ("qwen3", ()), ("other", ())):
    config = {"config": {"model_type": model_type}, "tokenizer_config": ROLES}
    assert load_tokenizer(write_json(tmp_path, engine, **config)).before == before
  config = {"config": {"model_type": "llama", "tokenizer_class": "Qwen2Tokenizer"}, "tokenizer_config": ROLES}
  assert load_tokenizer(write_json(tmp_path, engine, **config)).before == ()
  # A role that the vocabulary lacks is not added.
  config = {"config": {"model_type": "llama"}, "tokenizer_config": {"bos_token": "<s>"}}
  assert load_tokenizer(write_json(tmp_path, engine, **config)).before == ()


# Special tokens.


@pytest.mark.parametrize("token", ["<|im_start|>", {"content": "<|im_start|>", "lstrip": False}])
def test_a_token_is_a_string_or_an_object(engine, tmp_path, token):
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config={"bos_token": token}))
  assert tokenizer.special_tokens == {"bos_token": "<|im_start|>"}
  assert tokenizer.bos_id() == 1


@pytest.mark.parametrize(
  ("files", "named", "unnamed"),
  [
    (
      {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|eot_id|>"}}},
      {"image_token": "<|eot_id|>"},
      (),
    ),
    (
      {
        "tokenizer_config": {
          "extra_special_tokens": {"x": {"content": "y"}},
          "audio_token": "<a>",
          "add_bos_token": False,
        }
      },
      {"x": "y", "audio_token": "<a>"},
      (),
    ),
    ({"tokenizer_config": {"extra_special_tokens": ["<a>", {"content": "<b>"}]}}, {}, ("<a>", "<b>")),
    (
      {"tokenizer_config": {"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<a>", "<b>"]}},
      {},
      ("<a>", "<b>"),
    ),
    (
      {"special_tokens_map": {"additional_special_tokens": ["<c>"], "eos_token": "e"}},
      {"eos_token": "e"},
      ("<c>",),
    ),
    # The map counts more, unless the configuration is newer than it.
    (
      {"tokenizer_config": {"eos_token": "f"}, "special_tokens_map": {"eos_token": "e"}},
      {"eos_token": "e"},
      (),
    ),
    (
      {
        "tokenizer_config": {"eos_token": "f", "added_tokens_decoder": {}},
        "special_tokens_map": {"eos_token": "e", "bos_token": "b"},
      },
      {"eos_token": "f"},
      (),
    ),
    # A class has tokens of its own; null is none.
    (
      {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None}},
      {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
      (),
    ),
    ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}, {}, ()),
  ],
)
def test_special_tokens(engine, tmp_path, files, named, unnamed):
  tokenizer = load_tokenizer(write_json(tmp_path, engine, **files))
  assert (tokenizer.special_tokens, tokenizer.additional_special_tokens) == (named, unnamed)


def test_templates_find_special_tokens(engine, tmp_path):
  config = {
    "bos_token": "<|im_start|>",
    "extra_special_tokens": {"image_token": "<img>"},
    "additional_special_tokens": ["<a>", "<b>"],
    "chat_template": "{{ bos_token }}{{ image_token }}{{ additional_special_tokens[1] }}{{ eos_token }}",
  }
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config=config))
  assert tokenizer.render([]) == "<|im_start|><img><b>"
  assert tokenizer.render([], image_token="mine", eos_token="!") == "<|im_start|>mine<b>!"


def test_a_special_token_of_the_vocabulary_is_one_token(engine, tmp_path):
  plain = load_tokenizer(write_json(tmp_path, engine))
  word = next(t for t in engine.get_vocab() if len(t) > 2 and t.isascii() and t.isalpha())
  assert plain.decode(plain.encode(word)) == word
  marked = load_tokenizer(
    write_json(tmp_path, engine, tokenizer_config={"extra_special_tokens": {"x_token": word}})
  )
  assert marked.encode(f"a{word}b") == [*plain.encode("a"), engine.token_to_id(word), *plain.encode("b")]
  assert marked.decode(marked.encode(f"a{word}b")) == "ab"


def test_a_bos_that_is_not_there(engine, tmp_path):
  write_json(tmp_path, engine, tokenizer_config={"add_bos_token": True, "bos_token": "<s>"})
  with pytest.raises(CheckpointError, match="add_bos_token is true, but there is no bos_token"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  ("files", "stops"),
  [
    ({}, {0, 2, 3}),
    ({"generation_config": {"eos_token_id": [7, 8]}, "config": {"eos_token_id": 9}}, {0, 2, 3, 7, 8, 9}),
    ({"generation_config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "a"}}, {0, 2, 3, "a"}),
    ({"special_tokens_map": {"eos_token": {"content": "b"}}}, {0, 2, 3, "b"}),
  ],
)
def test_stop_ids_are_united(engine, tmp_path, files, stops):
  tokenizer = load_tokenizer(write_json(tmp_path, engine, **files))
  assert tokenizer.stop_ids == {engine.token_to_id(s) if isinstance(s, str) else s for s in stops}


def test_gguf_stop_ids(engine, tmp_path):
  plain = engine.token_to_id("a")
  path = write_gguf(tmp_path / "m.gguf", engine, "smollm", eot_token_id=plain)
  assert load_tokenizer(path).stop_ids == {0, 2, 3, plain}


# Names by which trainers ask.


def test_ids_of_the_special_tokens(engine, tmp_path):
  roles = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config=roles))
  assert (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (1, 2, 0)
  assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_ids_from_gguf(engine, tmp_path):
  tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", engine, "smollm", pad_token_id=3))
  assert (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (1, 2, 3)


def test_padding_is_the_eos_token_if_nothing_else_is_named(engine, tmp_path):
  tokenizer = load_tokenizer(
    write_json(tmp_path, engine, tokenizer_config={"eos_token": "<|im_end|>", "pad_token": None})
  )
  assert tokenizer.bos_id() is tokenizer.bos_token is None
  assert tokenizer.pad_id() == tokenizer.eos_id() == 2


@pytest.mark.parametrize("roles", [{}, {"eos_token": "</s>"}], ids=["unnamed", "not in the vocabulary"])
def test_without_an_eos_token_there_is_no_id(engine, tmp_path, roles):
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config=roles))
  for ask in (tokenizer.eos_id, tokenizer.pad_id):
    with pytest.raises(ConfigError, match=r"names no eos_token: .* stop_ids=\[0, 2, 3\]"):
      ask()


def test_a_text_can_be_encoded_without_what_frames_it(engine, tmp_path):
  tokenizer = load_tokenizer(
    write_gguf(tmp_path / "m.gguf", engine, "smollm", add_bos_token=True, add_eos_token=True)
  )
  plain = engine.encode("hello", add_special_tokens=False).ids
  assert tokenizer.encode("hello") == [1, *plain, 2]
  assert tokenizer.encode("hello", add_special_tokens=False) == plain


# Chat templates.

MESSAGES = [{"role": "user", "content": "Hi <there> ✓"}]
EXPECTED = "<|im_start|>user\nHi <there> ✓<|im_end|>\n"


@pytest.fixture(scope="module")
def chatty(engine, tmp_path_factory):
  path = tmp_path_factory.mktemp("chat") / "m.gguf"
  return load_tokenizer(write_gguf(path, engine, "smollm", chat_template=TEMPLATE, add_bos_token=True))


def test_chat(chatty):
  text = chatty.render(MESSAGES)
  assert text == EXPECTED + "<|im_start|>assistant\n"
  ids = chatty.chat(MESSAGES)
  assert chatty.decode(ids, skip_special_tokens=False) == text
  # The template's own first token, once.
  assert ids.count(1) == 2
  assert ids[0] == 1
  assert chatty.render(MESSAGES, add_generation_prompt=False) == EXPECTED


def test_the_chat_template_by_the_name_that_trainers_call(chatty):
  for prompt in (True, False):
    options = {"add_generation_prompt": prompt}
    assert chatty.apply_chat_template(MESSAGES, tokenize=False, **options) == chatty.render(
      MESSAGES, **options
    )
    assert chatty.apply_chat_template(MESSAGES, tokenize=True, **options) == chatty.chat(MESSAGES, **options)


def test_chat_from_json_is_the_same(chatty, engine, tmp_path):
  write_json(tmp_path, engine, tokenizer_config={"chat_template": TEMPLATE})
  assert load_tokenizer(tmp_path).chat(MESSAGES) == chatty.chat(MESSAGES)


TWO = [
  {"name": "tool_use", "template": "T{{ tools | tojson }}"},
  {"name": "default", "template": "D{{ documents }}"},
]
SCHEMA = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
  ("config", "files", "plain", "tools"),
  [
    (TWO, {}, "DNone", 'T[{"type": "function", "function": {"name": "f"}}]'),
    ({"default": "D", "tool_use": "T"}, {}, "D", "T"),
    ("S", {}, "S", "S"),
    ("S", {"chat_template.jinja": "J"}, "J", "J"),
    (TWO, {"chat_template.jinja": "J"}, "J", "J"),
    ("S", {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "A"}, "J", "A"),
    (None, {"chat_template.json": '{"chat_template": "P"}'}, "P", "P"),
    ("S", {"chat_template.json": '{"chat_template": "P"}'}, "S", "S"),
    ("S", {"additional_chat_templates/default.jinja": "A", "additional_chat_templates/n.txt": "B"}, "A", "A"),
  ],
)
def test_which_template_is_taken(engine, tmp_path, config, files, plain, tools):
  write_json(tmp_path, engine, tokenizer_config={"chat_template": config})
  (tmp_path / "additional_chat_templates").mkdir()
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.render(MESSAGES) == plain
  assert tokenizer.render(MESSAGES, tools=[SCHEMA]) == tools
  assert tokenizer.render(MESSAGES, chat_template="{{ messages | length }}") == "1"


def test_a_template_that_is_not_read_is_noted(engine, tmp_path, caplog):
  write_json(tmp_path, engine, tokenizer_config={"chat_template": TWO})
  (tmp_path / "chat_template.jinja").write_text("J")
  load_tokenizer(tmp_path)
  assert (
    "are those of chat_template.jinja; 'default' of tokenizer_config.json differs and is not read"
    in caplog.text
  )
  caplog.clear()
  write_json(tmp_path, engine, tokenizer_config={"chat_template": "J"})
  load_tokenizer(tmp_path)
  assert caplog.text == ""


def test_without_a_default_a_name_is_needed(engine, tmp_path):
  write_json(tmp_path, engine, tokenizer_config={"chat_template": "S"})
  (tmp_path / "additional_chat_templates").mkdir()
  for name in ("rag", "tool_use"):
    (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(name)
  tokenizer = load_tokenizer(tmp_path)
  with pytest.raises(
    ConfigError, match="several chat templates and no default: choose by chat_template= one of rag"
  ):
    tokenizer.render(MESSAGES)
  assert tokenizer.chat_template is None
  assert tokenizer.render(MESSAGES, tools=[]) == "tool_use"
  assert tokenizer.render(MESSAGES, chat_template="rag") == "rag"


def test_templates_of_gguf_files_have_names_too(engine, tmp_path):
  path = write_gguf(tmp_path / "m.gguf", engine, "smollm", chat_template=TWO)
  tokenizer = load_tokenizer(path)
  assert tokenizer.render(MESSAGES) == "DNone"
  assert tokenizer.render(MESSAGES, tools=[]) == "T[]"


def test_errors_name_the_template(engine, tmp_path):
  bad = [{"name": name, "template": "{{ raise_exception('no') }}"} for name in ("default", "tool_use")]
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config={"chat_template": bad}))
  with pytest.raises(
    ConfigError, match=r"the chat template 'tool_use' of tokenizer_config\.json refuses these messages: no"
  ):
    tokenizer.render(MESSAGES, tools=[])


@pytest.mark.parametrize(
  ("messages", "template", "field", "text"),
  [
    (
      [("user", "a"), ("assistant", "b ")],
      "{% for m in messages %}<{{ m.content }}>{% endfor %}",
      True,
      "<a><b ",
    ),
    ([("assistant", "b ")], "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", True, "<b"),
    (
      [("assistant", [{"type": "text", "text": "b"}, {"type": "x"}])],
      "{{ messages[0].content[0].text }}>",
      True,
      "b",
    ),
    ([("assistant", "b")], "{{ messages[0].content }}{{ 'x' if add_generation_prompt }}", "content", "b"),
  ],
)
def test_the_last_message_is_continued(engine, tmp_path, messages, template, field, text):
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config={"chat_template": template}))
  messages = [{"role": role, "content": content} for role, content in messages]
  assert tokenizer.render(messages, continue_final_message=field) == text


def test_reasoning_is_continued_under_each_of_its_names(engine, tmp_path):
  template = "{{ messages[0].thinking }}</think>"
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config={"chat_template": template}))
  message = {"role": "assistant", "reasoning_content": "hm"}
  assert tokenizer.render([message], continue_final_message="reasoning_content") == "hm"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"continue_final_message": True, "add_generation_prompt": True}, "contradict each other"),
    ({"continue_final_message": "name"}, "the last message has no 'name'"),
    ({"continue_final_message": True, "chat_template": "{# content #}"}, "leaves out, or changes"),
    (
      {"continue_final_message": True, "chat_template": "{# x #}"},
      "'content', or the chat template that was passed does not read",
    ),
    (
      {"tools": [print]},
      r"tools\[0\] is a builtin_function_or_method, expected a dict: of a function pass the JSON schema",
    ),
    ({"documents": ["a"]}, r"documents\[0\] is a str, expected a dict$"),
    ({"return_dict": True}, r"apply_chat_template\(return_dict=...\) is not implemented"),
  ],
)
def test_what_a_conversation_may_not_be_rendered_with(chatty, options, message):
  with pytest.raises(ConfigError, match=message):
    chatty.apply_chat_template(MESSAGES, **options)


def test_neutral_arguments_of_transformers_are_accepted(chatty):
  options = {"return_dict": False, "return_tensors": None, "padding": False, "max_length": None}
  assert chatty.apply_chat_template(MESSAGES, **options) == chatty.render(MESSAGES)


def test_messages_may_hold_null_and_reasoning(engine, tmp_path):
  template = "{% for m in messages %}{{ m.content }}{{ m.thinking }}{% endfor %}"
  tokenizer = load_tokenizer(write_json(tmp_path, engine, tokenizer_config={"chat_template": template}))
  assert tokenizer.render([{"role": "a", "content": None, "reasoning": "r"}]) == "r"


def test_a_template_refuses(chatty):
  with pytest.raises(ConfigError, match="refuses these messages: no tools here"):
    chatty.chat([{"role": "tool", "content": "4"}])


def test_no_template(engine, tmp_path):
  with pytest.raises(ConfigError, match="no chat template"):
    load_tokenizer(write_json(tmp_path, engine)).chat(MESSAGES)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("tokenizer.json", b"{", "the tokenizer is malformed"),
    ("tokenizer.json", b"\xff", "tokenizer.json is not UTF-8"),
    ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
    (
      "tokenizer_config.json",
      b"[]",
      "tokenizer_config.json holds a value of type list, expected a JSON object",
    ),
    ("tokenizer_config.json", b'{"bos_token": "a", "bos_token": "b"}', "the key 'bos_token' occurs twice"),
    ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is not a string"),
    (
      "tokenizer_config.json",
      b'{"chat_template": [{"name": "a"}]}',
      "chat_template is not a string, nor a list",
    ),
    ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    (
      "chat_template.jinja",
      b"a" * 1048577,
      "chat_template.jinja has 1,048,577 bytes, more than the 1,048,576",
    ),
    ("config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x'"),
    ("generation_config.json", b"\xff", "generation_config.json is not valid JSON: 'utf-8' codec"),
  ],
)
def test_wrong_files(engine, tmp_path, name, content, message):
  write_json(tmp_path, engine)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(CheckpointError, match=message):
    load_tokenizer(tmp_path)


def test_nothing_there(tmp_path):
  with pytest.raises(CheckpointError, match=r"no tokenizer.json \(and no .gguf file\)"):
    load_tokenizer(tmp_path)


def test_places(engine, tmp_path):
  path = write_gguf(tmp_path / "m.gguf", engine, "smollm")
  expected = engine.encode("hello", add_special_tokens=False).ids
  checkpoint = SafetensorsCheckpoint(as_files(write_json(tmp_path / "json", engine)), {})
  for place in (tmp_path, path, str(path), as_files(path), read_gguf(as_files(path)), checkpoint):
    assert load_tokenizer(place).encode("hello") == expected


def test_missing_packages(engine, tmp_path, monkeypatch):
  write_json(tmp_path, engine)
  remedy = r"pip install .*models-automodel.*\[generate\]"
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match=remedy) as caught:
    load_tokenizer(tmp_path)
  assert isinstance(caught.value, ModelsError)
  monkeypatch.setitem(sys.modules, "jinja2", None)
  with pytest.raises(ImportError, match=remedy):
    render("a new one", {})
