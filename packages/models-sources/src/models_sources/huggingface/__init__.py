"""Repositories of the Hugging Face hub, or of another hub that speaks its protocol (`HF_ENDPOINT`).

A revision is resolved to a commit once, when the files are opened; every later read is of that commit, even if the
branch moves. Headers are read as byte ranges. `fetch` downloads whole files into the cache that `huggingface_hub`
shares between all programs, and checks each against the hub's hash.

Cached files are not requested again. Offline (`HF_HUB_OFFLINE=1`) no request is made at all.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from models_sources.disk import read_errors, write_errors
from models_sources.errors import (
  ConnectionFailedError,
  CorruptFilesError,
  FilesNotFoundError,
  InvalidNameError,
  SourceError,
)
from models_sources.huggingface import xet
from models_sources.huggingface.cache import FULL_COMMIT, Entry, RepoCache, entry_of
from models_sources.huggingface.digest import is_intact, is_intact_file
from models_sources.huggingface.errors import Subject, public_address, translate
from models_sources.huggingface.ranges import read_range
from models_sources.names import check_name, missing_files
from models_sources.retry import Policy, with_retries

T = TypeVar("T")

POLICY = Policy()
# If the cache knows the revision, a hub that is down is not waited for long.
FALLBACK_POLICY = dataclasses.replace(POLICY, attempts=2)

_ELSEWHERE = "give another download_path, or set HF_HUB_CACHE"
_PARALLEL_DOWNLOADS = 8
_TRUE = {"1", "ON", "YES", "TRUE"}

_log = logging.getLogger(__name__)


def is_offline() -> bool:
  """Whether the user forbids requests. The variable counts even if it is set after `huggingface_hub` was imported."""
  return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def _endpoint() -> str:
  return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@dataclasses.dataclass(frozen=True)
class _Hub:
  """The requests about one repository; each translates its errors and retries."""

  repo: str
  revision: str
  endpoint: str
  token: str | bool | None = dataclasses.field(repr=False)

  def ask(self, action: Callable[[dict[str, Any]], T], policy: Policy, what: str = "the list of files") -> T:
    """Calls `action` with the arguments that all functions of the client take; translates its errors and retries."""
    subject = Subject(self.repo, self.revision, public_address(self.endpoint), what)

    def attempt() -> T:
      try:
        return action({**_sender(), "token": self.token})
      except Exception as error:
        translated = translate(error, subject)
        if translated is error:
          raise
        # The original error may quote a signed address.
        raise translated from None

    return with_retries(attempt, policy)

  def info(self, policy: Policy) -> tuple[str, dict[str, Entry]]:
    """Resolves the revision to a commit and lists its files."""

    def action(sender: dict[str, Any]) -> Any:
      api = HfApi(endpoint=self.endpoint, **sender)
      timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
      return api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=timeout)

    info = self.ask(action, policy)
    if not FULL_COMMIT.fullmatch(info.sha or ""):
      raise SourceError(
        f"{public_address(self.endpoint)} states no commit for {self.repo}: check HF_ENDPOINT"
      )
    return info.sha, {check_name(s.rfilename): entry_of(s) for s in info.siblings or ()}


@functools.cache
def _sender() -> dict[str, str]:
  return {"library_name": "models-sources", "library_version": importlib.metadata.version("models-sources")}


@dataclasses.dataclass(frozen=True)
class HubFiles:
  """The files of one commit of one repository.

  Attributes:
    hub: makes the requests.
    commit: the full hash of the commit.
    cache: where downloads are kept.
    listing: all files of the commit by name; None if the hub cannot be reached and the cache is all there is.
    unreachable: why the hub cannot be reached, for messages; empty if it can.
    progress: whether downloads show progress bars.
  """

  hub: _Hub
  commit: str
  cache: RepoCache
  listing: Mapping[str, Entry] | None = dataclasses.field(repr=False)
  unreachable: str = ""
  progress: bool = True

  @property
  def revision(self) -> str:
    """The commit."""
    return self.commit

  @property
  def path(self) -> str:
    """The directory that `fetch` puts the files in. It exists once a file of the commit is cached."""
    return str(self.cache.snapshot(self.commit))

  def names(self) -> Sequence[str]:
    """Sorted names of all files of the commit, or of the cached ones if the hub cannot be reached."""
    return self.cache.files(self.commit) if self.listing is None else sorted(self.listing)

  def locate(self, name: str) -> str | None:
    """The path of a file in the cache; None if it is not cached."""
    path = self._cached(name)
    return None if path is None else str(path)

  def size(self, name: str) -> int:
    """Bytes of a file."""
    if (path := self._cached(name)) is not None:
      with read_errors(path):
        return path.stat().st_size
    if (size := self._entries([name])[name].size) is not None:
      return size

    def head(sender: dict[str, Any]) -> int | None:
      timeout = constants.HF_HUB_ETAG_TIMEOUT
      return get_hf_file_metadata(self._url(name), timeout=timeout, endpoint=self.hub.endpoint, **sender).size

    if (size := self.hub.ask(head, POLICY, name)) is None:
      raise SourceError(
        f"{public_address(self.hub.endpoint)} does not state the size of {name} of {self.hub.repo}: check HF_ENDPOINT"
      )
    return size

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer where it ends before `stop`; from the cache if the file is cached.

    Raises:
      FilesNotFoundError: there is no such file, or the hub cannot be reached and the file is not cached.
      ConnectionFailedError: the bytes could not be read, after all retries.
      CorruptFilesError: a whole file was read twice, and neither copy matches the hub's hash.
    """
    if (path := self._cached(name)) is not None:
      with read_errors(path), path.open("rb") as file:
        file.seek(start)
        return file.read(max(0, stop - start))
    entry = self._entries([name])[name]
    end = stop if entry.size is None else min(stop, entry.size)
    if start >= end:
      return b""

    def get(sender: dict[str, Any]) -> bytes:
      timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
      headers = build_hf_headers(**sender)
      return read_range(self._url(name), start, end, headers=headers, timeout=timeout, size=entry.size)

    for _ in range(2):
      data = self.hub.ask(get, POLICY, name)
      if (start, end) != (0, entry.size) or is_intact(entry, len(data), [data]):
        return data
    raise self._corrupt(name)

  def fetch(self, names: Sequence[str]) -> str:
    """Downloads the named files that are not cached, and returns the directory that holds them.

    Raises:
      FilesNotFoundError: the commit (offline: the cache) lacks some files; the message names all of them.
      AccessError: the repository is gated, or the token may not read it.
      ConnectionFailedError: a file could not be downloaded, after all retries.
      CorruptFilesError: a file was downloaded twice, and neither copy matches the hub's hash.
      DiskError: the cache cannot be written, for example because the disk is full.
    """
    wanted = {name: entry for name, entry in self._entries(names).items() if self._cached(name) is None}
    if wanted:
      nbytes = sum(entry.size or 0 for entry in wanted.values())
      with (
        write_errors(self.cache.folder, self.hub.repo, nbytes or None, _ELSEWHERE),
        concurrent.futures.ThreadPoolExecutor(min(_PARALLEL_DOWNLOADS, len(wanted))) as pool,
      ):
        downloads = [pool.submit(self._download, name, entry) for name, entry in wanted.items()]
        try:
          for download in concurrent.futures.as_completed(downloads):
            download.result()
        except BaseException:
          pool.shutdown(wait=False, cancel_futures=True)
          raise
    if names and self.listing is not None:
      self.cache.remember(self.hub.revision, self.commit, self.listing)
    return self.path

  def is_same(self, name: str, path: str | os.PathLike) -> bool:
    """Whether a file on this machine has the size and the hash that the hub states for one of its files.

    Raises:
      FilesNotFoundError: there is no such file in the commit.
    """
    entry = self._entries([name])[name]
    with read_errors(pathlib.Path(path)):
      return is_intact_file(entry, pathlib.Path(path))

  def _entries(self, names: Sequence[str]) -> dict[str, Entry]:
    """The listing's entries of the named files.

    Raises:
      FilesNotFoundError: as `fetch`.
    """
    for name in names:
      check_name(name)
    place = f"{self.hub.repo} at commit {self.commit}"
    if self.listing is not None:
      if absent := [name for name in names if name not in self.listing]:
        raise missing_files(place, absent, self.listing)
      return {name: self.listing[name] for name in names}
    if absent := [name for name in names if self._cached(name) is None]:
      raise FilesNotFoundError(
        f"{', '.join(absent)} of {place}: not in the cache {self.cache.folder.parent}, and {self.unreachable}"
      )
    return {name: Entry(None) for name in names}

  def _cached(self, name: str) -> pathlib.Path | None:
    with read_errors(self.cache.folder):
      return self.cache.file(self.commit, check_name(name))

  def _url(self, name: str) -> str:
    return hf_hub_url(self.hub.repo, name, revision=self.commit, endpoint=self.hub.endpoint)

  def _corrupt(self, name: str) -> CorruptFilesError:
    return CorruptFilesError(
      f"{name} of {self.hub.repo} at commit {self.commit} was downloaded twice, and neither copy matches the hub's "
      "hash: check the proxy and the disk"
    )

  def _download(self, name: str, entry: Entry) -> None:
    is_new = not self.cache.has_blob(entry)

    def get(sender: dict[str, Any], *, force: bool) -> None:
      with xet.watched(f"{name} of {self.hub.repo}", self.progress) as bar:
        hf_hub_download(
          self.hub.repo,
          name,
          revision=self.commit,
          cache_dir=self.cache.folder.parent,
          endpoint=self.hub.endpoint,
          force_download=force,
          tqdm_class=bar,
          **sender,
        )

    for force in (False, True):
      self.hub.ask(functools.partial(get, force=force), POLICY, name)
      if not is_new or self._is_intact_or_removed(name, entry):
        return
    raise self._corrupt(name)

  def _is_intact_or_removed(self, name: str, entry: Entry) -> bool:
    """Checks a file that was just downloaded; removes the link and the blob of a corrupt one from the cache."""
    link = self.cache.snapshot(self.commit) / name
    # A file that disappears meanwhile was removed by another process that found it corrupt, too.
    with contextlib.suppress(FileNotFoundError):
      blob = link.parent / link.readlink() if link.is_symlink() else link
      before = blob.stat()
      if is_intact_file(entry, blob):
        return True
      # Another process may already have replaced the corrupt blob.
      if os.path.samestat(blob.stat(), before):
        link.unlink()
        blob.unlink(missing_ok=True)
    return False


