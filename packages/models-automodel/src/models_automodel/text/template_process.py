"""Processes that render templates: started when they are needed, kept for the next template, replaced when they end.

A template is a program of somebody else's. The process that runs it has bounds on time and memory, which the operating
system enforces (`template_worker.py`). Where it has none on memory, as on macOS, this process watches that one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib.util
import marshal
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import spawn
from typing import IO

from models_automodel.text import template_worker as worker
from models_core.errors import ConfigError
from models_core.extras import require

_NEEDS = ("models-automodel[generate]", "A chat template")
# Bounds for a template with few variables. Each megabyte of variables adds to them.
_SECONDS, _SECONDS_PER_MB = 1.0, 1.0
_MEGABYTES, _MEGABYTES_PER_MB = 128, 24
_START_SECONDS = 20.0
# What is watched from outside may grow a little beyond the bound, from a process of this size.
_WATCH_SECONDS, _WATCH_SLACK = 0.005, 32 << 20
# Processes that are kept for the next templates.
_KEPT = 4
# Variables of the environment by which a Python finds its libraries.
_ENVIRONMENT = re.compile(r"(DY)?LD_.*|LC_.*|LANG", re.IGNORECASE)


def render_in_process(source: str, variables: bytes, name: str) -> str:
  """Renders a template in another process.

  Args:
    source: Jinja source.
    variables: a dict of plain data, as `marshal.dumps` writes it.
    name: of the template, for messages.

  Raises:
    ConfigError: if the template is malformed, fails, exceeds a bound or refuses the variables, or no process can be
      started.
    MissingExtraError: if jinja2 is not installed.
  """
  folders = _folders()
  now = datetime.datetime.now()
  moment = (now.year, now.month, now.day, now.hour, now.minute, now.second, now.microsecond)
  seconds = _SECONDS + _SECONDS_PER_MB * len(variables) / 1e6
  memory = (_MEGABYTES << 20) + _MEGABYTES_PER_MB * len(variables)
  request = marshal.dumps((source, variables, moment, seconds, memory))
  answer = None
  # A process that was kept may have been ended by somebody else since.
  if (kept := _take()) is not None:
    answer = _attempt(kept, request, seconds, memory)
  if answer is None:
    answer = _attempt(_start(folders), request, seconds, memory)
  kind, text = answer or (worker.STOPPED, b"it ended the process that rendered it")
  match kind:
    case worker.TEXT:
      return text.decode(errors="surrogatepass")
    case worker.REFUSAL:
      raise ConfigError(f"{name} refuses these messages: {text.decode()}")
    case worker.FAILURE:
      raise ConfigError(f"{name} fails with these messages: {text.decode()}")
    case worker.MEMORY:
      reason = f"it needs more than {memory >> 20} MB of memory"
    case worker.DEPTH:
      reason = "it is nested, or calls itself, too deeply"
    case worker.OUTPUT:
      reason = f"its text has more than {memory >> 22} million characters"
    case _:
      reason = text.decode()
  raise ConfigError(f"{name} was stopped: {reason}; pass another as chat_template=")


def _attempt(
  process: subprocess.Popen, request: bytes, seconds: float, memory: int
) -> tuple[int, bytes] | None:
  """Sends a request and returns the answer, STOPPED if a bound ended the process, None if something else did.

  The process is kept for the next template, if it can render it.
  """
  requests, answers = _pipes(process)
  answer = None
  try:
    with _watched(process, seconds * worker.PATIENCE, memory) as reasons:
      with contextlib.suppress(BrokenPipeError):
        requests.write(len(request).to_bytes(8, "big") + request)
        requests.flush()
      answer = _read_answer(answers)
    if answer is None and process.wait() in (-signal.SIGPROF, -signal.SIGALRM):
      reasons = [_too_slow(seconds)]
  finally:
    if answer is not None and answer[0] in worker.GOING_ON and len(_idle) < _KEPT:
      _idle.append(process)
    else:
      _end(process)
  return answer or ((worker.STOPPED, reasons[0].encode()) if reasons else None)


def _too_slow(seconds: float) -> str:
  return f"it takes longer than {seconds:.3g} s"


def _read_answer(answers: IO[bytes]) -> tuple[int, bytes] | None:
  header = answers.read(9)
  if len(header) < 9:
    return None
  size = int.from_bytes(header[1:], "big")
  text = answers.read(size)
  return (header[0], text) if len(text) == size else None


# Processes that wait for a template.
_idle: list[subprocess.Popen] = []


def _take() -> subprocess.Popen | None:
  try:
    return _idle.pop()
  except IndexError:
    return None


def _start(folders: list[str]) -> subprocess.Popen:
  executable = os.fsdecode(spawn.get_executable() or "")
  try:
    # A frozen program would run itself once more.
    if not executable or (getattr(sys, "frozen", False) and executable == sys.executable):
      raise OSError("this program is no Python interpreter")
    process = subprocess.Popen(
      # Without the site's packages, the user's paths and the variables that change Python.
      [executable, "-I", "-S", *(["-B"] if sys.dont_write_bytecode else []), worker.__file__, *folders],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env={name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)},
    )
  except OSError as error:
    raise _no_python(executable, str(error)) from error
  try:
    with _watched(process, _START_SECONDS, None) as reasons:
      answer = _read_answer(_pipes(process)[1])
    if answer is None or answer[0] != worker.READY:
      reason = answer[1].decode(errors="replace") if answer else "".join(reasons) or "it ended at once"
      raise _no_python(executable, reason)
  except BaseException:
    _end(process)
    raise
  return process


def _no_python(executable: str, reason: str) -> ConfigError:
  return ConfigError(
    f"a chat template is rendered by a Python process of its own, but {executable!r} did not become one ({reason}): "
    "name a Python interpreter by multiprocessing.set_executable(path)"
  )


def _folders() -> list[str]:
  """The folders from which Jinja is imported."""
  found = []
  for name in ("jinja2", "markupsafe"):
    # This process needs no Jinja itself.
    spec = importlib.util.find_spec(name)
    origin = require(name, *_NEEDS).__file__ if spec is None else spec.origin
    found.append(os.path.dirname(os.path.dirname(str(origin))))
  return list(dict.fromkeys(found))


def _end(process: subprocess.Popen) -> None:
  process.kill()
  for pipe in _pipes(process):
    with contextlib.suppress(OSError):
      pipe.close()
  process.wait()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
  assert process.stdin is not None
  assert process.stdout is not None
  return process.stdin, process.stdout


@contextlib.contextmanager
def _watched(process: subprocess.Popen, seconds: float, memory: int | None) -> Iterator[list[str]]:
  """Ends the process from outside if it takes too long or grows too large meanwhile, and yields a list of the reason.

  On Linux a process that renders ends by itself, and only its start is watched.
  """
  reasons: list[str] = []
  if memory is not None and sys.platform == "linux":
    yield reasons
    return
  done = threading.Event()
  thread = threading.Thread(target=_watch, args=(process, seconds, memory, done, reasons), daemon=True)
  thread.start()
  try:
    yield reasons
  finally:
    done.set()
    thread.join()


def _watch(
  process: subprocess.Popen, seconds: float, memory: int | None, done: threading.Event, reasons: list[str]
) -> None:
  bound = None if memory is None else memory + _WATCH_SLACK
  for _ in range(int(seconds / _WATCH_SECONDS) + 1):
    if done.wait(_WATCH_SECONDS):
      return
    if bound is not None and (resident_bytes(process.pid) or 0) > bound:
      reasons.append(f"it needs more than {bound >> 20} MB of memory")
      break
  else:
    reasons.append(_too_slow(seconds))
  process.kill()


def resident_bytes(pid: int) -> int | None:
  """The memory that a process occupies; None where the system does not tell."""
  if sys.platform == "linux":
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", "rb") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  elif sys.platform == "darwin":
    import ctypes

    # struct proc_taskinfo begins with the virtual and the resident size.
    info = (ctypes.c_uint64 * 12)()
    if ctypes.CDLL(None).proc_pidinfo(pid, 4, ctypes.c_uint64(0), info, ctypes.sizeof(info)) > 0:
      return info[1]
  return None


def _forget() -> None:
  """Leaves the processes to the one that started them."""
  for process in _idle:
    for pipe in _pipes(process):
      with contextlib.suppress(OSError):
        pipe.close()
    # It is nobody's child here: there is nothing to wait for.
    process.returncode = 0
  _idle.clear()


@atexit.register
def _end_all() -> None:
  while _idle:
    _end(_idle.pop())


if hasattr(os, "register_at_fork"):
  os.register_at_fork(after_in_child=_forget)
