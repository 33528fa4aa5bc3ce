"""Google Cloud Storage: `gs://bucket/folder`, or `gs://bucket/folder/model.gguf`.

Credentials are the platform's: GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the
account of the virtual machine. STORAGE_EMULATOR_HOST names another server, which gets requests without credentials.
"""

from __future__ import annotations

import os
from typing import Any

from models_sources import object_store, object_target
from models_sources.object_store import CachedFiles, Provider, StoreFiles
from models_sources.object_target import StoreTarget

# Imported after object_store, whose error says how to install a missing obstore.
from obstore.store import GCSStore  # isort: skip


def _endpoint() -> str:
  host = os.environ.get("STORAGE_EMULATOR_HOST") or os.environ.get("GOOGLE_BASE_URL") or ""
  return host.rstrip("/") if "://" in host or not host else f"http://{host.rstrip('/')}"


def _connect(bucket: str, token: str | bool | None, client_options: Any, retries: Any) -> GCSStore:
  config: dict[str, Any] = {"base_url": endpoint} if (endpoint := _endpoint()) else {}
  if isinstance(token, str):
    config["bearer_token"] = token
  elif token is False or os.environ.get("STORAGE_EMULATOR_HOST"):
    config["skip_signature"] = True
  return GCSStore(bucket, config=config, client_options=client_options, retry_config=retries)  # type: ignore[arg-type]


_PROVIDER = Provider(
  name="Google Cloud Storage",
  scheme="gs",
  endpoint=_endpoint,
  connect=_connect,
  remedy=(
    "run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or pass an access token as "
    "token=; the account must be allowed to {rights} the bucket"
  ),
  misplaced="check GOOGLE_BASE_URL, STORAGE_EMULATOR_HOST and the proxy settings",
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
    identifier: `gs://bucket/folder`.
    revision: None, or the `revision` of files that were opened before: the folder must be unchanged since then.
    token: an OAuth access token; None takes the platform's credentials if there are any, True requires them, False
      sends none.
    download_path: directory that fetched objects are cached in; None reads the objects in place.
    progress: has no effect.

  Raises:
    SourceError: as `models_sources.object_store.open_files`.
  """
  return object_store.open_files(
    _PROVIDER, identifier, revision=revision, token=token, download_path=download_path
  )


def open_target(place: str, *, token: str | bool | None = None) -> StoreTarget:
  """Opens a folder of a bucket for writing. No request is made.

  Args:
    place: `gs://bucket/folder`.
    token: an OAuth access token; None takes the platform's credentials.

  Raises:
    SourceError: as `models_sources.object_target.open_target`.
  """
  if os.environ.get("STORAGE_EMULATOR_HOST") and token in (None, True):
    # The client does not change objects without a token, whatever the emulator asks for.
    token = "emulator"
  return object_target.open_target(_PROVIDER, place, token=token)
