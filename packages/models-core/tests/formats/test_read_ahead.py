"""Reading ahead: what the system is asked for, and that a load does not depend on it."""

import os
import threading

import pytest

from models_core.formats import LocalFiles, read_ahead
from models_core.formats import files as files_module


def finish():
  for thread in threading.enumerate():
    if thread is not threading.current_thread() and thread.daemon:
      thread.join(10)


@pytest.fixture
def sent(monkeypatch):
  """The names and ranges that were sent to nowhere."""
  calls = []
  sendfile = os.sendfile

  def recorded(target, source, offset, count):
    assert os.readlink(f"/proc/self/fd/{target}") == os.devnull
    done = sendfile(target, source, offset, min(count, 700))  # the system may take less than it was given
    calls.append((os.path.basename(os.readlink(f"/proc/self/fd/{source}")), offset, done))
    return done

  monkeypatch.setattr(files_module.os, "sendfile", recorded)
  return calls


@pytest.fixture
def folder(tmp_path):
  for name in "ab":
    (tmp_path / name).write_bytes(bytes(1000))
  return LocalFiles(str(tmp_path))


def test_files_are_read_one_after_another(folder, sent):
  read_ahead(folder, ["a", "b"])
  finish()
  ends = [("a", 1000, 0), ("b", 1000, 0)]
  assert sent == [("a", 0, 700), ("a", 700, 300), ends[0], ("b", 0, 700), ("b", 700, 300), ends[1]]


def test_no_more_than_the_first_bytes_are_read(folder, sent, monkeypatch):
  monkeypatch.setattr(files_module, "_AHEAD", 1200)
  read_ahead(folder, ["a", "b"])
  finish()
  assert sum(count for *_, count in sent) == 1200
  assert sent[-1] == ("b", 0, 200)


def test_a_missing_file_is_an_error_of_whoever_reads_it(folder, sent):
  read_ahead(folder, ["a", "missing", "b"])
  finish()
  assert {name for name, *_ in sent} == {"a"}


def test_files_of_a_store_are_left_out(sent):
  class InAStore:
    def locate(self, name):
      return None

  read_ahead(InAStore(), ["a"])
  read_ahead(object(), ["a"])
  finish()
  assert not sent
