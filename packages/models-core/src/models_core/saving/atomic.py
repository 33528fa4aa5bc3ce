"""Atomic replacement of a directory: whenever a process dies, either the old or the new directory is complete.

The new directory is built next to its target, under a hidden name. When it is complete and on the disk, it takes the
target's name. If the target exists, the two directories change names in one step of the file system (Linux: `renameat2`
with RENAME_EXCHANGE). On file systems without this step, the new directory is renamed to a hidden name marked
`complete`, the old one to a hidden name marked `replaced`, and then the new one to the target. If a process is killed
between these renames, `recover` finishes them.

A lock file next to the target keeps out other writers. Hidden directories that are found while the lock is held were
left by killed processes.
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

from models_core.errors import CheckpointError, ModelsError, SaveError

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]

_STAGES = ("saving", "complete", "replaced")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replace_directory(
  target: str,
  *,
  overwrite: bool = False,
  outdated: Callable[[str], Collection[str]] = lambda directory: (),
  nbytes: int | None = None,
) -> Iterator[str]:
  """Gives a directory to fill. It becomes the target if the block succeeds, and is removed otherwise.

  Args:
    target: directory to create or replace; symbolic links are followed.
    overwrite: whether the target may hold files.
    outdated: path of the old directory -> names in it that are not kept. All other files are linked or copied to the
      new directory, unless it holds files of the same names.
    nbytes: of all files that will be written, for messages.

  Yields:
    The path of the directory to fill.

  Raises:
    SaveError: if the target is no directory of this machine, holds files and `overwrite` is false, another process is
      writing it, or the file system refuses the write, such as a full disk. The target is unchanged.
  """
  check_directory(target, overwrite=overwrite, nbytes=nbytes)
  target = local_path(target)
  with save_errors(target, nbytes):
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
          # Keep files that were added to the old directory in the last moment.
          for name in set(os.listdir(building)) - seen - set(os.listdir(target)):
            _link(os.path.join(building, name), os.path.join(target, name))
        else:
          os.rename(building, target)
          sync_directory(os.path.dirname(target))
      finally:
        shutil.rmtree(building, ignore_errors=True)


# How an address begins. A `pathlib.Path` of one has a single slash; a single letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(place: str) -> str:
  """The absolute path of a directory of this machine, without symbolic links.

  Raises:
    SaveError: if the place is an address such as gs://bucket/folder, which would become a directory `gs:`, or holds a
      NUL.
  """
  if match := _ADDRESS.match(place):
    raise SaveError(
      f"{place} is an address, not a directory of this machine, and nothing is written there: write a directory"
      + (
        " without file://"
        if match[1].lower() == "file"
        else ", or give the address as a string to AutoModel.save_pretrained or convert"
      )
    )
  if "\0" in place:
    raise SaveError(f"{place!r} holds a NUL, which no path can: give another path", errno.EINVAL)
  return os.path.realpath(os.path.expanduser(place))


def check_directory(place: str, *, overwrite: bool = False, nbytes: int | None = None) -> None:
  """Checks, without writing anything, whether a directory can be saved.

  Args:
    place: path of the directory.
    overwrite: whether it may hold files.
    nbytes: of all files that will be written, for messages.

  Raises:
    SaveError: if the place is no directory, holds files and `overwrite` is false, or its parent cannot be written.
  """
  target = local_path(place)
  with save_errors(target, nbytes):
    _check_target(target, overwrite)
    parent = os.path.dirname(target)
    while not os.path.lexists(parent):
      parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
      raise SaveError(
        f"{target} cannot be written: {parent} is not a directory; give another path", errno.ENOTDIR
      )
    if not os.access(parent, os.W_OK | os.X_OK):
      frozen = hasattr(os, "statvfs") and os.statvfs(parent).f_flag & os.ST_RDONLY
      number = errno.EROFS if frozen else errno.EACCES
      raise OSError(number, os.strerror(number), parent)
    # The longest name that is used on the way.
    longest = len(os.fsencode(os.path.basename(_hidden(target, "replaced"))))
    if hasattr(os, "pathconf") and longest > os.pathconf(parent, "PC_NAME_MAX"):
      raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


@contextlib.contextmanager
def save_errors(target: str, nbytes: int | None = None) -> Iterator[None]:
  """Turns an error of the file system into one that names the file and the remedy.

  An error about the target becomes a SaveError, one about another file, which is only read, a CheckpointError. An
  OSError without a number is not of the file system, but of a source of files: it passes.

  Args:
    target: path of the directory that is written.
    nbytes: of all files that are written, for messages.
  """
  try:
    yield
  except ModelsError:
    raise
  except OSError as error:
    if error.errno is None:
      raise
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if named and not any(_belongs(name, target) for name in named):
      raise CheckpointError(named[0], [f"cannot be read: {error.strerror}"]) from error
    raise SaveError(
      f"{target} cannot be written: {error.strerror or error}"
      + (f" ({error.filename})" if error.filename else "")
      + f"; its previous contents are unchanged.{_needed(target, error.errno, nbytes)}"
      + _REMEDIES.get(error.errno, ""),
      error.errno,
    ) from error


def _needed(target: str, number: int, nbytes: int | None) -> str:
  """How much room the files need, for an error that another place would not have."""
  if nbytes is None or number not in _ROOM:
    return ""
  text = f" {nbytes:,} bytes are needed"
  with contextlib.suppress(OSError, ValueError, ImportError):
    if number == errno.ENOSPC:
      parent = os.path.dirname(os.path.realpath(target))
      text += f", and {shutil.disk_usage(parent).free:,} are free"
    elif number == errno.EFBIG:
      import resource  # only where there are such limits

      limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
      text += f", and a file may have {limit:,}" if limit != resource.RLIM_INFINITY else ""
  return text + "."


def _belongs(path: str, target: str) -> bool:
  """Whether a path is the target, lies in it or above it, or belongs to its hidden siblings."""
  path, target = os.path.abspath(path), os.path.realpath(os.path.expanduser(target))
  parent, name = os.path.split(target)
  inside = (os.path.join(target, ""), os.path.join(parent, f".{name}."))
  return path == target or path.startswith(inside) or target.startswith(os.path.join(path, ""))


# The numbers of errors for which another place, or more room, is the remedy.
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_REMEDIES = {
  errno.ENOSPC: " Free some space: the disk must hold the old and the new contents at the same time",
  errno.EDQUOT: " Free some space: the disk must hold the old and the new contents at the same time",
  errno.EFBIG: " Raise the limit on file sizes (`ulimit -f`), or give a smaller max_shard_size for safetensors",
  errno.EACCES: " Make the directory and its parent directory writable, or give another path",
  errno.EPERM: " Make the directory and its parent directory writable, or give another path",
  errno.EROFS: " Give a path on a file system that is not read-only",
  errno.ENAMETOOLONG: " Give a shorter path",
  errno.EMFILE: " Raise the limit on open files, which `ulimit -n` shows",
  errno.ENFILE: " Raise the system's limit on open files",
}


def recover(target: str) -> None:
  """Finishes the replacement of a directory if a process was killed between two renames; otherwise does nothing.

  Raises:
    SaveError: if another process is writing the target, or the file system refuses.
  """
  if "\0" in target or _ADDRESS.match(target):
    return
  target = local_path(target)
  if not os.path.lexists(target) and _leftovers(target):
    with save_errors(target), _locked(target) as alone:
      if alone:
        _clean(target)


def sync_directory(path: str) -> None:
  """Flushes the entries of a directory to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in (
      errno.EINVAL,
      errno.EBADF,
      errno.EACCES,
    ):  # some file systems cannot sync directories
      raise
  finally:
    os.close(descriptor)


