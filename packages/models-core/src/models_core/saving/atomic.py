"""Writing a directory so that, whatever happens meanwhile, it is the complete old or the complete new one.

The new directory is built beside its target, under a hidden name, and takes the target's name when it is complete
and on the disk. Where the target exists the two change places in one step of the file system (Linux:
`renameat2` with RENAME_EXCHANGE). Where that step is missing, the new directory is renamed to `complete`, the old
one to `replaced`, then the new one to the target: what a killed process leaves of these renames is finished by
`recover`. A lock beside the target holds off other writers; a hidden directory that is found under the lock was left
by a killed one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator

from models_core.errors import ModelsError, SaveError

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]

_STAGES = ("saving", "complete", "replaced")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replace_directory(
  target: str, *, overwrite: bool = False, outdated: Callable[[str], Collection[str]] = lambda directory: ()
) -> Iterator[str]:
  """A directory to fill, which becomes the target when the block ends well, and vanishes otherwise.

  Args:
    target: may be missing or empty; links are followed.
    overwrite: whether it may hold something.
    outdated: the old directory -> names in it that the new one does without. All else in it is kept.

  Yields:
    The path of the directory to fill.

  Raises:
    SaveError: if the target exists and may not be replaced, if another process is writing it, or if the file
      system refuses: full, read-only, not permitted. The target is as it was.
  """
  target = os.path.realpath(os.path.expanduser(target))
  with save_errors(target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with _locked(target) as alone:
      if alone:
        _clean(target)
      _check_target(target, overwrite)
      building = _hidden(target, "saving")
      os.mkdir(building)
      try:
        yield building
        exists = os.path.lexists(target)
        if exists:
          _check_target(target, overwrite)
          kept = set(os.listdir(target)) - set(outdated(target))
          for name in kept - set(os.listdir(building)):
            _link(os.path.join(target, name), os.path.join(building, name))
          shutil.copymode(target, building)
        sync_directory(building)
        if exists:
          seen = set(os.listdir(target))
          _exchange(building, target)
          # What appeared in the last moment.
          for name in set(os.listdir(building)) - seen - set(os.listdir(target)):
            _link(os.path.join(building, name), os.path.join(target, name))
        else:
          os.rename(building, target)
          sync_directory(os.path.dirname(target))
      finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def save_errors(target: str) -> Iterator[None]:
  """Turns what a file system refuses into a SaveError."""
  try:
    yield
  except ModelsError:
    raise
  except OSError as error:
    raise SaveError(
      f"{target} cannot be written: {error.strerror or error}"
      + (f" ({error.filename})" if error.filename else "")
      + f"; what was there before is unchanged.{_REMEDIES.get(error.errno or 0, '')}",
      error.errno,
    ) from error


_REMEDIES = {
  errno.ENOSPC: " Free space: old and new lie beside each other until the new one is complete",
  errno.EDQUOT: " Free space: old and new lie beside each other until the new one is complete",
  errno.EFBIG: " Raise the limit of a file's size, or give a smaller max_shard_size",
  errno.EACCES: " The directory that holds it must be writable, too",
  errno.EPERM: " The directory that holds it must be writable, too",
  errno.EROFS: " The file system is read-only",
}


def recover(target: str) -> None:
  """Finishes what a process that was killed between two renames left of a directory. Else does nothing."""
  target = os.path.realpath(os.path.expanduser(target))
  if not os.path.lexists(target) and _leftovers(target):
    with save_errors(target), _locked(target) as alone:
      if alone:
        _clean(target)


def sync_directory(path: str) -> None:
  """Puts a directory's entries on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):  # some file systems have no such step
      raise
  finally:
    os.close(descriptor)


def _check_target(target: str, overwrite: bool) -> None:
  if not os.path.lexists(target):
    return
  if not os.path.isdir(target):
    raise SaveError(f"{target} is no directory: give another path", errno.ENOTDIR)
  if not overwrite and os.listdir(target):
    raise SaveError(f"{target} exists: give another path, or overwrite=True to replace it", errno.EEXIST)


def _hidden(target: str, stage: str) -> str:
  directory, name = os.path.split(target)
  return os.path.join(directory, f".{name}.{stage}-{secrets.token_hex(8)}")


def _leftovers(target: str) -> dict[str, list[str]]:
  """Hidden directories of this target by stage."""
  directory, name = os.path.split(target)
  pattern = re.compile(rf"\.{re.escape(name)}\.({'|'.join(_STAGES)})-[0-9a-f]{{16}}")
  found: dict[str, list[str]] = {}
  with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
    for entry in os.scandir(directory):
      if (match := pattern.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False):
        found.setdefault(match[1], []).append(entry.path)
  return found


def _clean(target: str) -> None:
  """Finishes or removes what killed processes left. Only under the lock."""
  found = _leftovers(target)
  if not os.path.lexists(target):
    for path in [*found.get("complete", []), *found.get("replaced", [])][:1]:
      os.rename(path, target)
      sync_directory(os.path.dirname(target))
  for paths in _leftovers(target).values():
    for path in paths:
      shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(target: str) -> Iterator[bool]:
  """Keeps other writers off a target. False where the file system has no locks.

  Raises:
    SaveError: if another process holds the lock.
  """
  directory, name = os.path.split(target)
  path = os.path.join(directory, f".{name}.saving.lock")
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      alone = _lock(descriptor, target)
      # Whoever held the lock before removes the file: then this descriptor is of a file without a name.
      if not alone or _is_at(descriptor, path):
        try:
          yield alone
        finally:
          with contextlib.suppress(OSError):
            os.unlink(path)
        return
    finally:
      os.close(descriptor)


def _lock(descriptor: int, target: str) -> bool:
  if fcntl is None:
    return False
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      raise SaveError(f"another process is writing {target}: wait for it, or give another path") from None
    return False
  return True


def _is_at(descriptor: int, path: str) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def _link(source: str, target: str) -> None:
  """A file or a tree of files under a second name; a copy where there are no hard links."""
  mode = os.lstat(source).st_mode
  if stat.S_ISLNK(mode):
    os.symlink(os.readlink(source), target)
  elif stat.S_ISDIR(mode):
    os.mkdir(target)
    for name in os.listdir(source):
      _link(os.path.join(source, name), os.path.join(target, name))
    shutil.copystat(source, target)
    sync_directory(target)
  else:
    try:
      os.link(source, target)
    except OSError as error:
      if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS):
        raise
      shutil.copy2(source, target)
      with open(target, "rb") as copy:
        os.fsync(copy.fileno())


def _exchange(building: str, target: str) -> None:
  """Puts the new directory in the place of the old one, which then lies where the new one lay."""
  parent = os.path.dirname(target)
  if _rename_exchange(building, target):
    sync_directory(parent)
    return
  complete, replaced = _hidden(target, "complete"), _hidden(target, "replaced")
  os.rename(building, complete)
  sync_directory(parent)
  os.rename(target, replaced)
  try:
    os.rename(complete, target)
  except OSError:
    os.rename(replaced, target)
    os.rename(complete, building)
    raise
  sync_directory(parent)
  os.rename(replaced, building)


def _rename_exchange(a: str, b: str) -> bool:
  """Two directories change places in one step; False where the system has no such step."""
  try:
    rename = ctypes.CDLL(None, use_errno=True).renameat2
  except (AttributeError, OSError, TypeError):
    return False
  if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
    return True
  number = ctypes.get_errno()
  if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
    return False
  raise OSError(number, os.strerror(number), b)
