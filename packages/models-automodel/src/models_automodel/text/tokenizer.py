"""Text to token ids and back, from a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import models_sources
from models_automodel.errors import source_errors
from models_automodel.text.chat_template import (
  DEFAULT,
  ChatTemplate,
  choose,
  plain_messages,
  render,
  render_unfinished,
)
from models_automodel.text.gguf_files import ROLES, TOKENIZER
from models_automodel.text.gguf_tokenizer import read_gguf_tokenizer
from models_automodel.text.special_tokens import framing, read_special_tokens, tokenizer_class
from models_automodel.text.template_files import TEMPLATES, read_templates
from models_core.errors import CheckpointError, ConfigError
from models_core.extras import require
from models_core.formats import GGUF, Checkpoint, Files, as_files, names_in, read_json, strangeness

_log = logging.getLogger(__name__)

# Special tokens that end a turn or a text, even if the configuration does not list them.
_ENDS = frozenset(
  (
    "<end_of_turn>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
  )
)
_INCOMPLETE = "\ufffd"
# Arguments of transformers' apply_chat_template that ask for something else than a text or a list of ids.
_NOT_IMPLEMENTED = (
  "padding",
  "truncation",
  "max_length",
  "return_tensors",
  "return_dict",
  "return_assistant_tokens_mask",
  "sanitize_control_tokens",
  "tokenizer_kwargs",
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A checkpoint's tokenizer. Its methods have the names by which trainers and samplers call a tokenizer.

  Attributes:
    engine: a `tokenizers.Tokenizer`.
    before: token ids that are put before a text, such as BOS.
    after: token ids that are put after a text, such as EOS.
    chat_templates: the chat templates, by name. Most checkpoints have one, "default".
    special_tokens: role -> token, such as "bos_token" -> "<s>", and names of the tokenizer's own, such as "image_token".
    stop_ids: token ids that end an answer, from generation_config.json, config.json and the tokenizer together.
    additional_special_tokens: special tokens without a name.
  """

  engine: Any = dataclasses.field(repr=False)
  before: tuple[int, ...]
  after: tuple[int, ...]
  chat_templates: Mapping[str, ChatTemplate]
  special_tokens: Mapping[str, str]
  stop_ids: frozenset[int]
  additional_special_tokens: tuple[str, ...] = ()

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Encodes a text.

    Args:
      text: the text. Special tokens in it become their ids.
      add_special_tokens: whether `before` and `after` are added; `before` is not if the ids already begin with it.
    """
    ids = self._ids(text)
    if not add_special_tokens:
      return ids
    before = () if self.before and tuple(ids[: len(self.before)]) == self.before else self.before
    return [*before, *ids, *self.after]

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Decodes token ids. Bytes that are not UTF-8 become U+FFFD."""
    return self.engine.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def bos_id(self) -> int | None:
    """The id of the `bos_token`; None if the checkpoint names none."""
    return self.token_id("bos_token")

  def eos_id(self) -> int:
    """The id of the `eos_token`. Several ids may end an answer: see `stop_ids`.

    Raises:
      ConfigError: if the checkpoint names no `eos_token`.
    """
    if (found := self.token_id("eos_token")) is None:
      raise ConfigError(
        "the checkpoint names no eos_token: add it to tokenizer_config.json, or take one of "
        f"stop_ids={sorted(self.stop_ids)}"
      )
    return found

  def pad_id(self) -> int:
    """The id of the `pad_token`; if the checkpoint names none, that of the `eos_token`, as trainers take it.

    Raises:
      ConfigError: if the checkpoint names neither.
    """
    return self.eos_id() if (found := self.token_id("pad_token")) is None else found

  @property
  def bos_token(self) -> str | None:
    """The token of `bos_id`."""
    return self.special_tokens.get("bos_token")

  @property
  def eos_token(self) -> str | None:
    """The token of `eos_id`."""
    return self.special_tokens.get("eos_token")

  @property
  def chat_template(self) -> str | None:
    """Jinja source of the template "default"; None if there is none."""
    return self.chat_templates[DEFAULT].source if DEFAULT in self.chat_templates else None

  def render(
    self,
    messages: Sequence[Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **variables: Any,
  ) -> str:
    """Renders a conversation as the text that the model continues.

    Args:
      messages: each with "role" and "content", as the checkpoint's chat template expects them.
      tools: JSON schemas of tools. With them, the template "tool_use" is taken where there is one.
      documents: each with "title" and "text".
      chat_template: name of the template to take, or Jinja source of another.
      add_generation_prompt: whether the text ends where the answer begins. None is True, unless the last message is
        continued.
      continue_final_message: whether the text ends with that of the last message, which the model goes on with; a name,
        such as "reasoning_content", says in which field of the message.
      **variables: of the template, such as `enable_thinking`.

    Raises:
      ConfigError: if the checkpoint has no chat template, or the template fails, exceeds a bound on time or memory, or
        refuses the messages.
      MissingExtraError: if jinja2 is not installed.
    """
    template = choose(self.chat_templates, chat_template, tools=tools)
    if continue_final_message and add_generation_prompt:
      raise ConfigError("continue_final_message and add_generation_prompt contradict each other: choose one")
    for name, given in (("tools", tools), ("documents", documents)):
      for i, item in enumerate(given or ()):
        if not isinstance(item, Mapping):
          raise ConfigError(
            f"{name}[{i}] is a {type(item).__name__}, expected a dict"
            + (": of a function pass the JSON schema" if name == "tools" else "")
          )
    prompt = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    found = {"tools": tools, "documents": documents, "add_generation_prompt": prompt}
    special: dict[str, Any] = dict(self.special_tokens)
    if self.additional_special_tokens:
      special["additional_special_tokens"] = list(self.additional_special_tokens)
    found |= special | variables
    plain = plain_messages(messages)
    if continue_final_message:
      field = "content" if continue_final_message is True else continue_final_message
      return render_unfinished(template, found, plain, field)
    return render(template.source, found | {"messages": plain}, origin=template.origin)

  def chat(self, messages: Sequence[Any], **variables: Any) -> list[int]:
    """Encodes the text of `render`. Adds no BOS token, because the template adds it if the model needs it."""
    return self._ids(self.render(messages, **variables))

  def apply_chat_template(
    self, messages: Sequence[Any], *, tokenize: bool = False, **variables: Any
  ) -> str | list[int]:
    """`render` or, with `tokenize`, `chat`, under the name by which trainers call both.

    Raises:
      ConfigError: as `render`, or for an argument of transformers that asks for something else.
    """
    for name in _NOT_IMPLEMENTED:
      if variables.pop(name, None):
        raise ConfigError(
          f"apply_chat_template({name}=...) is not implemented: it gives a text or a list of ids"
        )
    return self.chat(messages, **variables) if tokenize else self.render(messages, **variables)

  def stream(self, ids: Iterable[int]) -> Iterator[str]:
    """Decodes token ids as they arrive. No yielded text ends in the middle of a character.

    The texts together equal `decode` of all ids; a character that is incomplete at the end is yielded as U+FFFD.
    """
    window: list[int] = []
    # Tokens of the window whose text is out. They stay for one more text, since a first token loses its leading space.
    done = 0
    before = after = ""
    for token in ids:
      window.append(token)
      after = self.decode(window)
      if len(after) > len(before) and not after.endswith(_INCOMPLETE):
        yield after[len(before) :]
        window, done = window[done:], len(window) - done
        before = after = self.decode(window)
    if len(after) > len(before):
      yield after[len(before) :]

  def token_id(self, role: str) -> int | None:
    """The id of the special token with a role, such as "unk_token".

    It is None if there is no such token, or the vocabulary lacks it.
    """
    return None if (token := self.special_tokens.get(role)) is None else self.engine.token_to_id(token)

  def _ids(self, text: str) -> list[int]:
    return self.engine.encode(text, add_special_tokens=False).ids


def load_tokenizer(place: str | os.PathLike | Files | Checkpoint) -> Tokenizer:
  """Loads the tokenizer of a checkpoint.

  Args:
    place: a directory with `tokenizer.json` or one GGUF checkpoint, a .gguf file, the address of either in an object
      store, or an opened checkpoint.

  Raises:
    CheckpointError: if there is no tokenizer, or it is malformed.
    MissingExtraError: if the package tokenizers is not installed.
    SourceFilesError: if an object store cannot provide the files.
  """
  if isinstance(place, str) and (source := models_sources.source_of_address(place)) is not None:
    with source_errors():
      return load_tokenizer(models_sources.get_source(source).open_files(place))
  if isinstance(place, Checkpoint):
    if place.format is GGUF:
      return _from_gguf(place)
    place = place.files
  files = as_files(place)
  names = frozenset(files.names()) | frozenset(names_in(files, TEMPLATES))
  if TOKENIZER in names:
    return _from_json(files, names)
  if GGUF.is_in(files):
    return _from_gguf(GGUF.read(files))
  raise CheckpointError(
    files.path,
    [
      f"there is no {TOKENIZER} (and no .gguf file): save it with transformers' AutoTokenizer.save_pretrained"
    ],
  )


def _from_gguf(checkpoint: Checkpoint) -> Tokenizer:
  where = checkpoint.files.path
  read = read_gguf_tokenizer(checkpoint.metadata, where)
  engine = _engine(read.json, where)
  return Tokenizer(
    engine=engine,
    before=(read.ids["bos"],) if read.add_bos else (),
    after=(read.ids["eos"],) if read.add_eos else (),
    chat_templates=read.chat_templates,
    special_tokens={name: read.tokens[read.ids[role]] for role, name in ROLES.items() if role in read.ids},
    stop_ids=frozenset(read.ids[role] for role in ("eos", "eot", "eom") if role in read.ids)
    | _named_ends(engine),
  )


def _from_json(files: Files, names: frozenset[str]) -> Tokenizer:
  engine = _engine(_text(files, TOKENIZER), files.path)
  config = _read_json(files, names, "tokenizer_config.json")
  model = _read_json(files, names, "config.json")
  kind = tokenizer_class(config, model)
  named, unnamed, stated = read_special_tokens(config, _read_json(files, names, "special_tokens_map.json"))
  vocabulary = {role: token for role, token in kind.roles.items() if engine.token_to_id(token) is not None}
  special = {role: token for role, token in vocabulary.items() if role not in stated} | named
  _make_special(engine, [*special.values(), *unnamed])
  ids = {role: engine.token_to_id(token) for role, token in special.items()}
  before, after = _framing(engine)
  try:
    frames, notes = framing(kind, config, {"bos_token": before, "eos_token": after}, ids.get)
  except LookupError as error:
    raise CheckpointError(files.path, [str(error)]) from None
  for note in notes:
    _log.warning("%s: %s", files.path, note)
  stops = {ids["eos_token"]} if ids.get("eos_token") is not None else set()
  stops |= _end_ids(files, "config.json", model)
  stops |= _end_ids(files, "generation_config.json", _read_json(files, names, "generation_config.json"))
  processor = _read_json(files, names, "chat_template.json")
  return Tokenizer(
    engine=engine,
    before=frames["bos_token"],
    after=frames["eos_token"],
    chat_templates=read_templates(files, names, config, processor),
    special_tokens=special,
    stop_ids=frozenset(stops) | _named_ends(engine),
    additional_special_tokens=tuple(unnamed),
  )


def _make_special(engine: Any, tokens: Sequence[str]) -> None:
  """Makes tokens of the vocabulary special, as transformers does when it loads them."""
  added = {token.content for token in engine.get_added_tokens_decoder().values()}
  engine.add_special_tokens([t for t in tokens if t not in added and engine.token_to_id(t) is not None])


def _engine(source: str, where: str) -> Any:
  tokenizers = require("tokenizers", "models-automodel[generate]", "A tokenizer")
  try:
    engine = tokenizers.Tokenizer.from_str(source)
  except Exception as error:  # the library raises nothing more specific
    raise CheckpointError(where, [f"the tokenizer is malformed: {error}"]) from error
  # A file may hold padding and truncation settings from training.
  engine.no_padding()
  engine.no_truncation()
  return engine


def _framing(engine: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids that the post-processor puts before and after a text."""
  plain, full = (engine.encode("a", add_special_tokens=special).ids for special in (False, True))
  start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), len(full))
  return tuple(full[:start]), tuple(full[start + len(plain) :])


def _named_ends(engine: Any) -> frozenset[int]:
  added = engine.get_added_tokens_decoder()
  return frozenset(i for i, token in added.items() if token.special and token.content in _ENDS)


def _end_ids(files: Files, name: str, config: Mapping[str, Any]) -> set[int]:
  """The ids in eos_token_id of a configuration, which may be missing, a number or a list."""
  value = config.get("eos_token_id")
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise CheckpointError(
      files.path, [f"{name}: eos_token_id is {value!r}, expected a token id or a list of them"]
    )
  return set(ids)


def _text(files: Files, name: str) -> str:
  data = files.read(name, 0, files.size(name))
  if what := strangeness(data):
    raise CheckpointError(files.path, [f"{name} {what}"])
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise CheckpointError(files.path, [f"{name} is not UTF-8: {error}"]) from error


def _read_json(files: Files, names: frozenset[str], name: str) -> dict[str, Any]:
  """Reads a JSON object; empty if there is no such file."""
  if name not in names:
    return {}
  try:
    return read_json(files, name)
  except ConfigError as error:
    raise CheckpointError(files.path, [str(error)]) from None
