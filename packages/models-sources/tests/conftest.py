import dataclasses
import os

# Whatever imports the client library first: nothing but the loopback is ever asked, and nothing is measured.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import huggingface_hub
import pytest
from huggingface_hub import constants

from models_sources import huggingface, object_store
from models_sources.testing import HubServer, StoreServer


@pytest.fixture
def waits(monkeypatch):
  """The seconds that retries would have slept for."""
  seconds = []
  for name in ("POLICY", "FALLBACK_POLICY"):
    policy = dataclasses.replace(getattr(huggingface, name), sleep=seconds.append, jitter=lambda: 0.0)
    monkeypatch.setattr(huggingface, name, policy)
  return seconds


@pytest.fixture(scope="session")
def session():
  """The client library's connections: made once, for that costs more than a test."""
  yield
  huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch, tmp_path, waits, session):
  """A running hub that the client library is pointed at, with an empty cache and no saved token."""
  for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  with HubServer() as server:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    yield server


# What would name another store, account or machine than the loopback's.
_PLATFORM = ("AWS_", "GOOGLE_", "GCE_", "STORAGE_EMULATOR_HOST", "CLOUDSDK_", "MODELS_SOURCES_")


@pytest.fixture
def no_platform(monkeypatch, tmp_path):
  """A machine without credentials, whose metadata service nobody answers for."""
  for name in list(os.environ):
    if name.startswith(_PLATFORM):
      monkeypatch.delenv(name)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("MODELS_SOURCES_CACHE", str(tmp_path / "user-cache"))
  for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
    monkeypatch.setenv(name, "127.0.0.1:9")
  monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
  monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture
def store_waits(monkeypatch):
  """The seconds that retries would have slept for."""
  seconds = []
  policy = dataclasses.replace(object_store.POLICY, sleep=seconds.append, jitter=lambda: 0.0)
  monkeypatch.setattr(object_store, "POLICY", policy)
  return seconds


@pytest.fixture(params=["gs", "s3"])
def store(request, monkeypatch, no_platform, store_waits):
  """A store that both clients are pointed at; `store.scheme` says which of them the test is about."""
  with StoreServer() as server:
    server.scheme = request.param
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-shown")
    yield server
