"""Renders templates in a process of its own, with bounds on time and memory that the operating system enforces.

`template_process.py` runs this file as a script, with an interpreter that sees the standard library and Jinja alone. It
reads requests from its standard input and writes one answer to each to its standard output:

- At the start: an answer of kind READY, or BROKEN with the reason.
- A request: eight bytes of length, then the tuple (source, variables, now, seconds, memory) as `marshal` writes it;
  the variables are bytes that `marshal` wrote.
- An answer: the byte of a kind, eight bytes of length, then a text in UTF-8. STOPPED is never sent.

An answer that says that a bound was exceeded is the last one. If a bound on time is exceeded, a signal ends the process: SIGPROF for the processor's time, SIGALRM for the clock's.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import marshal
import signal
import sys
from typing import Any, BinaryIO

# Kinds of answers.
TEXT, REFUSAL, FAILURE, MEMORY, DEPTH, OUTPUT, STOPPED, READY, BROKEN = range(9)
# Those after which the process renders the next template.
GOING_ON = (TEXT, REFUSAL, FAILURE)
# A template's time on the clock may be so many times its time on the processor.
PATIENCE = 1.25
# What a process that renders needs no more of.
_FORBIDDEN = ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC")


def main(folders: list[str]) -> None:
  """Answers requests until the standard input ends."""
  requests, answers = sys.stdin.buffer, sys.stdout.buffer
  with contextlib.suppress(ValueError, OSError):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
  sys.path += folders
  try:
    environment = make_environment()
    limit = _limiter()
  except Exception as error:
    _send(answers, BROKEN, f"{type(error).__name__}: {error}".encode())
    return
  compiled = functools.lru_cache(maxsize=8)(environment.from_string)
  _send(answers, READY, b"")
  while len(header := requests.read(8)) == 8:
    source, variables, now, seconds, memory = marshal.loads(requests.read(int.from_bytes(header, "big")))
    limit(seconds, memory)
    kind, text = _answer(compiled, source, variables, now, memory)
    limit(0, 0)
    _send(answers, kind, text)
    if kind not in GOING_ON:
      return


def _send(answers: BinaryIO, kind: int, text: bytes) -> None:
  answers.write(bytes([kind]) + len(text).to_bytes(8, "big") + text)
  answers.flush()


def _answer(
  compiled: Any, source: str, variables: bytes, now: tuple[int, ...], memory: int
) -> tuple[int, bytes]:
  import jinja2

  def strftime_now(format: str) -> str:
    return datetime.datetime(*now).strftime(format)  # type: ignore[arg-type]

  try:
    # Variables hide globals of the same name.
    text = compiled(source).render({"strftime_now": strftime_now} | marshal.loads(variables))
    if len(text) * 4 > memory:
      return OUTPUT, b""
    return TEXT, text.encode(errors="surrogatepass")
  except MemoryError:
    return MEMORY, b""
  except RecursionError:
    return DEPTH, b""
  except jinja2.TemplateError as error:
    return REFUSAL, _message(error)
  except Exception as error:
    return FAILURE, f"{type(error).__name__}: ".encode() + _message(error)


def _message(error: Exception) -> bytes:
  return str(error)[:10_000].encode(errors="replace")


def _limiter() -> Any:
  """A function that bounds what is done from now on, by seconds and bytes; 0 is no bound."""
  try:
    import resource
  except ImportError:
    return lambda seconds, memory: None
  for name in _FORBIDDEN:
    with contextlib.suppress(AttributeError, ValueError, OSError):
      resource.setrlimit(getattr(resource, name), (0, 0))
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  # This process may have been started by one that ignores or blocks the signals of the timers.
  timers = (signal.SIGPROF, signal.SIGALRM)
  for number in timers:
    signal.signal(number, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, timers)
  page = resource.getpagesize()

  def limit(seconds: float, memory: int) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * PATIENCE)
    with contextlib.suppress(OSError, ValueError):
      bound = _address_space(page) + memory if memory else hard
      resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))

  return limit


def _address_space(page: int) -> int:
  """Bytes of this process's address space, or as many as it may have where the system does not tell."""
  try:
    with open("/proc/self/statm", "rb") as file:
      return int(file.read().split()[0]) * page
  except OSError:
    return 64 << 20


def make_environment() -> Any:
  """Jinja's sandbox, with the filters, functions and tags that Hugging Face's templates use."""
  import jinja2
  from jinja2 import ext, nodes, sandbox

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  class Generation(ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it has no effect."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> nodes.Node:
      line = next(parser.stream).lineno
      return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  # Jinja's own filter tojson escapes HTML.
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = raise_exception
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


if __name__ == "__main__":
  main(sys.argv[1:])
