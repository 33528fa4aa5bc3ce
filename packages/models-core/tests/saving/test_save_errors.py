"""Which errors of the file system are about the target of a save, and which about files that are only read."""

import errno

import pytest

from models_core.errors import CheckpointError, SaveError
from models_core.saving.atomic import save_errors

TARGET = "/models/new"


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(
      errno.ENOSPC, "No space left on device", "/models/old/a.json", None, "/models/.new.saving-1/a.json"
    ),
    PermissionError(errno.EACCES, "Permission denied", "/models"),
    PermissionError(errno.EACCES, "Permission denied", b"/models/.new.saving.lock"),
    PermissionError(errno.EACCES, "Permission denied", "/models/new/config.json"),
    OSError(errno.EBADF, "Bad file descriptor", 7),
  ],
)
def test_an_error_about_the_target(error):
  with pytest.raises(SaveError, match=r"^/models/new cannot be written: ") as caught, save_errors(TARGET):
    raise error
  assert caught.value.errno == error.errno


@pytest.mark.parametrize("name", ["new", "link", "~/new"])
def test_the_target_is_known_by_any_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "link").symlink_to("new")
  with pytest.raises(SaveError), save_errors(name):
    raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".new.saving-1" / "config.json"))


@pytest.mark.parametrize("path", ["/models/newer/tokenizer.json", "/models/old", "/elsewhere/models/new/x"])
def test_an_error_about_a_file_that_is_only_read(path):
  with (
    pytest.raises(CheckpointError, match=r"cannot be read: Permission denied$") as caught,
    save_errors(TARGET),
  ):
    raise PermissionError(errno.EACCES, "Permission denied", path)
  assert caught.value.where == path


def test_an_error_that_is_not_of_the_file_system_passes():
  error = ConnectionError("the hub does not answer: try again later")
  with pytest.raises(ConnectionError) as caught, save_errors(TARGET):
    raise error
  assert caught.value is error
