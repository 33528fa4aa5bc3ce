"""The client library's cache on disk, as far as it is read and written without the hub.

    <cache>/models--org--name/refs/<revision>          the commit that the revision was last
                              snapshots/<commit>/      the files of a commit: links to
                              blobs/<hash>             their bytes, by the hub's hash
                              .listings/<commit>.json  names, sizes and hashes of all files of a commit

The listings are this package's own: a commit never changes, so its listing saves the question to the hub.
All is written under a temporary name and renamed; a cache that cannot be written to is still read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import uuid
from collections.abc import Mapping
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class Entry:
  """What the hub says about a file.

  Attributes:
    size: bytes, None where the hub doesn't say.
    sha256: of the bytes, for a file kept in large-file storage.
    blob_id: git's SHA-1 of the bytes, for any other file.
  """

  size: int | None
  sha256: str | None = None
  blob_id: str | None = None


@dataclasses.dataclass(frozen=True)
class RepoCache:
  """The cache's folder of one repository."""

  folder: pathlib.Path

  @classmethod
  def of(cls, repo: str, download_path: str | None) -> RepoCache:
    """The folder that the client library uses for that repository."""
    # Resolved as the client library does it, so that both name the same paths.
    root = pathlib.Path(download_path or constants.HF_HUB_CACHE).expanduser().resolve()
    return cls(root / repo_folder_name(repo_id=repo, repo_type="model"))

  def snapshot(self, commit: str) -> pathlib.Path:
    """Where the files of a commit are."""
    return self.folder / "snapshots" / commit

  def file(self, commit: str, name: str) -> pathlib.Path | None:
    """Where a file of a commit is, None if it isn't cached."""
    path = self.snapshot(commit) / name
    return path if path.is_file() else None

  def files(self, commit: str) -> list[str]:
    """Names of the cached files of a commit, sorted."""
    root = self.snapshot(commit)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

  def has_blob(self, entry: Entry) -> bool:
    """Whether the bytes are here already, perhaps for another commit."""
    return any((self.folder / "blobs" / name).exists() for name in (entry.sha256, entry.blob_id) if name)

  def resolve(self, revision: str) -> str | None:
    """The commit that a revision was last, None if the cache holds nothing of it."""
    commit = revision if FULL_COMMIT.fullmatch(revision) else _read_text(self.folder / "refs" / revision)
    return commit if commit and self.snapshot(commit).is_dir() else None

  def remember(self, revision: str, commit: str, listing: Mapping[str, Entry]) -> None:
    """Notes what a revision is and what its commit holds. Does nothing to a cache that is read-only."""
    with contextlib.suppress(OSError):
      if revision != commit:
        _write_text(self.folder / "refs" / revision, commit)
      entries = {name: dataclasses.asdict(entry) for name, entry in listing.items()}
      _write_text(self._listing(commit), json.dumps(entries, indent=1))

  def listing(self, commit: str) -> dict[str, Entry] | None:
    """What is known about all files of a commit, None if nothing is."""
    text = _read_text(self._listing(commit))
    try:
      return {name: Entry(**entry) for name, entry in json.loads(text).items()} if text else None
    except (ValueError, TypeError, AttributeError):
      return None  # a listing that cannot be read is asked for again

  def _listing(self, commit: str) -> pathlib.Path:
    return self.folder / ".listings" / f"{commit}.json"


def _read_text(path: pathlib.Path) -> str | None:
  try:
    return path.read_text(encoding="utf-8")
  except OSError:
    return None


def _write_text(path: pathlib.Path, text: str) -> None:
  if _read_text(path) == text:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(f".{uuid.uuid4().hex}.tmp")
  try:
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
  finally:
    draft.unlink(missing_ok=True)


def entry_of(sibling: Any) -> Entry:
  """The entry for a file as `HfApi.model_info(files_metadata=True)` lists it."""
  if sibling.lfs is not None:
    return Entry(sibling.lfs.size, sha256=sibling.lfs.sha256)
  return Entry(sibling.size, blob_id=sibling.blob_id)
