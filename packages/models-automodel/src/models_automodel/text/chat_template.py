"""Chat templates: Jinja in a sandbox, with the filters, functions and tags that Hugging Face's templates use."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models_core.errors import ConfigError
from models_core.extras import require

if TYPE_CHECKING:
  from jinja2 import nodes
  from jinja2.parser import Parser

_NEEDS = ("models-automodel[generate]", "A chat template")


def render(template: str, variables: Mapping[str, Any]) -> str:
  """Fills in a template.

  Args:
    template: Jinja source.
    variables: `messages`, `add_generation_prompt`, `bos_token` and any others that the template reads.

  Raises:
    ConfigError: if the template is malformed or refuses the messages; the message quotes its reason.
    MissingExtraError: if jinja2 is not installed.
  """
  jinja2 = require("jinja2", *_NEEDS)
  try:
    return _compile(template).render(variables)
  except jinja2.TemplateError as error:
    raise ConfigError(f"the chat template refuses these messages: {error}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
  return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
  jinja2, sandbox, ext = (require(name, *_NEEDS) for name in ("jinja2", "jinja2.sandbox", "jinja2.ext"))

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  class Generation(ext.Extension):  # type: ignore[name-defined]
    """`{% generation %}` marks the assistant's text for training; here it has no effect."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Scope:
      line = next(parser.stream).lineno
      return jinja2.nodes.Scope(
        parser.parse_statements(("name:endgeneration",), drop_needle=True)
      ).set_lineno(line)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  # Jinja's own filter tojson escapes HTML.
  environment.filters["tojson"] = _to_json
  environment.globals |= {"raise_exception": raise_exception, "strftime_now": _now}
  return environment


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _now(format: str) -> str:
  return datetime.datetime.now().strftime(format)
