"""The special tokens of a Hugging Face tokenizer, and which of them frame a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
  """What a tokenizer class of transformers adds to its files.

  Attributes:
    name: as the files state it; in `_CLASSES` without "Fast".
    roles: role -> token, for roles that tokenizer_config.json does not name.
    frames: defaults of add_bos_token and add_eos_token, if these overrule the post-processor of tokenizer.json; None if
      the post-processor alone decides.
  """

  name: str
  roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
  frames: Mapping[str, bool] | None = None


_BOS = {"bos_token": True, "eos_token": False}
_NONE = {"bos_token": False, "eos_token": False}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
_COHERE = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"}
_END = "<|endoftext|>"
_CLASSES = {
  known.name: known
  for known in (
    TokenizerClass("LlamaTokenizer", _LLAMA, _BOS),
    TokenizerClass("CodeLlamaTokenizer", _LLAMA, _BOS),
    TokenizerClass("GemmaTokenizer", _GEMMA, _BOS),
    TokenizerClass("CohereTokenizer", _COHERE, _BOS),
    TokenizerClass("GPTNeoXTokenizer", {"bos_token": _END, "eos_token": _END, "unk_token": _END}, _NONE),
    TokenizerClass("GPT2Tokenizer", {"bos_token": _END, "eos_token": _END, "unk_token": _END}),
    TokenizerClass("Qwen2Tokenizer", {"eos_token": _END, "unk_token": _END, "pad_token": _END}),
  )
}
# model_type of config.json -> the class, if no file names one.
_BY_MODEL = {
  "llama": "LlamaTokenizer",
  "mistral": "LlamaTokenizer",
  "gemma": "GemmaTokenizer",
  "gemma2": "GemmaTokenizer",
  "gemma3": "GemmaTokenizer",
  "gemma3_text": "GemmaTokenizer",
  "qwen2": "Qwen2Tokenizer",
  "qwen2_moe": "Qwen2Tokenizer",
  "qwen3": "Qwen2Tokenizer",
  "qwen3_moe": "Qwen2Tokenizer",
}
# Without a class, a statement counts.
_UNNAMED = TokenizerClass("", frames={})


def tokenizer_class(tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> TokenizerClass:
  """The class that the files name, or that belongs to the model.

  Args:
    tokenizer_config: content of tokenizer_config.json.
    config: content of config.json.
  """
  named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
  if not isinstance(named, str):
    named = _BY_MODEL.get(str(config.get("model_type")))
  if named is None:
    return _UNNAMED
  known = _CLASSES.get(named.removesuffix("Fast"))
  return TokenizerClass(named) if known is None else dataclasses.replace(known, name=named)


def read_special_tokens(
  tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> tuple[dict[str, str], list[str], frozenset[str]]:
  """Reads the special tokens that the files state, as strings or as objects.

  Args:
    tokenizer_config: content of tokenizer_config.json.
    special_tokens_map: content of special_tokens_map.json. As in transformers, it counts only if tokenizer_config.json
      holds no added_tokens_decoder, and then more.

  Returns:
    Name -> token for the roles and for names of the tokenizer's own, such as "image_token"; the tokens without names;
    the names that are stated, null included.
  """
  legacy = {} if "added_tokens_decoder" in tokenizer_config else special_tokens_map
  stated = {**tokenizer_config, **legacy}
  own = stated.get("extra_special_tokens")
  named = {name: value for name, value in stated.items() if name in ROLES or name.endswith("_token")}
  found = {name: token for name, value in named.items() if (token := _content(value))}
  if isinstance(own, Mapping):
    found |= {name: token for name, value in own.items() if (token := _content(value))}
  lists = [value for value in (stated.get("additional_special_tokens"), own) if isinstance(value, list)]
  unnamed = list(dict.fromkeys(token for value in lists for item in value if (token := _content(item))))
  return found, unnamed, frozenset(named)


def _content(value: Any) -> str | None:
  token = value.get("content") if isinstance(value, Mapping) else value
  return token if isinstance(token, str) else None


def framing(
  kind: TokenizerClass,
  tokenizer_config: Mapping[str, Any],
  processed: Mapping[str, tuple[int, ...]],
  token_id: Callable[[str], int | None],
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
  """The ids before ("bos_token") and after ("eos_token") a text, and what is to be noted about them.

  Args:
    kind: the tokenizer's class.
    tokenizer_config: content of tokenizer_config.json.
    processed: what the post-processor of tokenizer.json adds.
    token_id: role -> id, or None.

  Raises:
    LookupError: if a role is to be added that has no token; the message says which.
  """
  found, notes = dict(processed), []
  for role, ids in processed.items():
    stated = tokenizer_config.get(f"add_{role}")
    stated = stated if isinstance(stated, bool) else None
    place = "before" if role == "bos_token" else "after"
    if kind.frames is None:
      if stated is not None and stated != bool(ids):
        notes.append(
          f"tokenizer_config.json: add_{role} is {str(stated).lower()}, but {kind.name} goes by the post-processor of "
          f"tokenizer.json, which puts {'a token' if ids else 'nothing'} {place} a text"
        )
      continue
    added = kind.frames.get(role) if stated is None else stated
    token = token_id(role)
    if stated and token is None:
      raise LookupError(f"tokenizer_config.json: add_{role} is true, but there is no {role}")
    if added is None or (added and token is None):
      continue
    found[role] = (token,) if added and token is not None else ()
    if kind.name and bool(found[role]) != bool(ids):
      notes.append(
        f"{kind.name} puts {'its ' + role if added else 'nothing'} {place} a text, as in transformers 4; the "
        f"post-processor of tokenizer.json, by which transformers 5 goes, puts {'a token' if ids else 'nothing'} there"
      )
  return found, notes
