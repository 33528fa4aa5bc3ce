"""A text model for lm-evaluation-harness: log-likelihoods and texts, in batches.

    results = lm_eval.simple_evaluate(model=evaluated(load_text_model("org/model")), tasks=["arc_easy"])

The package lm-eval comes with the extra `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from models_automodel.text import TextModel
from models_core.errors import ConfigError
from models_core.extras import require
from models_core.generation import Sampling, score

# Tokens of a text whose model states no context, and of an answer whose task states no limit.
_CONTEXT, _ANSWER = 4096, 256
_T = TypeVar("_T")


def evaluated(model: TextModel, batch_size: int = 8) -> Any:
  """The model as an `lm_eval.api.model.LM`.

  Args:
    model: a text model.
    batch_size: rows that run together. Programs are compiled for batches of this size alone.

  Raises:
    MissingExtraError: if lm-eval is not installed: `pip install "models-automodel[evaluate]"`.
  """
  interface = require("lm_eval.api.model", "models-automodel[evaluate]", "An evaluation")
  methods: dict[str, Any] = {
    "eot_token_id": property(lambda self: model.tokenizer.eos_id()),
    "prefix_token_id": property(lambda self: _first_id(model)),
    "tokenizer_name": property(lambda self: ""),
    "chat_template": lambda self, name=False: model.tokenizer.chat_template,
    "apply_chat_template": lambda self, history, add_generation_prompt=True: _rendered(
      model, history, add_generation_prompt
    ),
    "tok_encode": lambda self, string, add_special_tokens=None, **_: model.tokenizer.encode(
      string, add_special_tokens=add_special_tokens is not False
    ),
    "_loglikelihood_tokens": lambda self, requests, **_: _likelihoods(model, requests, batch_size),
    "loglikelihood_rolling": lambda self, requests, **_: _rolling(model, requests, batch_size),
    "generate_until": lambda self, requests, **_: _answers(model, requests, batch_size),
  }
  return type("EvaluatedModel", (interface.TemplateLM,), methods)()


def _first_id(model: TextModel) -> int:
  """The token that stands before a text without a context."""
  return model.tokenizer.eos_id() if (bos := model.tokenizer.bos_id()) is None else bos


def _rendered(model: TextModel, history: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
  if add_generation_prompt:
    return model.tokenizer.render(history)
  return model.tokenizer.render(history, continue_final_message=True)


def _context(model: TextModel) -> int:
  return model.settings.context or _CONTEXT


def _batches(items: Sequence[_T], size: int, length: Callable[[_T], int]) -> Iterator[list[tuple[int, _T]]]:
  """Items with their indices, the longest first, so that rows of a batch are about as long; each batch is full."""
  order = sorted(enumerate(items), key=lambda pair: -length(pair[1]))
  for start in range(0, len(order), size):
    batch = order[start : start + size]
    yield [*batch, *[batch[-1]] * (size - len(batch))]


def _likelihoods(
  model: TextModel, requests: Sequence[tuple[Any, list[int], list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
  """Log-likelihood of each continuation, and whether greedy decoding gives it. Long contexts lose their beginning."""
  found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
  rows = [(before[-max(_context(model) - len(after), 1) :], after) for _, before, after in requests]
  for batch in _batches(rows, batch_size, lambda row: len(row[0]) + len(row[1])):
    scored = score(model.model, [before for _, (before, _) in batch], [after for _, (_, after) in batch])
    for (i, _), result in zip(batch, scored, strict=True):
      found[i] = float(result.log_probs.sum()), bool(result.is_likeliest.all())
  return found


def _rolling(model: TextModel, requests: Sequence[Any], batch_size: int) -> list[float]:
  """Log-likelihood of whole texts, in windows of the context."""
  utils = require("lm_eval.utils", "models-automodel[evaluate]", "An evaluation")
  windows, owners = [], []
  for i, request in enumerate(requests):
    ids = model.tokenizer.encode(request.args[0], add_special_tokens=False)
    # A window's last token predicts nothing, and its first is the token before it.
    for pair in utils.get_rolling_token_windows(ids, _first_id(model), _context(model) - 1, 1):
      windows.append((None, *utils.make_disjoint_window(pair)))
      owners.append(i)
  totals = [0.0] * len(requests)
  for i, (value, _) in zip(owners, _likelihoods(model, windows, batch_size), strict=True):
    totals[i] += value
  return totals


def _answers(model: TextModel, requests: Sequence[Any], batch_size: int) -> list[str]:
  """The text that follows each context, up to the first of the task's stop strings."""
  texts = [""] * len(requests)
  kinds: dict[str, list[int]] = {}
  for i, request in enumerate(requests):
    kinds.setdefault(repr(sorted(request.args[1].items())), []).append(i)
  for members in kinds.values():
    options = dict(requests[members[0]].args[1])
    until = options.get("until") or []
    count = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _ANSWER)
    room = max(_context(model) - count, 1)
    contexts = [model.tokenizer.encode(requests[i].args[0])[-room:] for i in members]
    for batch in _batches(contexts, batch_size, len):
      answers = model.generate_batch(
        [ids for _, ids in batch],
        max_new_tokens=min(count, _context(model) - 1),
        stop=_possible(model, [until] if isinstance(until, str) else until),
        sampling=_sampling(options),
      )
      for (i, _), text in zip(batch, answers, strict=True):
        texts[members[i]] = text
  return texts


def _possible(model: TextModel, stops: Sequence[str]) -> list[str]:
  """The stop strings that an answer can hold: tasks list those of many models."""
  found = []
  for stop in stops:
    try:
      model.settings.check([[0]], 1, [stop])
      found.append(stop)
    except ConfigError:
      continue
  return found


def _sampling(options: Mapping[str, Any]) -> Sampling:
  """Greedy, unless the task samples."""
  temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
  return Sampling(
    temperature=temperature, top_k=int(options.get("top_k") or 0), top_p=float(options.get("top_p") or 1.0)
  )
