"""The processes that render templates: reused, replaced, and bounded."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import spawn

import pytest

from models_automodel.text import template_process
from models_automodel.text.chat_template import MAX_BYTES, render
from models_automodel.text.template_process import resident_bytes
from models_core.errors import ConfigError

SLOW = {
  "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
  "one operation": "{{ 7 ** (7 ** 9) }}",
  "compilation": "{% if x %}a{% endif %}" * (MAX_BYTES // 24),
}
LARGE = {
  "product": "{{ 'a' * 3000000000 }}",
  "doubling": "{% set ns = namespace(x='a') %}{% for i in range(31) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
  "lists": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = ns.x + [range(99999)|list] %}{% endfor %}",
  "percent": "{{ '%1000000000d' % 1 }}",
  "format": "{{ '{:1000000000d}'.format(1) }}",
  "center": "{{ 'a'|center(10**10) }}",
  "join": "{{ ('a' * 1000000).join('b' * 10000) }}",
  "replace": "{{ ('a' * 10000).replace('a', 'b' * 1000000) }}",
  "indent": "{{ ('a\n' * 100000)|indent(100000) }}",
  "batch": "{{ [1]|batch(10**9, 1)|list }}",
}
DEEP = {
  "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
  "loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
  "parentheses": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
  "not": "{{ " + "not " * 10000 + "1 }}",
  "blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
}
REASONS = {"takes longer than 1 s": SLOW, "needs more than 128 MB of memory": LARGE, "too deeply": DEEP}
BOMBS = [(template, reason) for reason, templates in REASONS.items() for template in templates.values()]


@pytest.mark.parametrize(("template", "reason"), BOMBS, ids=[name for t in REASONS.values() for name in t])
def test_a_bomb_is_an_error_within_two_seconds(template, reason):
  render("", {})
  start = time.monotonic()
  with pytest.raises(ConfigError, match=rf"^the chat template x\.jinja was stopped: it .*{reason}"):
    render(template, {}, origin="x.jinja")
  assert time.monotonic() - start < 2
  assert render("{{ x }}", {"x": 1}) == "1"


def run(script, *arguments):
  """Runs a program in a Python of its own and returns what it prints."""
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", script, *arguments], capture_output=True, text=True, timeout=60
  )
  assert (done.returncode, done.stderr) == (0, "")
  return done.stdout


def test_signals_that_this_process_blocks_or_ignores_end_that_one(no_processes):
  numbers = {signal.SIGPROF, signal.SIGALRM}
  handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
  try:
    render("", {})
    with pytest.raises(ConfigError, match="takes longer than 1 s"):
      render(SLOW["loops"], {})
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
      signal.signal(number, handler)


def test_bombs_stay_below_200_megabytes():
  script = """
import json, pathlib, resource, sys
from models_automodel.text.chat_template import render
from models_core.errors import ConfigError
for template in json.loads(sys.argv[1]):
  try:
    render(template, {})
  except ConfigError:
    pass
