"""Errors of this machine's file system, as errors of sources that name the directory and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator

from models_sources.errors import AccessError, DiskError, FilesNotFoundError, InvalidNameError, SourceError

# How an address begins. A single letter is a drive of Windows.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# The numbers of errors that are about room.
_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
  errno.EFBIG: "raise the limit on file sizes, which `ulimit -f` shows",
  errno.EMFILE: "raise the limit on open files, which `ulimit -n` shows",
  errno.ENFILE: "raise the system's limit on open files",
}


def local_directory(path: str, use: str) -> str:
  """Returns the path of a directory of this machine, with the home directory in the place of `~`.

  Args:
    path: as the user gave it.
    use: what the directory is for, for messages.

  Raises:
    InvalidNameError: the path is an address such as gs://bucket/folder, or holds a NUL.
  """
  if _ADDRESS.match(path) or "\0" in path:
    raise InvalidNameError(f"{path!r} is not a directory of this machine: give another {use}")
  return os.path.expanduser(path)


@contextlib.contextmanager
def write_errors(
  directory: str | os.PathLike, what: str, nbytes: int | None, elsewhere: str
) -> Iterator[None]:
  """Turns an error of the file system while something is written into one that says what and where.

  Args:
    directory: that is written.
    what: is written, for messages.
    nbytes: of it; None if that is not known.
    elsewhere: tells the user how to name another directory.

  Raises:
    DiskError: the file system refuses.
  """
  try:
    yield
  except SourceError:
    raise
  except OSError as error:
    if error.errno is None:
      raise
    text = f"{os.fspath(directory)} cannot be written: {error.strerror or error}"
    text += f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
    if nbytes is not None:
      text += f"; {what} needs {nbytes:,} bytes there{_room(directory, error.errno)}"
    remedy = _REMEDIES.get(
      error.errno, f"{'free some space' if error.errno in _ROOM else 'make it writable'}, or {elsewhere}"
    )
    raise DiskError(f"{text}: {remedy}", error.errno) from error


def _room(directory: str | os.PathLike, number: int) -> str:
  """How much room there is, for an error that is about room."""
  with contextlib.suppress(OSError, ValueError, ImportError):
    if number == errno.ENOSPC:
      place = os.path.abspath(directory)
      while not os.path.exists(place):
        place = os.path.dirname(place)
      return f", and {shutil.disk_usage(place).free:,} are free"
    if number == errno.EFBIG:
      import resource  # only where there are such limits

      return f", and a file may have {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,}"
  return ""


@contextlib.contextmanager
def read_errors(path: str | os.PathLike) -> Iterator[None]:
  """Turns an error of the file system while a path is read into one that says so.

  Raises:
    AccessError: the file or directory may not be read.
    DiskError: the file system refuses for another reason, such as too many open files.
    FilesNotFoundError: it does not exist.
  """
  try:
    yield
  except SourceError:
    raise
  except OSError as error:
    if error.errno is None:
      raise
    text = f"{os.fspath(path)} cannot be read: {error.strerror or error}"
    if isinstance(error, FileNotFoundError):
      raise FilesNotFoundError(f"{text}: it was removed meanwhile; load it again") from error
    if isinstance(error, PermissionError):
      raise AccessError(f"{text}: make it readable for this user") from error
    raise DiskError(f"{text}: {_REMEDIES.get(error.errno, 'check the disk')}", error.errno) from error
