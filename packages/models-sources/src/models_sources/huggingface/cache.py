"""The part of the client library's cache on disk that is read and written without requests to the hub.

    <cache>/models--org--name/refs/<revision>          the commit that the revision last pointed to
                              snapshots/<commit>/      the files of a commit: links to
                              blobs/<hash>             their bytes, by the hub's hash
                              .listings/<commit>.json  names, sizes and hashes of all files of a commit

The listings belong to this package alone: a commit never changes, so a saved listing saves a request to the hub.
Files are written under a temporary name and renamed; a read-only cache is still read.
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

from models_sources.disk import local_directory

FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class Entry:
  """What the hub says about a file.

  Attributes:
    size: in bytes; None if the hub does not state it.
    sha256: of the content, for a file in large-file storage.
    blob_id: git's SHA-1 of the content, for any other file.
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
    """The cache folder that the client library uses for that repository."""
    # Resolved as the client library resolves it, so that both use the same paths.
    place = download_path or constants.HF_HUB_CACHE
    root = pathlib.Path(local_directory(place, "download_path or HF_HUB_CACHE")).resolve()
    return cls(root / repo_folder_name(repo_id=repo, repo_type="model"))

  def snapshot(self, commit: str) -> pathlib.Path:
    """Where the files of a commit are."""
    return self.folder / "snapshots" / commit

  def file(self, commit: str, name: str) -> pathlib.Path | None:
    """The path of a file of a commit; None if it is not cached."""
    path = self.snapshot(commit) / name
    return path if path.is_file() else None

  def files(self, commit: str) -> list[str]:
    """Sorted names of the cached files of a commit."""
    root = self.snapshot(commit)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

  def has_blob(self, entry: Entry) -> bool:
    """Whether the content is cached already, perhaps for another commit."""
    return any((self.folder / "blobs" / name).exists() for name in (entry.sha256, entry.blob_id) if name)

  def resolve(self, revision: str) -> str | None:
    """The commit that a revision last pointed to; None if nothing of that commit is cached."""
    commit = revision if FULL_COMMIT.fullmatch(revision) else _read_text(self.folder / "refs" / revision)
    return commit if commit and self.snapshot(commit).is_dir() else None

  def remember(self, revision: str, commit: str, listing: Mapping[str, Entry]) -> None:
    """Saves the commit of a revision and the listing of the commit. Does nothing to a read-only cache."""
    with contextlib.suppress(OSError):
      if revision != commit:
        _write_text(self.folder / "refs" / revision, commit)
      entries = {name: dataclasses.asdict(entry) for name, entry in listing.items()}
      _write_text(self._listing(commit), json.dumps(entries, indent=1))

  def listing(self, commit: str) -> dict[str, Entry] | None:
    """The saved listing of a commit; None if there is none."""
    text = _read_text(self._listing(commit))
    try:
      return {name: Entry(**entry) for name, entry in json.loads(text).items()} if text else None
    except (ValueError, TypeError, AttributeError):
      return None  # a damaged listing is requested again

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
