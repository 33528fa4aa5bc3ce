"""Translates the errors of `huggingface_hub` and of the HTTP client below it into a source's errors."""

from __future__ import annotations

import dataclasses
import email.utils
import importlib
import json
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import errors as hub

from models_sources.errors import (
  AccessError,
  ConnectionFailedError,
  FilesNotFoundError,
  InvalidNameError,
  SourceError,
)

# huggingface_hub uses httpx or httpx2, depending on its version; its own HTTP error derives from that client's.
_http: Any = importlib.import_module(hub.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
TransportError: type[Exception] = _http.TransportError
_ReadTimeout: type[Exception] = _http.ReadTimeout
_UnsupportedProtocol: type[Exception] = _http.UnsupportedProtocol

_LATER = frozenset({408, 429, 500, 502, 503, 504})

_GET_TOKEN = "set HF_TOKEN or pass token= for an account that may read it"
_NO_HUB = (
  "the answer of {endpoint} about {what} of {repo} is not that of a Hugging Face hub: check HF_ENDPOINT and the proxy "
  "settings"
)

# The first row that matches decides, so a class comes after its subclasses.
_BY_CLASS: tuple[tuple[type[BaseException], type[SourceError], str], ...] = (
  (hub.GatedRepoError, AccessError, "{repo} is gated: accept its licence at {page}, then " + _GET_TOKEN),
  (
    hub.RepositoryNotFoundError,
    FilesNotFoundError,
    "there is no model {repo} at {endpoint}, or it is private: check the spelling, or " + _GET_TOKEN,
  ),
  (
    hub.RevisionNotFoundError,
    FilesNotFoundError,
    "{repo} has no revision {revision}: check the spelling among its branches, tags and commits at {page}/tree/main",
  ),
  (
    hub.RemoteEntryNotFoundError,
    FilesNotFoundError,
    "{repo} has no {what} at revision {revision}: see {page}/tree/main",
  ),
  (hub.DisabledRepoError, AccessError, "{repo} is disabled by its author or by the hub: see {page}"),
  (
    hub.LocalTokenNotFoundError,
    AccessError,
    "token=True asks for the saved token, but none is saved: run `hf auth login`, set HF_TOKEN or pass the token",
  ),
  (
    hub.OfflineModeIsEnabled,
    FilesNotFoundError,
    "{what} of {repo} is not in the cache, and HF_HUB_OFFLINE forbids requests to the hub: unset it",
  ),
  (
    hub.FileMetadataError,
    SourceError,
    _NO_HUB,
  ),
  (json.JSONDecodeError, SourceError, _NO_HUB),
  (_UnsupportedProtocol, InvalidNameError, "{endpoint} is no http or https address: check HF_ENDPOINT"),
  (
    ssl.SSLCertVerificationError,
    SourceError,
    "the certificate of {endpoint} is not trusted: check SSL_CERT_FILE and the proxy settings",
  ),
)

_BY_STATUS: dict[int, tuple[type[SourceError], str]] = {
  401: (AccessError, "{answering} rejects the token for {repo}: create a new one, then " + _GET_TOKEN),
  403: (
    AccessError,
    "the token may not read {what} of {repo}: widen its permissions at {endpoint}/settings/tokens",
  ),
  404: (
    FilesNotFoundError,
    "{answering} does not have {what} of {repo} at revision {revision}: see {page}/tree/main",
  ),
}


# Predicates for exceptions that mean no answer or an incomplete one; all of these are tried again.
_NO_ANSWER: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
  (
    lambda e: isinstance(e, _ReadTimeout),
    "{endpoint} sent nothing of {what} of {repo} for a while: try later, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
  ),
  (
    lambda e: isinstance(e, TransportError),
    "no connection to {endpoint} for {what} of {repo} ({kind}): try later",
  ),
  # The client raises a bare OSError for a body of the wrong length; the OSError of a full disk has an errno.
  (
    lambda e: type(e) is OSError and e.errno is None,
    "{what} of {repo} does not have the length that the hub states",
  ),
  # After a failed connection the client closes the session that all threads share.
  (
    lambda e: isinstance(e, RuntimeError) and "closed" in str(e),
    "the connection for {what} of {repo} was closed",
  ),
  (
    lambda e: isinstance(e, hub.LocalEntryNotFoundError) and e.__cause__ is None,
    "{what} of {repo} could not be downloaded",
  ),
)


@dataclasses.dataclass(frozen=True)
class Subject:
  """What a request is about, in words for a message.

  Attributes:
    repo: id of the repository.
    revision: as the user gave it.
    endpoint: address of the hub, without credentials.
    what: name of the file, or "the list of files".
  """

  repo: str
  revision: str
  endpoint: str
  what: str = "the list of files"

  def say(self, template: str, **more: object) -> str:
    """Fills in a message template."""
    return template.format(page=f"{self.endpoint}/{self.repo}", **dataclasses.asdict(self), **more)


def public_address(url: str) -> str:
  """A URL without its user, password, query and fragment, each of which may hold a credential."""
  parts = urlsplit(url)
  return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _host(url: str) -> str:
  return urlsplit(url).netloc.rpartition("@")[2]


def _causes(error: BaseException) -> Iterator[BaseException]:
  seen: set[int] = set()
  current: BaseException | None = error
  while current is not None and id(current) not in seen:
    seen.add(id(current))
    yield current
    current = current.__cause__


def _retry_after(headers: Any) -> float | None:
  """Seconds to wait; the header holds a number of seconds or a date."""
  value = (headers.get("Retry-After") or "").strip()
  if value.isdigit():
    return float(value)
  try:
    return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
  except ValueError:
    return None


def _of_response(response: Any, subject: Subject) -> SourceError:
  """The error for an HTTP status that `_BY_CLASS` does not cover."""
  status, host = response.status_code, _host(str(response.request.url))
  # A storage host checks no tokens, only signed addresses; the next attempt gets a fresh signature.
  refused = status in (401, 403) and host != _host(subject.endpoint)
  if status in _LATER or refused:
    error = ConnectionFailedError(
      subject.say(
        "{answering} answers {status} about {what} of {repo}: try later", answering=host, status=status
      )
    )
    error.retry_after = _retry_after(response.headers)
    return error
  kind, template = _BY_STATUS.get(
    status, (SourceError, "{answering} answers {status} about {what} of {repo}")
  )
  return kind(subject.say(template, answering=host, status=status))


def translate(error: Exception, subject: Subject) -> Exception:
  """Translates an error of the client library; returns any other error unchanged.

  A message quotes only the class name of the original error, whose text may hold a signed address.
  """
  chain = list(_causes(error))
  for kind, ours, template in _BY_CLASS:
    if any(isinstance(cause, kind) for cause in chain):
      return ours(subject.say(template))
  for cause in chain:
    if isinstance(cause, hub.HfHubHTTPError):
      return _of_response(cause.response, subject)
    for fits, template in _NO_ANSWER:
      if fits(cause):
        return ConnectionFailedError(subject.say(template, kind=type(cause).__name__))
  return error
