"""Reads a byte range of a remote file over HTTP: follows redirects and checks the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub.utils import get_session, hf_raise_for_status

from models_sources.errors import ConnectionFailedError, SourceError

_MAX_REDIRECTS = 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_PORTS = {"http": 80, "https": 443}


def read_range(
  url: str, start: int, stop: int, *, headers: Mapping[str, str], timeout: float, size: int | None
) -> bytes:
  """Bytes `[start, stop)` of a file, fewer only where the file ends before `stop`.

  Args:
    url: of the file.
    start: first byte.
    stop: one past the last byte, greater than `start`.
    headers: of the request; Authorization is sent only to the origin of `url`.
    timeout: seconds without a byte after which the request fails.
    size: bytes of the file; None if unknown.

  Raises:
    ConnectionFailedError: the answer ends early.
    SourceError: the answer is compressed, holds another range, states another size of the file, or is one redirect
      too many.
    Exception: any error of the HTTP client or of `hf_raise_for_status`.
  """
  sent = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
  place = url
  for _ in range(_MAX_REDIRECTS):
    with get_session().stream("GET", place, headers=sent, timeout=timeout, follow_redirects=False) as answer:
      if not answer.has_redirect_location:
        if answer.status_code == 416 and size is None:
          return b""  # the file ends before `start`
        hf_raise_for_status(answer)
        return _body(answer, start, stop, size)
      target = urljoin(place, answer.headers["Location"])
      if _origin(target) != _origin(place):
        sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
      place = target
  raise SourceError(
    f"more than {_MAX_REDIRECTS} redirects for a byte range of {urlsplit(url).path}: check HF_ENDPOINT and the "
    "proxy settings"
  )


def _origin(url: str) -> tuple[str, str | None, int | None]:
  parts = urlsplit(url)
  return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _body(answer: Any, start: int, stop: int, size: int | None) -> bytes:
  file = urlsplit(str(answer.request.url)).path
  if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
    raise SourceError(
      f"a byte range of {file} came compressed, although the hub never does that: check the proxy settings"
    )
  if answer.status_code == 206:
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    total = size if match is None or match[3] == "*" else int(match[3])
    end = stop if total is None else min(stop, total)
    if match is None or (int(match[1]), int(match[2]) + 1) != (start, end):
      got = answer.headers.get("Content-Range", "no Content-Range")
      raise SourceError(
        f"bytes {start}-{end - 1} of {file} were requested, but the answer has {got}: check the proxy settings"
      )
    skip = 0
  else:
    # The server ignores ranges and sends the whole file.
    length = answer.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else size
    end = stop if total is None else min(stop, total)
    skip = start
  if size is not None and total != size:
    raise SourceError(
      f"{file} has {total} bytes, but the hub's list of files says {size}: check the proxy settings"
    )
  data, position = bytearray(), start - skip
  for block in answer.iter_raw():
    data += block[max(0, start - position) : max(0, end - position)]
    position += len(block)
    if position >= end:
      break  # leaving the context closes the connection, so the rest is not sent
  expected = max(0, end - start)
  # If the size of the file is unknown, the end of the answer is taken as the end of the file.
  if len(data) < expected and total is not None:
    raise ConnectionFailedError(f"the connection closed after {len(data)} of {expected} bytes of {file}")
  return bytes(data)
