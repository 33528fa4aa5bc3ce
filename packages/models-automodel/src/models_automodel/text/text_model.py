"""A model and its tokenizer: from texts and conversations to texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from models_automodel.text.generation_config import read_context, read_sampling
from models_automodel.text.stop_strings import StopTexts, first_stop, stop_texts, until
from models_automodel.text.tokenizer import Tokenizer, load_tokenizer
from models_core.errors import ConfigError
from models_core.formats import Checkpoint
from models_core.generation import (
  GREEDY,
  Sampling,
  Scored,
  Session,
  Stop,
  Stream,
  check_prompts,
  score,
  stream,
)
from models_core.loading import LoadPlan

# New tokens of an answer for which no limit is given, at most.
_NEW_TOKENS = 256
# What other libraries take beside the prompt.
_OF_SAMPLING = frozenset(field.name for field in dataclasses.fields(Sampling))
# A text, a conversation, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TextSettings:
  """What a checkpoint says about texts. It is read before any weights, so that a wrong prompt costs nothing.

  Attributes:
    tokenizer: of the checkpoint.
    context: how many tokens of a row the model was made for; None if the checkpoint does not say it.
    sampling: how the checkpoint's generation_config.json wants tokens to be chosen.
  """

  tokenizer: Tokenizer
  context: int | None = None
  sampling: Sampling = GREEDY

  @classmethod
  def read(cls, checkpoint: Checkpoint) -> TextSettings:
    """Reads them from the files of a checkpoint.

    Raises:
      CheckpointError: if there is no tokenizer, or a file is malformed.
      MissingExtraError: if the package tokenizers is not installed.
    """
    return cls(load_tokenizer(checkpoint), read_context(checkpoint), read_sampling(checkpoint.files))

  def encode(self, prompt: Prompt, **variables: Any) -> list[int]:
    """Encodes a prompt.

    Args:
      prompt: a text to continue, or the messages of a conversation to answer, each with "role" and "content"; token ids
        stay as they are.
      **variables: of the chat template, such as `tools`; as `Tokenizer.render` takes them.

    Raises:
      ConfigError: if the prompt is empty, or its template fails; if variables come with a text, or belong to the sampling.
    """
    if len(prompt) == 0:
      raise ConfigError("the prompt is empty: give a text to continue, or at least one message to answer")
    if misplaced := sorted(variables.keys() & _OF_SAMPLING):
      fields = ", ".join(f"{name}=..." for name in misplaced)
      raise ConfigError(f"{', '.join(misplaced)}: a part of the sampling: give sampling=Sampling({fields})")
    plain = isinstance(prompt, str) or not isinstance(prompt[0], Mapping)
    if plain and variables:
      raise ConfigError(
        f"{', '.join(variables)}: variables of a chat template, but the prompt is no conversation: give messages"
      )
    if isinstance(prompt, str):
      return self.tokenizer.encode(prompt)
    return (
      [int(i) for i in cast(Sequence[int], prompt)] if plain else self.tokenizer.chat(prompt, **variables)
    )

  def planned(
    self,
    plan: LoadPlan,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    in_session: bool = False,
    **variables: Any,
  ) -> Stream:
    """What `TextModel.stream` with the same arguments runs, for the model that a plan loads: to compile it.

    Args:
      plan: of the model.
      prompt: of the call, as all arguments that are not named here.
      in_session: whether the call is the first of a session.

    Raises:
      ConfigError: as `TextModel.stream`.
    """
    ids = self.encode(prompt, **variables)
    limit, stops = self.check([ids], max_new_tokens, stop)
    shapes = plan.shapes()
    session = Session(shapes) if in_session else None
    return self.run(shapes, [ids], limit, stops, sampling, session=session)

  def run(
    self,
    model: Any,
    ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: StopTexts,
    sampling: Sampling | None,
    seed: int = 0,
    **options: Any,
  ) -> Stream:
    """The stream of a model's new tokens for encoded prompts. Takes other options of `models_core.generation.stream`."""
    return stream(
      model,
      ids,
      max_new_tokens=max_new_tokens,
      sampling=self.sampling if sampling is None else sampling,
      stop=Stop(ids=self.tokenizer.stop_ids | stops.ids),
      seeds=seed,
      **options,
    )

  def check(
    self, ids: Sequence[Sequence[int]], new_tokens: int | None, stop: Sequence[str]
  ) -> tuple[int, StopTexts]:
    """Checks prompts and stop strings, which needs no model.

    Args:
      ids: of the prompts.
      new_tokens: upper limit of the new tokens; None is the default.
      stop: stop strings.

    Returns:
      The upper limit of the new tokens, and the stop strings.

    Raises:
      ConfigError: if a prompt is empty or, with its new tokens, too long for the context, or a stop string can appear
        in no answer.
    """
    if new_tokens is None:
      rows = check_prompts(ids, context=self.context, new_tokens=1)
      left = _NEW_TOKENS if self.context is None else self.context - max(map(len, rows))
      new_tokens = min(_NEW_TOKENS, left)
    else:
      check_prompts(ids, context=self.context, new_tokens=new_tokens)
    return new_tokens, stop_texts(self.tokenizer, stop)


