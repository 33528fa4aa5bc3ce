"""Models of Kaggle, such as `google/gemma-2/flax/gemma2-2b-it`, in the cache that `kagglehub` shares between programs.

`kagglehub` provides the credentials (KAGGLE_API_TOKEN, KAGGLE_USERNAME and KAGGLE_KEY, ~/.kaggle), the requests and
the layout of the cache. This module adds what it lacks: a version is pinned when the files are opened; requests time
out and are retried; a file is complete or absent, with the size and MD5 that Kaggle states; processes that want the
same version wait for each other. There is no interactive login.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from models_sources.disk import local_directory, read_errors, write_errors
from models_sources.errors import (
  AccessError,
  ConnectionFailedError,
  CorruptFilesError,
  FilesNotFoundError,
  InvalidNameError,
  MissingClientError,
  SourceError,
)
from models_sources.names import check_name, missing_files
from models_sources.retry import Policy, with_retries

try:
  import filelock
  import requests
  from kagglehub.cache import get_cached_path
  from kagglehub.config import get_cache_folder, get_kaggle_credentials
  from kagglehub.handle import ModelHandle
  from kagglehub.integrity import get_md5_checksum_from_response
  from kagglesdk.kaggle_client import KaggleClient
  from kagglesdk.kaggle_env import get_env
  from kagglesdk.models.types.model_api_service import (
    ApiDownloadModelInstanceVersionRequest,
    ApiGetModelInstanceRequest,
    ApiListModelInstanceVersionFilesRequest,
  )
  from requests.adapters import HTTPAdapter
except ModuleNotFoundError as error:
  raise MissingClientError(
    f"Kaggle needs the package {error.name}", "models-sources[kaggle]", error.name
  ) from error

T = TypeVar("T")

POLICY = Policy()
# Seconds to connect, and seconds without a byte of the answer.
TIMEOUT = (10.0, 30.0)

_PARALLEL_DOWNLOADS = 4
_PAGE = 200
_BLOCK = 1 << 20
_LATER = frozenset({408, 429, 500, 502, 503, 504})
_HANDLE = re.compile(r"([\w.-]+)/([\w.-]+)/(\w+)/([\w.-]+)(?:/(\d+))?")

_ELSEWHERE = "give another download_path, or set KAGGLEHUB_CACHE"

_log = logging.getLogger(__name__)


class _Patient(HTTPAdapter):
  """Connections that give up after TIMEOUT; the client itself sets no time-outs."""

  def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
    return super().send(request, *args, **{**kwargs, "timeout": TIMEOUT})


@dataclasses.dataclass(frozen=True)
class _Kaggle:
  """The requests about one variation of a model; each translates its errors and retries."""

  handle: ModelHandle
  token: str | bool | None = dataclasses.field(repr=False)

  @property
  def page(self) -> str:
    """Address of the web page on which the licence is accepted."""
    return f"https://www.kaggle.com/models/{self.handle.owner}/{self.handle.model}"

  @contextlib.contextmanager
  def _client(self) -> Iterator[Any]:
    own = get_kaggle_credentials() if self.token is None else None
    client = KaggleClient(
      env=get_env(),
      username=own.username if own else None,
      password=own.key if own else None,
      api_token=self.token if isinstance(self.token, str) else own.api_key if own else None,
      user_agent=f"models-sources/{importlib.metadata.version('models-sources')}",
    )
    with client:
      session = client.http_client()._init_session()
      for scheme in ("http://", "https://"):
        session.mount(scheme, _Patient())
      if self.token is False:
        session.auth = None
      yield client.models.model_api_client

  def ask(self, action: Callable[[Any], T], what: str) -> T:
    """Calls `action` with the client's API; translates its errors and retries."""

    def attempt() -> T:
      try:
        with self._client() as api:
          return action(api)
      except (requests.RequestException, ValueError, OSError) as error:
        translated = self._translate(error, what)
        if translated is error:
          raise
        # The original error may quote a signed address.
        raise translated from None

    return with_retries(attempt, POLICY)

  def _request(self, kind: Any) -> Any:
    request = kind()
    request.owner_slug = self.handle.owner
    request.model_slug = self.handle.model
    request.framework = self.handle.framework_enum()
    request.instance_slug = self.handle.variation
    return request

  def version(self) -> int:
    """The number of the newest version."""
    request = self._request(ApiGetModelInstanceRequest)
    return self.ask(lambda api: api.get_model_instance(request), "the newest version").version_number

  def listing(self) -> dict[str, int]:
    """The size of every file of the version, in bytes, by name."""
    request = self._request(ApiListModelInstanceVersionFilesRequest)
    request.version_number = self.handle.version
    request.page_size = _PAGE
    files: dict[str, int] = {}
    while True:
      page = self.ask(lambda api: api.list_model_instance_version_files(request), "the list of files")
      files |= {check_name(file.name): file.size for file in page.files}
      if not page.next_page_token:
        return files
      request.page_token = page.next_page_token

  def download(self, name: str, size: int, path: str) -> bool:
    """Downloads a file beside `path`, checks it and renames it. Returns False if it does not match size and MD5."""
    request = self._request(ApiDownloadModelInstanceVersionRequest)
    request.version_number = self.handle.version
    request.path = name
    draft = f"{path}.part"
    os.makedirs(os.path.dirname(path), exist_ok=True)

    def get(api: Any) -> bool:
      with api.download_model_instance_version(request) as response, open(draft, "wb") as file:
        digest, count = hashlib.md5(usedforsecurity=False), 0
        for block in response.iter_content(_BLOCK):
          file.write(block)
          digest.update(block)
          count += len(block)
        file.flush()
        os.fsync(file.fileno())
        stated = get_md5_checksum_from_response(response)
      return count == size and stated in (None, base64.b64encode(digest.digest()).decode())

    try:
      if self.ask(get, name):
        os.replace(draft, path)
        return True
      return False
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)

  def _translate(self, error: Exception, what: str) -> Exception:
    response = getattr(error, "response", None)
    if isinstance(error, requests.HTTPError) and response is not None:
      return self._of_status(response, what)
    if isinstance(
      error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    ):
      kind = type(error).__name__
      return ConnectionFailedError(f"no connection to Kaggle for {what} of {self.handle} ({kind})")
    if isinstance(error, requests.exceptions.JSONDecodeError):
      return SourceError(
        f"the answer about {what} of {self.handle} does not come from Kaggle: check the proxy settings"
      )
    return error

  def _of_status(self, response: Any, what: str) -> SourceError:
    status = response.status_code
    if status in _LATER:
      later = ConnectionFailedError(f"Kaggle answers {status} about {what} of {self.handle}: try later")
      seconds = response.headers.get("Retry-After", "")
      later.retry_after = float(seconds) if seconds.isdigit() else None
      return later
    if status in (401, 403):
      return AccessError(
        f"Kaggle denies access to {what} of {self.handle}: accept the licence at {self.page}, and set "
        "KAGGLE_USERNAME and KAGGLE_KEY, or KAGGLE_API_TOKEN, for the account that accepted it"
      )
    if status == 404:
      return FilesNotFoundError(
        f"Kaggle does not have {what} of {self.handle}: see the variations at {self.page}"
      )
    return SourceError(f"Kaggle answers {status} about {what} of {self.handle}")


