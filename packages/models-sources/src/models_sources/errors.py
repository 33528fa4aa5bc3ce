"""What can go wrong with a source. Each is also the built-in exception that its kind of failure has in Python."""

from __future__ import annotations


class SourceError(OSError):
  """Root of all errors of sources. The message says what, where, and what to do; it never holds a token."""


class InvalidNameError(SourceError, ValueError):
  """A source, identifier, revision or file has a name that none of its kind can have."""


class FilesNotFoundError(SourceError, FileNotFoundError):
  """There is no such directory, repository, revision or file."""


class AccessError(SourceError, PermissionError):
  """It is there, but not for this user: a licence to accept, a token to set."""


class ConnectionFailedError(SourceError, ConnectionError):
  """No answer, or one that says "later". Asking again may help.

  Attributes:
    retry_after: seconds that the other side wants to be left alone, where it said so.
  """

  retry_after: float | None = None


class CorruptFilesError(SourceError):
  """A file has other bytes than its source promises."""


class MissingClientError(ImportError):
  """The client library of a source is not installed; the message says how to install it. No `SourceError`."""
