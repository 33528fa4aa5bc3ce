"""Amazon S3 and stores that speak its protocol: `s3://bucket/folder`, or `s3://bucket/folder/model.gguf`.

Credentials are those of the platform: AWS_ACCESS_KEY_ID and its companions, a web identity, or the role of the
container or the machine. AWS_ENDPOINT_URL names another server, AWS_REGION the bucket's region.
"""

from __future__ import annotations

import os
from typing import Any

from models_sources import object_store
from models_sources.errors import InvalidNameError
from models_sources.object_store import CachedFiles, Provider, StoreFiles

# After the module that says what to install where it is missing.
from obstore.store import S3Store  # isort: skip


def _endpoint() -> str:
  return (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "").rstrip("/")


def _connect(bucket: str, token: str | bool | None, client_options: Any) -> S3Store:
  config: dict[str, Any] = {"endpoint": endpoint} if (endpoint := _endpoint()) else {}
  if token is False:
    config["skip_signature"] = True
  return S3Store(bucket, config=config, client_options=client_options, retry_config={"max_retries": 0})  # type: ignore[arg-type]


_PROVIDER = Provider(
  name="S3",
  scheme="s3",
  endpoint=_endpoint,
  connect=_connect,
  remedy=(
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles of ~/.aws are not read: "
    "`aws configure export-credentials --format env` prints them), or give the machine's role the right to list and "
    "read the bucket"
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
  """The objects directly below an address, or the one object that it names. One request.

  Args:
    identifier: `s3://bucket/folder`.
    revision: None, or that of files that were opened before: the folder must still hold the same.
    token: None takes the platform's credentials, or none where it has none; True insists on them, False sends none.
    download_path: directory below which fetched objects are kept whole; None streams them.
    progress: has no effect.

  Raises:
    InvalidNameError: a token is given as text: S3 has keys.
    SourceError: as `models_sources.object_store.open_files`.
  """
  if isinstance(token, str):
    raise InvalidNameError(
      f"{identifier}: S3 knows no token; leave it out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
  return object_store.open_files(
    _PROVIDER, identifier, revision=revision, token=token, download_path=download_path
  )
