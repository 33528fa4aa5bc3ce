import dataclasses
import os

# Whatever imports the client library first: nothing but the loopback is ever asked, and nothing is measured.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import huggingface_hub
import pytest
from huggingface_hub import constants

from models_sources import huggingface
from models_sources.testing import HubServer


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