def open_files(
  identifier: str,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  download_path: str | None = None,
  progress: bool = True,
) -> HubFiles:
  """Opens a model repository at the commit that the revision points to.

  Makes one request, or none if the revision is a full commit hash whose files have been fetched before, or offline.
  If the hub cannot be reached, the revision's last commit in the cache is used, and a warning is logged.

  Args:
    identifier: `organisation/name`.
    revision: branch, tag or commit; None is `main`.
    token: of the user's account; None takes HF_TOKEN or the saved token if there is one, True requires one, False
      sends none.
    download_path: directory of the cache; None is the one that all programs share (`HF_HUB_CACHE`).
    progress: whether downloads of these files show progress bars.

  Raises:
    InvalidNameError: the identifier is not a repository id, or the revision is not a valid name.
    FilesNotFoundError: there is no such repository or revision; offline: it is not in the cache.
    AccessError: the hub rejects the token, the token may not read the repository, or this user not the cache.
    ConnectionFailedError: the hub cannot be reached, after all retries, and the revision is not in the cache.
  """
  try:
    validate_repo_id(identifier)
  except HFValidationError:
    raise InvalidNameError(
      f"{identifier!r} is not a repository id: write organisation/name, or use the source 'local' for a directory"
    ) from None
  asked = check_name(constants.DEFAULT_REVISION if revision is None else revision, "revision")
  hub = _Hub(identifier, asked, _endpoint(), token)
  cache = RepoCache.of(identifier, download_path)
  with read_errors(cache.folder):
    known = cache.resolve(asked)
  if is_offline():
    if known is None:
      raise FilesNotFoundError(
        f"{identifier} at revision {asked} is not in the cache {cache.folder.parent}, and HF_HUB_OFFLINE forbids "
        "requests to the hub: unset it, or fetch the files once with a connection"
      )
    return HubFiles(hub, known, cache, None, "HF_HUB_OFFLINE forbids requests to the hub: unset it", progress)
  if known == asked and (listing := cache.listing(asked)) is not None:
    return HubFiles(hub, asked, cache, listing, progress=progress)
  try:
    commit, found = hub.info(POLICY if known is None else FALLBACK_POLICY)
  except ConnectionFailedError as error:
    if known is None:
      raise
    _log.warning("%s; using commit %s of %s from the cache", error, known, identifier)
    return HubFiles(hub, known, cache, None, f"the hub could not be reached: {error}", progress)
  return HubFiles(hub, commit, cache, found, progress=progress)
