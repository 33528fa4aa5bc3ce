"""The tokenizer of a GGUF file as the files of a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from models_automodel.text.chat_template import DEFAULT
from models_automodel.text.gguf_tokenizer import MODEL, GgufTokenizer, read_gguf_tokenizer
from models_core.errors import CheckpointError
from models_core.formats import GGUF, SAFETENSORS, Checkpoint, Files

_log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_ENDS = ("eos", "eot", "eom")
# A template's name becomes that of a file.
_NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class FilesAndTexts:
  """Files, and texts that are read as if they were among them.

  Attributes:
    files: the files.
    texts: name -> content.
  """

  files: Files
  texts: Mapping[str, bytes]

  @property
  def path(self) -> str:
    """The path of the files."""
    return self.files.path

  def names(self) -> Sequence[str]:
    """Names of the files and the texts."""
    return sorted({*self.files.names(), *self.texts})

  def size(self, name: str) -> int:
    """Bytes of a file or text."""
    return len(self.texts[name]) if name in self.texts else self.files.size(name)

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file or text."""
    return self.texts[name][start:stop] if name in self.texts else self.files.read(name, start, stop)

  def fetch(self, names: Sequence[str]) -> str:
    """Makes the named files local; texts have no place."""
    return self.files.fetch([name for name in names if name not in self.texts])


def with_tokenizer(files: Files, checkpoint: Checkpoint | None = None) -> Files:
  """The files of a checkpoint and, if it is a GGUF file without tokenizer.json, the tokenizer that it holds.

  A tokenizer that is not implemented is left out, and the log says why.

  Args:
    files: the checkpoint's files.
    checkpoint: the checkpoint, if it is known already.
  """
  if TOKENIZER in (names := files.names()):
    return files
  try:
    if checkpoint is None and GGUF.is_in(files) and not SAFETENSORS.is_in(files):
      checkpoint = GGUF.read(files)
    if checkpoint is None or checkpoint.format is not GGUF or MODEL not in checkpoint.metadata:
      return files
    read = read_gguf_tokenizer(checkpoint.metadata, files.path)
  except CheckpointError as error:
    _log.warning("the tokenizer is left out: %s", error)
    return files
  return FilesAndTexts(files, {name: text for name, text in _texts(read).items() if name not in names})


def _texts(read: GgufTokenizer) -> dict[str, bytes]:
  found: dict[str, Any] = {
    TOKENIZER: json.loads(read.json) | {"post_processor": _post_processor(read)},
    "tokenizer_config.json": {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      "add_bos_token": read.add_bos,
      "add_eos_token": read.add_eos,
      **{name: read.tokens[read.ids[role]] for role, name in ROLES.items() if role in read.ids},
    },
  }
  ends = sorted({read.ids[role] for role in _ENDS if role in read.ids})
  numbers = {
    "bos_token_id": read.ids.get("bos"),
    "eos_token_id": ends,
    "pad_token_id": read.ids.get("padding"),
  }
  if stated := {name: value for name, value in numbers.items() if value not in (None, [])}:
    found["generation_config.json"] = stated
  texts = {
    name: json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n" for name, value in found.items()
  }
  for name, template in read.chat_templates.items():
    if name == DEFAULT:
      texts["chat_template.jinja"] = template.source.encode()
    elif _NAME.fullmatch(name):
      texts[f"additional_chat_templates/{name}.jinja"] = template.source.encode()
    else:
      _log.warning("the chat template %s is left out: its name is no file name", template.origin)
  return texts


def _post_processor(read: GgufTokenizer) -> dict[str, Any]:
  """The entry of tokenizer.json that puts BOS before a text and EOS after it."""
  before = [read.ids["bos"]] if read.add_bos else []
  after = [read.ids["eos"]] if read.add_eos else []

  def framed(letter: str, kind: int) -> list[dict[str, Any]]:
    parts = [("SpecialToken", read.tokens[i]) for i in before] + [("Sequence", letter)]
    parts += [("SpecialToken", read.tokens[i]) for i in after]
    return [{part: {"id": name, "type_id": kind}} for part, name in parts]

  special = {
    read.tokens[i]: {"id": read.tokens[i], "ids": [i], "tokens": [read.tokens[i]]} for i in [*before, *after]
  }
  return {
    "type": "TemplateProcessing",
    "single": framed("A", 0),
    "pair": framed("A", 0) + framed("B", 1),
    "special_tokens": special,
  }