def _check_target(target: str, overwrite: bool) -> None:
  if not os.path.lexists(target):
    return
  if not os.path.isdir(target):
    raise SaveError(f"{target} is not a directory: give another path", errno.ENOTDIR)
  if not overwrite and os.listdir(target):
    raise SaveError(
      f"{target} exists and is not empty: give another path, or overwrite=True to replace it", errno.EEXIST
    )


def _hidden(target: str, stage: str) -> str:
  directory, name = os.path.split(target)
  return os.path.join(directory, f".{name}.{stage}-{secrets.token_hex(8)}")


def _leftovers(target: str) -> dict[str, list[str]]:
  """Paths of the hidden directories of this target, by stage."""
  directory, name = os.path.split(target)
  pattern = re.compile(rf"\.{re.escape(name)}\.({'|'.join(_STAGES)})-[0-9a-f]{{16}}")
  found: dict[str, list[str]] = {}
  # A parent that cannot be listed cannot be written either; other steps say so.
  with contextlib.suppress(OSError):
    for entry in os.scandir(directory):
      if (match := pattern.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False):
        found.setdefault(match[1], []).append(entry.path)
  return found


def _clean(target: str) -> None:
  """Finishes the renames of killed processes and removes their hidden directories. Needs the lock."""
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
  """Keeps other writers out of a target. Yields False if the file system has no locks.

  Raises:
    SaveError: if another process holds the lock.
  """
  directory, name = os.path.split(target)
  path = os.path.join(directory, f".{name}.saving.lock")
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      alone = _lock(descriptor, target)
      # The previous holder may have removed the lock file, so that this descriptor has no name: try again.
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
  """Gives a file, or a tree of files, a second name by hard links; copies on file systems without hard links."""
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
  """Exchanges the names of the new and the old directory."""
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
  """Exchanges the names of two directories in one step; False if the system has no such step."""
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
