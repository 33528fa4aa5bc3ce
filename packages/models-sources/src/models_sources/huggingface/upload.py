"""Uploads a checkpoint to a repository of the hub, in one commit."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (
  are_progress_bars_disabled,
  disable_progress_bars,
  enable_progress_bars,
  validate_repo_id,
)

from models_sources.errors import AccessError, FilesNotFoundError, InvalidNameError, SourceError
from models_sources.huggingface import POLICY, _endpoint, _Hub
from models_sources.huggingface.errors import public_address
from models_sources.names import check_name


def upload(
  identifier: str,
  files: Mapping[str, str | os.PathLike | bytes],
  *,
  outdated: Collection[str] = (),
  revision: str | None = None,
  token: str | bool | None = None,
  private: bool | None = None,
  message: str = "Upload a checkpoint",
  progress: bool = True,
) -> str:
  """Adds files to a repository in one commit: readers find the old files or the new ones. Makes the repository if needed.

  Large files go up before the commit. After a failed connection, this function tries again, and a later call goes on, too:
  content that the hub holds already is not sent again.

  Args:
    identifier: `organisation/name`.
    files: paths on this machine, or content, by name in the repository.
    outdated: endings of names; files of the repository that end so, and that are not among `files`, are removed in the
      same commit: those of a checkpoint that is replaced.
    revision: branch that the commit goes to; it must exist, unless it is None, `main`.
    token: of the user's account, with the right to write; None takes HF_TOKEN or the saved token.
    private: whether a repository that is made is private; None is the default of the account.
    message: of the commit.
    progress: whether progress bars are shown.

  Returns:
    The full hash of the commit.

  Raises:
    InvalidNameError: the identifier is not a repository id, or a name leads out of the repository.
    AccessError: the hub rejects the token, or the token may not write to the repository.
    ConnectionFailedError: the hub cannot be reached, after all retries.
    SourceError: the hub refuses the files.
  """
  try:
    validate_repo_id(identifier)
  except HFValidationError:
    raise InvalidNameError(f"{identifier!r} is not a repository id: write organisation/name") from None
  asked = check_name(revision or constants.DEFAULT_REVISION, "revision")
  content = {check_name(name): data for name, data in files.items()}
  hub = _Hub(identifier, asked, _endpoint(), token)

  def make(sender: dict[str, Any]) -> None:
    HfApi(endpoint=hub.endpoint, **sender).create_repo(identifier, private=private, exist_ok=True)

  def commit(sender: dict[str, Any]) -> str:
    api = HfApi(endpoint=hub.endpoint, **sender)
    info = api.model_info(identifier, revision=asked)
    there = [sibling.rfilename for sibling in info.siblings or ()]
    removed = [name for name in there if name not in content and name.endswith(tuple(outdated))]
    # Made anew for each attempt: the client marks those that it has sent.
    additions = [CommitOperationAdd(name, _source(data)) for name, data in content.items()]
    deletions = [CommitOperationDelete(name) for name in removed] if outdated else []
    try:
      return api.create_commit(
        identifier,
        [*additions, *deletions],
        revision=asked,
        commit_message=message,
        # What another one has committed meanwhile is not overwritten.
        parent_commit=info.sha,
      ).oid
    except ValueError as error:
      # Older clients cannot read the address of a commit on another hub than the public one. It is made by then.
      if "Unable to retrieve user and repo ID" not in str(error):
        raise
      return str(api.model_info(identifier, revision=asked).sha)

  with _progress(progress), _write_errors(hub):
    hub.ask(make, POLICY, "the repository")
    return hub.ask(commit, POLICY, "the upload")


def _source(data: str | os.PathLike | bytes) -> str | bytes:
  return data if isinstance(data, bytes) else str(pathlib.Path(data))


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[None]:
  """Hides the client's progress bars of uploads, unless they are to be shown."""
  if shown or are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
    yield
    return
  disable_progress_bars()
  try:
    yield
  finally:
    enable_progress_bars()


@contextlib.contextmanager
def _write_errors(hub: _Hub) -> Iterator[None]:
  """Errors about reading become errors about writing."""
  place = public_address(hub.endpoint)
  try:
    yield
  except AccessError as error:
    raise AccessError(
      f"{place} does not let this token write to {hub.repo}: make a token with the right to write at "
      f"{place}/settings/tokens, then set HF_TOKEN or pass token="
    ) from error
  except FilesNotFoundError as error:
    raise FilesNotFoundError(
      f"{place} has no repository {hub.repo} with a branch {hub.revision} that this token may write to: check the "
      "spelling, or make the branch first"
    ) from error
  except ValueError as error:
    if isinstance(error, SourceError):
      raise
    raise SourceError(f"{place} refuses the upload to {hub.repo}: {error}") from error