@dataclasses.dataclass(frozen=True)
class KaggleFiles:
  """The files of one version of one variation of a model.

  Attributes:
    path: the directory of the version in the cache.
    sizes: of all files in bytes, by name.
  """

  path: str
  sizes: Mapping[str, int] = dataclasses.field(repr=False)
  _kaggle: _Kaggle = dataclasses.field(repr=False)

  @property
  def revision(self) -> str:
    """The number of the version."""
    return str(self._kaggle.handle.version)

  def names(self) -> Sequence[str]:
    """Sorted names of all files of the version."""
    return sorted(self.sizes)

  def size(self, name: str) -> int:
    """Bytes of a file."""
    self._check([name])
    return self.sizes[name]

  def locate(self, name: str) -> str:
    """The path of a file. Fetches the file first, because Kaggle serves whole files only."""
    return os.path.join(self.fetch([name]), name)

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file. Fetches the file first, because Kaggle serves whole files only."""
    path = self.locate(name)
    with read_errors(path), open(path, "rb") as file:
      file.seek(start)
      return file.read(max(0, stop - start))

  def fetch(self, names: Sequence[str]) -> str:
    """Downloads the named files that are not cached, and returns the directory that holds them.

    Raises:
      FilesNotFoundError: the version lacks some files; the message names all of them.
      AccessError: the licence is not accepted, or there are no credentials.
      ConnectionFailedError: a file could not be downloaded, after all retries.
      CorruptFilesError: a file was downloaded twice, and neither copy has the size and MD5 that Kaggle states.
    """
    self._check(names)
    if all(self._is_here(name) for name in names):
      return self.path
    nbytes = sum(self.sizes[name] for name in names if not self._is_here(name))
    with write_errors(self.path, str(self._kaggle.handle), nbytes, _ELSEWHERE):
      return self._fetch(names)

  def _fetch(self, names: Sequence[str]) -> str:
    os.makedirs(os.path.dirname(self.path), exist_ok=True)
    with filelock.FileLock(f"{self.path}.lock"):
      # Another process may have fetched them while this one waited for the lock.
      wanted = [name for name in names if not self._is_here(name)]
      with concurrent.futures.ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
        downloads = [pool.submit(self._download, name) for name in wanted]
        try:
          for download in concurrent.futures.as_completed(downloads):
            download.result()
        except BaseException:
          pool.shutdown(wait=False, cancel_futures=True)
          raise
      if all(self._is_here(name) for name in self.sizes):
        # kagglehub takes this marker as the sign of a complete download.
        with open(f"{self.path}.complete", "ab"):
          pass
    return self.path

  def _check(self, names: Sequence[str]) -> None:
    if absent := [name for name in names if check_name(name) not in self.sizes]:
      raise missing_files(str(self._kaggle.handle), absent, self.sizes)

  def _is_here(self, name: str) -> bool:
    path = os.path.join(self.path, name)
    return os.path.isfile(path) and os.path.getsize(path) == self.sizes[name]

  def _download(self, name: str) -> None:
    path = os.path.join(self.path, name)
    if not any(self._kaggle.download(name, self.sizes[name], path) for _ in range(2)):
      raise CorruptFilesError(
        f"{name} of {self._kaggle.handle} was downloaded twice, and neither copy has the size and MD5 that Kaggle "
        "states: check the proxy and the disk"
      )


def open_files(
  identifier: str,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  download_path: str | None = None,
  progress: bool = True,
) -> KaggleFiles:
  """Opens one version of a variation of a model; the newest one if none is given.

  A version that is cached completely needs no request for its list of files. If Kaggle cannot be reached, the newest
  such version is used, and a warning is logged.

  Args:
    identifier: `owner/model/framework/variation`, with or without `/version`.
    revision: number of the version; None takes the identifier's, else the newest.
    token: an API token, as in KAGGLE_API_TOKEN; None takes the credentials that kagglehub finds, False sends none.
    download_path: directory of the cache; None is the one that all programs share (`KAGGLEHUB_CACHE`).
    progress: has no effect: no bars are shown.

  Raises:
    InvalidNameError: the identifier is not a Kaggle handle, or the revision is not the number of one version.
    FilesNotFoundError: there is no such variation or version.
    AccessError: the licence is not accepted, or there are no credentials.
    ConnectionFailedError: Kaggle cannot be reached, after all retries, and no version is cached completely.
  """
  found = _HANDLE.fullmatch(identifier)
  if found is None:
    raise InvalidNameError(
      f"{identifier!r} is not a Kaggle handle: write owner/model/framework/variation, such as "
      "google/gemma-2/flax/gemma2-2b-it"
    )
  version = found[5] if revision is None else revision
  if (version is not None and not (version.isdigit() and int(version))) or (found[5] and version != found[5]):
    raise InvalidNameError(
      f"{identifier} with revision={revision!r} is not one version: give a number from 1 on, in the handle or as "
      "revision"
    )
  kaggle = _Kaggle(ModelHandle(found[1], found[2], found[3], found[4], version and int(version)), token)
  root = os.path.abspath(local_directory(download_path or get_cache_folder(), "download_path"))
  if not kaggle.handle.is_versioned():
    folder = _folder(root, kaggle.handle.with_version(1))
    try:
      newest = kaggle.version()
    except ConnectionFailedError as error:
      if (cached := _newest_cached(os.path.dirname(folder))) is None:
        raise
      _log.warning("%s; using version %s from the cache", error, cached)
      newest = cached
    kaggle = dataclasses.replace(kaggle, handle=kaggle.handle.with_version(newest))
  path = _folder(root, kaggle.handle)
  is_whole = os.path.exists(f"{path}.complete") and os.path.isdir(path)
  return KaggleFiles(path, _cached_sizes(path) if is_whole else kaggle.listing(), kaggle)


def _folder(root: str, handle: ModelHandle) -> str:
  return os.path.join(root, os.path.relpath(get_cached_path(handle), get_cache_folder()))


def _newest_cached(folder: str) -> int | None:
  names = os.listdir(folder) if os.path.isdir(folder) else []
  whole = [int(stem) for name in names if (stem := name.removesuffix(".complete")).isdigit() and stem != name]
  return max(whole, default=None)


def _cached_sizes(path: str) -> dict[str, int]:
  sizes = {}
  for folder, _, names in os.walk(path):
    for name in names:
      place = os.path.join(folder, name)
      sizes[os.path.relpath(place, path).replace(os.sep, "/")] = os.path.getsize(place)
  return sizes
