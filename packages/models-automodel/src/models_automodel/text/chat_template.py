"""Chat templates: which of several is taken, what it finds, and how it is rendered."""

from __future__ import annotations

import dataclasses
import functools
import marshal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models_automodel.text.template_process import render_in_process
from models_core.errors import ConfigError

DEFAULT, TOOL_USE = "default", "tool_use"
MAX_BYTES = 1 << 20
# Names under which a message holds the reasoning. Templates read the first, older ones the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Far above what messages and tools have; Python and the sandbox nest about ten times as deep.
_DEEPEST = 100
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template and where it is from.

  Attributes:
    source: Jinja source.
    origin: for messages, such as "chat_template.jinja".
  """

  source: str = dataclasses.field(repr=False)
  origin: str


def choose(
  templates: Mapping[str, ChatTemplate], asked: str | None = None, *, tools: Sequence[Any] | None = None
) -> ChatTemplate:
  """Chooses a template as transformers does.

  Args:
    templates: those of the checkpoint, by name.
    asked: the name of one of them, or Jinja source of the caller's own.
    tools: if it is not None, the template "tool_use" is taken where there is one.

  Raises:
    ConfigError: if there is none, none of several is called "default", or none has the name that was asked for.
  """
  if asked is not None:
    if asked not in templates and "{" not in asked:
      raise ConfigError(
        f"there is no chat template {asked!r}: choose one of {', '.join(templates) or 'none'}, or pass Jinja source"
      )
    return templates.get(asked) or ChatTemplate(asked, "that was passed")
  if tools is not None and TOOL_USE in templates:
    return templates[TOOL_USE]
  if DEFAULT in templates:
    return templates[DEFAULT]
  if templates:
    raise ConfigError(
      f"the checkpoint has several chat templates and no default: choose by chat_template= one of {', '.join(templates)}"
    )
  raise ConfigError(
    "the checkpoint has no chat template (a base model?): encode plain text instead, or pass Jinja source as chat_template="
  )


def render(template: str, variables: Mapping[str, Any], *, origin: str = "") -> str:
  """Fills in a template.

  The template runs in a process of its own, in Jinja's sandbox, with bounds on its time and memory: a second and 128
  MB, and more of both for each megabyte of variables.

  Args:
    template: Jinja source.
    variables: `messages`, `add_generation_prompt`, `bos_token` and any others that the template reads. Objects that are
      no plain data are replaced by their contents or, if they have none, by the name of their type.
    origin: where the template is from, for messages.

  Raises:
    ConfigError: if the template is malformed, fails, exceeds a bound or refuses the messages; the message quotes its
      reason.
    MissingExtraError: if jinja2 is not installed.
  """
  name = f"the chat template {origin}".rstrip()
  if len(template) > MAX_BYTES:
    raise ConfigError(f"{name} has {len(template):,} characters, more than the {MAX_BYTES:,} that are read")
  request = marshal.dumps({key: plain(value) for key, value in variables.items()})
  return render_in_process(template, request, name)


def plain_messages(messages: Any) -> list[dict[str, Any]]:
  """Messages as a template finds them: plain dicts, without what is None, reasoning under the names that are read.

  Raises:
    ConfigError: if something among them is no message.
  """
  found = []
  for i, message in enumerate(messages):
    data = plain(message)
    if not isinstance(data, dict):
      kind = type(message).__name__
      raise ConfigError(
        f"messages[{i}] is a {kind}, expected a dict with 'role' and 'content'; render conversations one by one"
      )
    data = {key: value for key, value in data.items() if value is not None}
    reasoning = next((data[name] for name in _REASONING if name in data), None)
    if reasoning is not None:
      data = {"thinking": reasoning, **data, "reasoning_content": reasoning}
    found.append(data)
  return found


def render_unfinished(
  template: ChatTemplate, variables: dict[str, Any], messages: list[dict[str, Any]], field: str
) -> str:
  """Renders a conversation up to the end of its last message's text, which the model goes on with.

  Args:
    template: the template.
    variables: all but the messages.
    messages: plain messages.
    field: of the last message, such as "content".

  Raises:
    ConfigError: if there is no text to continue, or the template leaves it out; and as `render`.
  """
  final = messages[-1].get(field) if messages else None
  fields = (
    [name for name in _REASONING if messages[-1].get(name) == final] if field in _REASONING else [field]
  )
  if final is None or not any(name in template.source for name in fields):
    raise ConfigError(
      f"continue_final_message: the last message has no {field!r}, or the chat template {template.origin} does not read it"
    )
  if isinstance(final, str):
    marked: dict[str, Any] = dict.fromkeys(fields, final + _TAG)
  else:
    blocks = [dict(block) if isinstance(block, dict) else block for block in final]
    last = next((b for b in reversed(blocks) if isinstance(b, dict) and isinstance(b.get("text"), str)), None)
    if last is None:
      raise ConfigError("continue_final_message: the last message holds no text to continue")
    final, last["text"] = last["text"], last["text"] + _TAG
    marked = {field: blocks}
  text = render(
    template.source,
    variables | {"messages": [*messages[:-1], messages[-1] | marked]},
    origin=template.origin,
  )
  tag = _TAG.strip()
  if tag not in text or final.strip() not in text:
    raise ConfigError(
      f"continue_final_message: the chat template {template.origin} leaves out, or changes, the last message's text"
    )
  at = text.rindex(tag)
  # A template that trims the text trims the tag's own space, too.
  return text[:at] if text[at : at + len(_TAG)] == _TAG else text[:at].rstrip()


def plain(value: Any, depth: int = 0) -> Any:
  """The same value out of plain types alone, which have no methods that do more than compute.

  Args:
    value: any value.
    depth: how many values this one lies in.

  Raises:
    ConfigError: if it is nested too deeply, or contains itself.
  """
  if depth > _DEEPEST:
    raise ConfigError(
      f"what a chat template is to find is nested more than {_DEEPEST} levels deep, or contains itself"
    )
  below = functools.partial(plain, depth=depth + 1)
  if value is None or type(value) in (str, int, float, bool):
    return value
  for kind in (str, int, float):
    if isinstance(value, kind):
      return _BASE[kind](value)
  if isinstance(value, Mapping):
    return {below(key): below(item) for key, item in value.items()}
  if isinstance(value, list):
    return [below(item) for item in value]
  if isinstance(value, tuple):
    return tuple(below(item) for item in value)
  if isinstance(value, np.generic):
    return below(value.item())
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {field.name: below(getattr(value, field.name)) for field in dataclasses.fields(value)}
  # Objects of pydantic, such as messages of OpenAI's client.
  if callable(dump := getattr(value, "model_dump", None)):
    return below(dump())
  return f"<{type(value).__name__}>"


_BASE: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