# The usage of this process itself would count what it was before it became Python.
own = [line.split()[1] for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print([int(own[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss])
"""
  sizes = json.loads(run(script, json.dumps(list(LARGE.values()))))
  assert all(size * 1024 < 200e6 for size in sizes)


def test_bounds_grow_with_the_messages():
  text = "0123456789" * 3_000_000
  assert render("{{ (x ~ x)|length }}", {"x": text}) == "60000000"
  assert render("{{ x }}", {"x": text}) == text


def test_a_text_has_a_bound_too():
  with pytest.raises(ConfigError, match="its text has more than 32 million characters"):
    render("{{ x * 33600000 }}", {"x": "a"})
  assert render("{{ x * 10000000 }}", {"x": "a"}) == "a" * 10_000_000


def test_a_template_has_at_most_a_megabyte():
  with pytest.raises(ConfigError, match="x has 1,048,577 characters, more than the 1,048,576 that are read"):
    render("a" * (MAX_BYTES + 1), {}, origin="x")
  assert render("a" * MAX_BYTES, {}) == "a" * MAX_BYTES


def idle():
  return [process.pid for process in template_process._idle]


def test_a_process_is_kept_until_a_bound_is_exceeded():
  render("", {})
  kept = idle()
  for template in ("{{ raise_exception('no') }}", "{{ 1 + 'a' }}", "{% if %}"):
    with pytest.raises(ConfigError):
      render(template, {})
  assert idle() == kept
  with pytest.raises(ConfigError):
    render(DEEP["macro"], {})
  assert idle() == kept[:-1]


def test_a_process_that_ended_meanwhile_is_replaced():
  render("", {})
  for process in template_process._idle:
    os.kill(process.pid, signal.SIGKILL)
  assert render("{{ x }}", {"x": 1}) == "1"


def test_threads():
  found = {}

  def work(number):
    for i in range(20):
      found[number, i] = render("{{ x }}/{{ y * 1000 }}", {"x": number, "y": str(i)})

  threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {(number, i): f"{number}/{str(i) * 1000}" for number in range(8) for i in range(20)}
  assert 0 < len(idle()) <= 4


def test_a_fork_starts_processes_of_its_own():
  script = """
import os, warnings
from models_automodel.text import template_process
from models_automodel.text.chat_template import render
# Python warns of a fork beside the threads of NumPy.
warnings.simplefilter("ignore", DeprecationWarning)
render("", {})
before = [p.pid for p in template_process._idle]
child = os.fork()
fine = all(render("{{ x }}", {"x": f"{os.getpid()} {i}"}) == f"{os.getpid()} {i}" for i in range(50))
after = [p.pid for p in template_process._idle]
if child == 0:
  os._exit(0 if fine and not set(before) & set(after) else 1)
_, status = os.waitpid(child, 0)
print(status, fine and before == after)
"""
  assert run(script) == "0 True\n"


def test_a_script_needs_no_guard(tmp_path):
  script = tmp_path / "script.py"
  script.write_text("from models_automodel.text.chat_template import render\nprint(render('{{ 1 }}', {}))\n")
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
  assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.fixture
def no_processes():
  template_process._end_all()
  executable = spawn.get_executable()
  yield
  multiprocessing.set_executable(executable)


def fake_python(folder, script):
  path = folder / "program"
  path.write_text(f"#!/bin/sh\n{script}\n")
  path.chmod(0o755)
  return str(path)


@pytest.mark.parametrize(
  ("script", "reason"),
  [("exit 3", "it ended at once"), ("exec sleep 30", "it takes longer than 0.2 s"), (None, "No such file")],
)
def test_a_program_that_is_no_python(script, reason, tmp_path, no_processes, monkeypatch):
  monkeypatch.setattr(template_process, "_START_SECONDS", 0.2)
  multiprocessing.set_executable(fake_python(tmp_path, script) if script else str(tmp_path / "nothing"))
  with pytest.raises(ConfigError, match=rf"did not become one \(.*{reason}.*multiprocessing.set_executable"):
    render("", {})


def test_a_frozen_program_is_not_run_again(no_processes, monkeypatch):
  monkeypatch.setattr(sys, "frozen", True, raising=False)
  with pytest.raises(ConfigError, match="this program is no Python interpreter"):
    render("", {})
  multiprocessing.set_executable(os.path.realpath(sys.executable))
  assert render("{{ 1 }}", {}) == "1"


@pytest.mark.parametrize(
  ("script", "seconds", "reason"),
  [
    ("x = bytearray(300 << 20); import time; time.sleep(30)", 20, "more than 96 MB of memory"),
    ("import time; time.sleep(30)", 0.3, "longer than 0.3 s"),
    ("pass", 20, None),
  ],
)
def test_a_process_is_watched_where_the_system_sets_no_bounds(script, seconds, reason, monkeypatch):
  monkeypatch.setattr(template_process.sys, "platform", "another")
  monkeypatch.setattr(template_process, "resident_bytes", on_linux)
  with (
    subprocess.Popen([sys.executable, "-c", script]) as process,
    template_process._watched(process, seconds, 64 << 20) as reasons,
  ):
    status = process.wait()
  assert (status == -signal.SIGKILL) == (reason is not None)
  assert [r for r in reasons if reason and reason in r] == reasons


def on_linux(pid):
  with open(f"/proc/{pid}/statm", "rb") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_memory_of_a_process():
  assert resident_bytes(os.getpid()) == pytest.approx(on_linux(os.getpid()), rel=0.1)
  assert resident_bytes(2**22 + 1) is None
