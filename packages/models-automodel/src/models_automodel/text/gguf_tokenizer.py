"""Rebuilds the tokenizer.json from the metadata of a GGUF file."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from models_automodel.text.chat_template import DEFAULT, ChatTemplate
from models_core.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
MODEL = f"{_PREFIX}model"
_TEMPLATE = "tokenizer.chat_template"
# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
  split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
  return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


def _words(digits: str) -> str:
  """The pattern of tiktoken's cl100k, with another pattern for digits, such as `\\p{N}{1,3}`."""
  return (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )


@dataclasses.dataclass(frozen=True)
class _Pre:
  """How a byte-level BPE splits a text into words.

  Attributes:
    pre_tokenizer: the entry of tokenizer.json.
    normalizer: the entry of tokenizer.json.
    ignore_merges: whether a word that is a token itself is not split further by the merges.
    add_bos: whether a text begins with the BOS token, if the file does not state it.
  """

  pre_tokenizer: Mapping[str, Any]
  normalizer: Mapping[str, Any] | None = None
  ignore_merges: bool = False
  add_bos: bool = False


_DEFAULT = _Pre(_GPT2)
_DIGITS = _Pre({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]})
_LLAMA3 = _Pre(_split(_words(r"\p{N}{1,3}")), ignore_merges=True, add_bos=True)
_QWEN2 = _Pre(_split(_words(r"\p{N}")), normalizer={"type": "NFC"})
# Value of tokenizer.ggml.pre -> how to split.
_PRES = {
  "default": _DEFAULT,
  "gpt-2": _DEFAULT,
  "smollm": _DIGITS,
  "starcoder": _DIGITS,
  "refact": _DIGITS,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "llama-bpe": _LLAMA3,
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,
}


@dataclasses.dataclass(frozen=True)
class GgufTokenizer:
  """The tokenizer that a GGUF file describes.

  Attributes:
    json: content of a tokenizer.json, without a post-processor.
    tokens: all tokens, in the order of their ids.
    ids: role -> token id, for those of "bos", "eos", "eot", "eom", "unknown" and "padding" that the file states.
    add_bos: whether a text begins with the token "bos".
    add_eos: whether a text ends with the token "eos".
    chat_templates: the chat templates, by name.
  """

  json: str
  tokens: Sequence[str]
  ids: Mapping[str, int]
  add_bos: bool
  add_eos: bool
  chat_templates: Mapping[str, ChatTemplate]


def read_gguf_tokenizer(metadata: Mapping[str, object], where: str) -> GgufTokenizer:
  """Builds the tokenizer that the metadata of a GGUF file describes.

  Args:
    metadata: of a checkpoint that `models_core.formats.read_gguf` read.
    where: path of the file, for messages.

  Raises:
    CheckpointError: if a key is missing or malformed, or has a value that is not implemented.
  """
  keys = _Keys(metadata, where)
  tokens = keys.texts("tokens")
  if len(set(tokens)) != len(tokens):
    ((token, count),) = collections.Counter(tokens).most_common(1)
    keys.fail(f"{_PREFIX}tokens holds {token!r} {count} times")
  types = keys.numbers("token_type", len(tokens))
  ids = {
    role: keys.token_id(role, len(tokens)) for role in ("bos", "eos", "eot", "eom", "unknown", "padding")
  }
  known = {role: i for role, i in ids.items() if i is not None}
  kind = keys.choice("model", {"gpt2": _byte_level, "llama": _sentence_pieces})
  spec, add_bos = kind(keys, tokens, types, known)
  full = {"version": "1.0", "added_tokens": _added(tokens, types), **spec}
  return GgufTokenizer(
    json=json.dumps(full, ensure_ascii=False),
    tokens=tokens,
    ids=known,
    add_bos="bos" in known and keys.flag("add_bos_token", add_bos),
    add_eos="eos" in known and keys.flag("add_eos_token", False),
    chat_templates=_templates(keys),
  )


def _templates(keys: _Keys) -> dict[str, ChatTemplate]:
  """The default template, and others under keys that end with their names."""
  names = {_TEMPLATE: DEFAULT} | {
    key: key.removeprefix(f"{_TEMPLATE}.") for key in keys.metadata if key.startswith(f"{_TEMPLATE}.")
  }
  found = {name: (keys.text(key), key) for key, name in names.items()}
  return {name: ChatTemplate(text, key) for name, (text, key) in found.items() if text is not None}


