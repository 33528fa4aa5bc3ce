"""Texts that end an answer. An answer's text comes in pieces, and a stop string may lie across them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from models_automodel.text.tokenizer import Tokenizer
from models_core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class StopTexts:
  """What ends an answer besides the checkpoint's own ends.

  Attributes:
    texts: stop strings; neither they nor what follows is part of the answer.
    ids: of special tokens that were given as stop strings.
  """

  texts: tuple[str, ...]
  ids: frozenset[int]


def stop_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> StopTexts:
  """Checks stop strings, which needs no model.

  Raises:
    ConfigError: if one can appear in no answer: it is empty, holds a special token and more, or characters that the
      tokenizer has no tokens for.
  """
  if isinstance(texts, str):
    texts = (texts,)
  special = {t.content: i for i, t in tokenizer.engine.get_added_tokens_decoder().items() if t.special}
  unknown = tokenizer.token_id("unk_token")
  for text in texts:
    if not text:
      raise ConfigError("a stop string is empty, and would end every answer at once: leave it out")
    if text in special:
      continue
    if inside := next((token for token in special if token in text), None):
      raise ConfigError(
        f"the stop string {text!r} can appear in no answer, because the special token {inside} is no part of its text: "
        f"stop at {inside} alone, or at the text around it"
      )
    if unknown is not None and unknown in tokenizer.encode(text, add_special_tokens=False):
      raise ConfigError(
        f"the stop string {text!r} can appear in no answer: it holds characters that the tokenizer has no tokens for"
      )
  return StopTexts(
    tuple(text for text in texts if text not in special),
    frozenset(special[text] for text in texts if text in special),
  )


def first_stop(text: str, stops: Sequence[str]) -> int | None:
  """Where the first of the stop strings begins in a text, or None."""
  return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
  """The text before the first stop string, in pieces. What may be the beginning of one is held back."""
  held = ""
  for piece in pieces:
    held += piece
    if (end := first_stop(held, stops)) is not None:
      held = held[:end]
      break
    kept = max((_overlap(held, stop) for stop in stops), default=0)
    if len(held) > kept:
      yield held[: len(held) - kept]
      held = held[len(held) - kept :]
  if held:
    yield held


def _overlap(text: str, stop: str) -> int:
  """How many characters at the end of a text may begin a stop string."""
  return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
