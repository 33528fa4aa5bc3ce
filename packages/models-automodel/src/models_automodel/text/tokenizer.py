"""Text to token ids and back, from a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import models_sources
from models_automodel.errors import source_errors
from models_automodel.text.chat_template import render
from models_automodel.text.gguf_tokenizer import read_gguf_tokenizer
from models_core.errors import CheckpointError, ConfigError
from models_core.extras import require
from models_core.formats import GGUF, Checkpoint, Files, as_files, read_json, strangeness

TOKENIZER = "tokenizer.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
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


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A checkpoint's tokenizer. Its methods have the names by which trainers and samplers call a tokenizer.

  Attributes:
    engine: a `tokenizers.Tokenizer`.
    before: token ids that are put before a text, such as BOS.
    after: token ids that are put after a text, such as EOS.
    chat_template: Jinja source, or None.
    special_tokens: role -> token, such as "bos_token" -> "<s>".
    stop_ids: token ids that end an answer, from generation_config.json, config.json and the tokenizer together.
  """

  engine: Any = dataclasses.field(repr=False)
  before: tuple[int, ...]
  after: tuple[int, ...]
  chat_template: str | None = dataclasses.field(repr=False)
  special_tokens: Mapping[str, str]
  stop_ids: frozenset[int]

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
    return self._id_of("bos_token")

  def eos_id(self) -> int:
    """The id of the `eos_token`. Several ids may end an answer: see `stop_ids`.

    Raises:
      ConfigError: if the checkpoint names no `eos_token`.
    """
    if (found := self._id_of("eos_token")) is None:
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
    return self.eos_id() if (found := self._id_of("pad_token")) is None else found

  @property
  def bos_token(self) -> str | None:
    """The token of `bos_id`."""
    return self.special_tokens.get("bos_token")

  @property
  def eos_token(self) -> str | None:
    """The token of `eos_id`."""
    return self.special_tokens.get("eos_token")

  def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Renders a conversation as the text that the model continues.

    Args:
      messages: each with "role" and "content", as the checkpoint's chat template expects them.
      **variables: of the template, such as `tools` or `enable_thinking`. `add_generation_prompt` is True by
        default: the text ends where the answer begins.

    Raises:
      ConfigError: if the checkpoint has no chat template, or the template refuses the messages.
      MissingExtraError: if jinja2 is not installed.
    """
    if self.chat_template is None:
      raise ConfigError("the checkpoint has no chat template (a base model?): encode plain text instead")
    defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
    return render(self.chat_template, {"messages": messages, **defaults, **self.special_tokens, **variables})

  def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
    """Encodes the text of `render`. Adds no BOS token, because the template adds it if the model needs it."""
    return self._ids(self.render(messages, **variables))

  def apply_chat_template(
    self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = False, **variables: Any
  ) -> str | list[int]:
    """`render` or, with `tokenize`, `chat`, under the name by which trainers call both."""
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

  def _id_of(self, role: str) -> int | None:
    """The id of the special token with this role; None if there is no such token, or the vocabulary lacks it."""
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
  names = frozenset(files.names())
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
  roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
  return Tokenizer(
    engine=engine,
    before=(read.ids["bos"],) if read.add_bos else (),
    after=(read.ids["eos"],) if read.add_eos else (),
    chat_template=read.chat_template,
    special_tokens={name: read.tokens[read.ids[role]] for role, name in roles.items() if role in read.ids},
    stop_ids=frozenset(read.ids[role] for role in ("eos", "eot", "eom") if role in read.ids)
    | _named_ends(engine),
  )


def _from_json(files: Files, names: frozenset[str]) -> Tokenizer:
  engine = _engine(_text(files, TOKENIZER), files.path)
  config = _read_json(files, names, "tokenizer_config.json")
  special = _special_tokens(_read_json(files, names, "special_tokens_map.json") | config)
  before, after = _framing(engine)
  ids = {role: engine.token_to_id(token) for role, token in special.items()}
  framing: dict[str, tuple[int, ...]] = {"bos_token": before, "eos_token": after}
  for role in framing:
    # As in transformers, the configuration overrules the post-processor of tokenizer.json.
    if isinstance(stated := config.get(f"add_{role}"), bool):
      if stated and ids.get(role) is None:
        raise CheckpointError(
          files.path, [f"tokenizer_config.json: add_{role} is true, but there is no {role}"]
        )
      framing[role] = (ids[role],) if stated else ()
  stops = {ids["eos_token"]} if ids.get("eos_token") is not None else set()
  for name in ("generation_config.json", "config.json"):
    stops |= _end_ids(files, name, _read_json(files, names, name))
  return Tokenizer(
    engine=engine,
    before=framing["bos_token"],
    after=framing["eos_token"],
    chat_template=_chat_template(files, names, config),
    special_tokens=special,
    stop_ids=frozenset(stops) | _named_ends(engine),
  )


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


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
  """Role -> token. The files state a token as a string or as an object."""
  found = {}
  for role in _ROLES:
    value = config.get(role)
    token = value.get("content") if isinstance(value, dict) else value
    if isinstance(token, str):
      found[role] = token
  return found


def _chat_template(files: Files, names: frozenset[str], config: Mapping[str, Any]) -> str | None:
  """The template in chat_template.jinja, else that of tokenizer_config.json; of several, the one named "default"."""
  if "chat_template.jinja" in names:
    return _text(files, "chat_template.jinja")
  value = config.get("chat_template")
  if isinstance(value, list):
    value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}.get(
      "default"
    )
  if value is not None and not isinstance(value, str):
    raise CheckpointError(files.path, ["tokenizer_config.json: chat_template is not a string"])
  return value


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
