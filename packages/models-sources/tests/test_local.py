import os

import pytest

from models_sources import FilesNotFoundError, InvalidNameError, get_source

open_files = get_source("local").open_files


@pytest.fixture
def directory(tmp_path):
  place = tmp_path / "model"
  (place / "sub").mkdir(parents=True)
  (place / "config.json").write_bytes(b"{}")
  (place / "a.safetensors").write_bytes(bytes(range(100)))
  (place / "sub" / "b.json").write_bytes(b"[]")
  (tmp_path / "secret").write_bytes(b"secret")
  return place


def test_a_directory(directory):
  files = open_files(str(directory))
  assert files.path == str(directory)
  assert files.names() == ["a.safetensors", "config.json"]
  assert files.size("a.safetensors") == 100
  assert files.read("a.safetensors", 10, 14) == bytes([10, 11, 12, 13])
  assert files.read("a.safetensors", 98, 200) == bytes([98, 99])
  assert files.read("a.safetensors", 5, 5) == b""
  assert files.fetch(["config.json", "a.safetensors"]) == str(directory)
  assert files.read("sub/b.json", 0, 2) == b"[]"


def test_one_file(directory):
  files = open_files(str(directory / "a.safetensors"))
  assert files.path == str(directory / "a.safetensors")
  assert files.names() == ["a.safetensors"]
  assert files.size("a.safetensors") == 100
  assert files.read("a.safetensors", 0, 2) == b"\0\1"
  assert files.fetch(["a.safetensors"]) == str(directory)
  with pytest.raises(FilesNotFoundError):
    files.read("config.json", 0, 2)
  with pytest.raises(FilesNotFoundError):
    files.fetch(["a.safetensors", "config.json"])


def test_links_of_a_snapshot_are_followed(tmp_path):
  (tmp_path / "blobs").mkdir()
  (tmp_path / "snapshots" / "abc").mkdir(parents=True)
  (tmp_path / "blobs" / "123").write_bytes(b"weights")
  (tmp_path / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/123")
  (tmp_path / "snapshots" / "abc" / "broken").symlink_to("../../blobs/456")
  files = open_files(str(tmp_path / "snapshots" / "abc"))
  assert files.names() == ["model.safetensors"]
  assert files.read("model.safetensors", 0, 7) == b"weights"
  assert files.size("model.safetensors") == 7
  assert files.fetch(["model.safetensors"]) == files.path


def test_home_is_expanded(directory, monkeypatch):
  monkeypatch.setenv("HOME", str(directory.parent))
  monkeypatch.setenv("USERPROFILE", str(directory.parent))
  assert open_files("~/model").names() == ["a.safetensors", "config.json"]


def test_relative_paths_outlive_a_change_of_directory(directory, monkeypatch):
  monkeypatch.chdir(directory.parent)
  files = open_files("model")
  monkeypatch.chdir("/")
  assert files.read("config.json", 0, 2) == b"{}"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", ""])
def test_names_do_not_leave_the_directory(directory, name):
  files = open_files(str(directory))
  for action in (files.size, lambda n: files.read(n, 0, 1), lambda n: files.fetch([n])):
    with pytest.raises(InvalidNameError):
      action(name)


def test_what_is_missing_is_said(directory):
  with pytest.raises(FilesNotFoundError, match=r"no file or directory .*/nowhere: check the spelling"):
    open_files(str(directory / "nowhere"))
  files = open_files(str(directory))
  with pytest.raises(FilesNotFoundError, match=r"has no confg.json; did you mean config.json\?"):
    files.size("confg.json")
  with pytest.raises(FilesNotFoundError, match=r"has no x, y; it has a.safetensors, config.json"):
    files.fetch(["config.json", "x", "y"])
  with pytest.raises(FilesNotFoundError):
    files.read("sub", 0, 1)


def test_a_directory_has_no_revisions(directory):
  with pytest.raises(InvalidNameError, match="has no revision 'main'"):
    open_files(str(directory), revision="main")


def test_an_empty_directory(tmp_path):
  files = open_files(str(tmp_path))
  assert files.names() == []
  assert files.fetch([]) == os.fspath(tmp_path)


def test_a_loop_of_links_is_no_file(tmp_path):
  (tmp_path / "a").write_text("x")
  (tmp_path / "loop").symlink_to("loop")
  assert open_files(str(tmp_path)).names() == ["a"]