def _byte_level(
  keys: _Keys, tokens: Sequence[str], types: np.ndarray, ids: Mapping[str, int]
) -> tuple[dict[str, Any], bool]:
  """Byte-level BPE with merges: entries of tokenizer.json, and the default of add_bos."""
  pre = keys.choice("pre", _PRES)
  vocabulary = {token: i for i, token in enumerate(tokens)}
  merges = []
  for merge in keys.texts("merges"):
    # The first part of a merge may itself begin with a space.
    cut = merge.find(" ", 1)
    left, right = merge[:cut], merge[cut + 1 :]
    if cut < 0 or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
      keys.fail(f"{_PREFIX}merges holds {merge!r}, but its parts or their concatenation are not tokens")
    merges.append((left, right))
  spec = {
    "normalizer": pre.normalizer,
    "pre_tokenizer": pre.pre_tokenizer,
    "decoder": _BYTES,
    "model": {"type": "BPE", "ignore_merges": pre.ignore_merges, "vocab": vocabulary, "merges": merges},
  }
  return spec, pre.add_bos


def _sentence_pieces(
  keys: _Keys, tokens: Sequence[str], types: np.ndarray, ids: Mapping[str, int]
) -> tuple[dict[str, Any], bool]:
  """SentencePiece's BPE: of all neighbours that form a token, the pair with the highest score merges first."""
  scores = keys.numbers("scores", len(tokens))
  vocabulary = {token: i for i, token in enumerate(tokens)}
  decoders = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
  ]
  normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
  if keys.flag("add_space_prefix", True):
    if any(_SPACE in tokens[i] for i in np.flatnonzero(types == _USER_DEFINED).tolist()):
      keys.fail(
        f"{_PREFIX}add_space_prefix together with user-defined tokens that hold spaces is not implemented"
      )
    normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
    decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  spec = {
    "normalizer": {"type": "Sequence", "normalizers": normalizers},
    "pre_tokenizer": None,
    "decoder": {"type": "Sequence", "decoders": decoders},
    "model": {
      "type": "BPE",
      "unk_token": tokens[ids["unknown"]] if "unknown" in ids else None,
      "fuse_unk": True,
      "byte_fallback": True,
      "vocab": vocabulary,
      "merges": _merges_by_score(tokens, scores, types),
    },
  }
  return spec, True


def _merges_by_score(tokens: Sequence[str], scores: np.ndarray, types: np.ndarray) -> list[tuple[str, str]]:
  """All pairs of normal tokens that form a third normal token; the highest score first."""
  normal = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
  found = []
  for token, i in normal.items():
    for cut in range(1, len(token)):
      left, right = normal.get(token[:cut]), normal.get(token[cut:])
      if left is not None and right is not None:
        found.append((-scores[i], -cut, left, right))
  return [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]


def _added(tokens: Sequence[str], types: np.ndarray) -> list[dict[str, Any]]:
  """Entries for tokens that are recognised before a text is split into words."""
  return [
    {
      "id": i,
      "content": tokens[i],
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      # SentencePiece's space characters appear only after normalisation.
      "normalized": _SPACE in tokens[i],
      "special": bool(types[i] != _USER_DEFINED),
    }
    for i in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
    if tokens[i]
  ]


class _Keys:
  """Reads keys of the metadata and checks their types."""

  def __init__(self, metadata: Mapping[str, object], where: str):
    self.metadata, self.where = metadata, where

  def fail(self, problem: str) -> NoReturn:
    raise CheckpointError(self.where, [problem])

  def choice(self, name: str, known: Mapping[str, Any]) -> Any:
    value = self.metadata.get(_PREFIX + name)
    if isinstance(value, str) and value in known:
      return known[value]
    return self.fail(f"{_PREFIX}{name} is {value!r}; implemented are {', '.join(known)}")

  def texts(self, name: str) -> tuple[str, ...]:
    value = self.metadata.get(_PREFIX + name)
    if not isinstance(value, tuple):
      self.fail(f"{_PREFIX}{name} is {'missing' if value is None else 'not a list of strings'}")
    return value

  def numbers(self, name: str, count: int) -> np.ndarray:
    value = self.metadata.get(_PREFIX + name)
    if not isinstance(value, np.ndarray) or value.shape != (count,):
      self.fail(f"{_PREFIX}{name} is {'missing' if value is None else f'not a list of {count} numbers'}")
    return value

  def token_id(self, role: str, count: int) -> int | None:
    value = self.metadata.get(f"{_PREFIX}{role}_token_id")
    if value is not None and not (isinstance(value, int) and 0 <= value < count):
      self.fail(f"{_PREFIX}{role}_token_id is {value!r}, expected a token id below {count}")
    return value

  def flag(self, name: str, default: bool) -> bool:
    value = self.metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
      self.fail(f"{_PREFIX}{name} is {value!r}, expected true or false")
    return value

  def text(self, name: str) -> str | None:
    value = self.metadata.get(name)
    if value is not None and not isinstance(value, str):
      self.fail(f"{name} is not a string")
    return value
