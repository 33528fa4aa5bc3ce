"""The errors of sources. Each also derives from the built-in exception for its kind of failure."""

from __future__ import annotations

from typing import Any


class SourceError(OSError):
  """Root of all errors of sources. The message says what is wrong, where, and what to do; it never holds a token."""


class InvalidNameError(SourceError, ValueError):
  """The name of a source, checkpoint, revision or file is not a valid one."""


class FilesNotFoundError(SourceError, FileNotFoundError):
  """The directory, repository, revision or file does not exist."""


class AccessError(SourceError, PermissionError):
  """The files exist, but this user may not read them: a licence must be accepted, or a token set."""


class ConnectionFailedError(SourceError, ConnectionError):
  """No answer, or an answer that asks to try later. Another attempt may succeed.

  Attributes:
    retry_after: seconds that the server asks clients to wait; None if it does not say.
  """

  retry_after: float | None = None


class CorruptFilesError(SourceError):
  """The content of a file differs from what its source states, or the file was replaced while it was read."""


class DiskError(SourceError):
  """The file system of this machine refuses, for example because it is full.

  Attributes:
    errno: the error number of the operating system.
  """

  def __init__(self, message: str, number: int | None = None):
    super().__init__(message)
    self.errno = number

  def __reduce__(self) -> tuple[Any, ...]:
    return type(self), (str(self), self.errno), self.__dict__


class MissingClientError(ImportError):
  """The client library of a source is not installed. Not a `SourceError`.

  Attributes:
    need: what is missing, such as "Kaggle needs the package kagglehub".
    requirement: what brings it, such as "models-sources[kaggle]".
  """

  def __init__(self, need: str, requirement: str, name: str | None = None):
    super().__init__(f"{need}: install {requirement}", name=name)
    self.need = need
    self.requirement = requirement

  def __reduce__(self) -> tuple[Any, ...]:
    return type(self), (self.need, self.requirement, self.name)