@dataclasses.dataclass(frozen=True)
class TextModel:
  """A model that takes and gives texts.

  A prompt is a text, which is continued, or a conversation, which is answered: a list of messages, each with "role" and
  "content". It may also be a list of token ids.

  Attributes:
    model: a `models_core.layers.CausalLM`, on any mesh.
    settings: of its checkpoint.
  """

  model: Any
  settings: TextSettings

  @property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer."""
    return self.settings.tokenizer

  def session(self) -> Session:
    """A session for `stream`: the turns of one conversation, which then run once."""
    return Session(self.model)

  def generate(self, prompt: Prompt, **options: Any) -> str:
    """The text that follows a prompt, without special tokens.

    Args:
      prompt: a text or a conversation.
      **options: as `stream` takes them.

    Raises:
      ConfigError: as `stream`.
    """
    return "".join(self.stream(prompt, **options))

  def stream(
    self,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    interval: int = 8,
    session: Session | None = None,
    on_tokens: Callable[[int], Any] = lambda count: None,
    **variables: Any,
  ) -> Iterator[str]:
    """The text that follows a prompt, as it arrives.

    Args:
      prompt: a text or a conversation.
      max_new_tokens: upper limit of the tokens; None is 256, or less where the context ends.
      stop: texts that end the answer, and that are no part of it.
      sampling: how tokens are chosen; None does what the checkpoint's generation_config.json says.
      seed: of the sampling.
      interval: upper limit of the tokens between two texts, from 1 to 32.
      session: that keeps the KV cache from turn to turn, so that what a prompt begins with is not run again.
      on_tokens: is called with the number of tokens that arrived, before their text comes.
      **variables: of the chat template, such as `tools`; as `Tokenizer.render` takes them.

    Raises:
      ConfigError: if a number is outside its range, the prompt is empty or too long, a stop string can appear in no
        answer, or a template fails.
    """
    ids = self.settings.encode(prompt, **variables)
    limit, stops = self.settings.check([ids], max_new_tokens, stop)
    pieces = self.settings.run(
      self.model, [ids], limit, stops, sampling, seed, interval=interval, session=session
    )

    def arriving() -> Iterator[int]:
      for piece in pieces:
        on_tokens(len(piece.tokens[0]))
        yield from piece.tokens[0].tolist()

    return until(self.tokenizer.stream(arriving()), stops.texts)

  def generate_batch(
    self,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    num_samples: int = 1,
    **variables: Any,
  ) -> list[str]:
    """The texts that follow prompts of any lengths, which run together.

    Args:
      prompts: texts or conversations.
      max_new_tokens: of each, as `stream` takes it.
      stop: as `stream` takes it.
      sampling: as `stream` takes it.
      seed: of the sampling; row r has the seed `seed + r`.
      num_samples: texts for each prompt, side by side in the result.
      **variables: as `stream` takes them.

    Raises:
      ConfigError: as `stream`.
    """
    ids = [self.settings.encode(prompt, **variables) for prompt in prompts]
    limit, stops = self.settings.check(ids, max_new_tokens, stop)
    options = {"num_samples": num_samples, "interval": 32}
    pieces = self.settings.run(self.model, ids, limit, stops, sampling, seed, **options)
    rows: list[list[int]] = [[] for _ in range(len(ids) * num_samples)]
    for piece in pieces:
      for i, (row, new) in enumerate(zip(rows, piece.tokens, strict=True)):
        row += new.tolist()
        if new.size and stops.texts and first_stop(self.tokenizer.decode(row), stops.texts) is not None:
          pieces.end(i)
    texts = [self.tokenizer.decode(row) for row in rows]
    return [text[: first_stop(text, stops.texts)] for text in texts]

  def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Scored]:
    """Log-probabilities of the tokens of continuations, each encoded by itself, without special tokens.

    Raises:
      ConfigError: if there is not one continuation for each prompt, or a text is empty or too long.
    """
    before = [self.settings.encode(prompt) for prompt in prompts]
    after = [self.tokenizer.encode(text, add_special_tokens=False) for text in continuations]
    return score(self.model, before, after, context=self.settings.context)
