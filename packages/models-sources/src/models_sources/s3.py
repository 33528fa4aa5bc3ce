"""Amazon S3 and stores that speak its protocol: `s3://bucket/folder`, or `s3://bucket/folder/model.gguf`.

Credentials are the platform's: AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, a web identity, or the role of the
container or the machine. AWS_ENDPOINT_URL names another server, AWS_REGION the bucket's region.
"""

from __future__ import annotations

import os
from typing import Any

from models_sources import object_store, object_target
from models_sources.errors import InvalidNameError
from models_sources.object_store import CachedFiles, Provider, StoreFiles
from models_sources.object_target import StoreTarget

# Imported after object_store, whose error says how to install a missing obstore.
from obstore.store import S3Store  # isort: skip


def _endpoint() -> str:
  return (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "").rstrip("/")


def _connect(bucket: str, token: str | bool | None, client_options: Any, retries: Any) -> S3Store:
  config: dict[str, Any] = {"endpoint": endpoint} if (endpoint := _endpoint()) else {}
  if token is False:
    config["skip_signature"] = True
  return S3Store(bucket, config=config, client_options=client_options, retry_config=retries)  # type: ignore[arg-type]


_PROVIDER = Provider(
  name="S3",
  scheme="s3",
  endpoint=_endpoint,
  connect=_connect,
  remedy=(
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles of ~/.aws are not read: "
    "`aws configure export-credentials --format env` prints them), or give the machine's role the right to "
    "{rights} the bucket"
  ),
  misplaced="set AWS_REGION to the bucket's region",
)


def open_files(
  identifier: str,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  download_path: str | None = None,
  progress: bool = True,
) -> StoreFiles | CachedFiles:
  """Lists the objects directly below an address, or the one object that it names. One request per 1000 objects.

  Args:
    identifier: `s3://bucket/folder`.
    revision: None, or the `revision` of files that were opened before: the folder must be unchanged since then.
    token: None takes the platform's credentials if there are any, True requires them, False sends none.
    download_path: directory that fetched objects are cached in; None reads the objects in place.
    progress: has no effect.

  Raises:
    InvalidNameError: the token is a string; S3 has keys instead of tokens.
    SourceError: as `models_sources.object_store.open_files`.
  """
  _check_token(identifier, token)
  return object_store.open_files(
    _PROVIDER, identifier, revision=revision, token=token, download_path=download_path
  )


def open_target(place: str, *, token: str | bool | None = None) -> StoreTarget:
  """Opens a folder of a bucket for writing. No request is made.

  Args:
    place: `s3://bucket/folder`.
    token: must be None or True: the platform's credentials are taken.

  Raises:
    InvalidNameError: the token is a string; S3 has keys instead of tokens.
    SourceError: as `models_sources.object_target.open_target`.
  """
  _check_token(place, token)
  return object_target.open_target(_PROVIDER, place, token=token)


def _check_token(place: str, token: str | bool | None) -> None:
  if isinstance(token, str):
    raise InvalidNameError(
      f"{place}: S3 takes no token; leave token out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
