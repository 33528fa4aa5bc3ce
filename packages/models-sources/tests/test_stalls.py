"""A hub that accepts a connection and then sends nothing: the transfer ends, or goes another way."""

import os
import subprocess
import sys
import textwrap

import pytest
from huggingface_hub import constants

from models_sources import ConnectionFailedError, huggingface
from models_sources.huggingface import xet
from models_sources.retry import Policy
from models_sources.testing import HubServer

from .checkpoint import FILES, REPO, WEIGHTS

# In a process of its own: the client reads its settings when it is imported.
SCRIPT = """
import sys, time
from huggingface_hub import constants
from models_sources import huggingface
from models_sources.huggingface import xet
from models_sources.retry import Policy

xet.STALL = 1.0
huggingface.POLICY = Policy(attempts=2, sleep=lambda seconds: None)
if sys.argv[2:] == ["impatient"]:
  constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.2
  huggingface.POLICY = Policy(attempts=1)
files = huggingface.open_files("org/name", download_path=sys.argv[1], progress=False)
began = time.monotonic()
try:
  print("fetched", files.read(files.fetch(["model.safetensors"]) and "model.safetensors", 0, 99).hex())
except Exception as error:
  print(type(error).__name__, error)
assert time.monotonic() - began < 30
"""


def run(hub, cache, *arguments, **settings):
  environment = (
    os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "0"} | settings
  )
  return subprocess.run(
    [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), str(cache), *arguments],
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.parametrize("fault", [{"silence": 60.0}, {"status": 500}, {}], ids=str)
def test_a_transfer_by_xet_that_stalls_or_fails_goes_on_by_http(tmp_path, fault):
  pytest.importorskip("hf_xet")
  with HubServer(has_xet=True) as hub:
    hub.add(REPO, FILES)
    if fault:
      hub.fail("^xet", times=999, **fault)
    found = run(hub, tmp_path)
    asked = {request.host for request in hub.requests}
  assert found.stdout == f"fetched {WEIGHTS[:99].hex()}\n", found.stderr
  # Versions of the client that cannot end such a transfer do not begin one.
  assert asked == {"hub", "storage"} | ({"xet"} if xet._abort else set())


def test_a_transfer_by_http_that_stalls_ends(tmp_path):
  with HubServer() as hub:
    hub.add(REPO, FILES)
    hub.fail("storage GET", stall=60.0, times=999)
    found = run(hub, tmp_path, "impatient", HF_HUB_DISABLE_XET="1")
  assert found.stdout.startswith(
    f"ConnectionFailedError {hub.endpoint} sent nothing of model.safetensors of org/name for a while: try later, or set "
    "HF_HUB_DOWNLOAD_TIMEOUT"
  ), found.stderr


def test_an_error_beside_a_transfer_stays_as_it_is():
  with pytest.raises(ZeroDivisionError), xet.watched("a file", False):
    raise ZeroDivisionError


def test_an_error_of_a_transfer_turns_xet_off(monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)

  def fail():
    with xet.watched("a file of org/name", False) as bar:
      bar(name="huggingface_hub.xet_get", total=1).close()
      raise RuntimeError("whatever it says")

  with pytest.raises(
    ConnectionFailedError, match=r"a file of org/name could not be downloaded by Xet \(RuntimeError; "
  ):
    fail()
  assert constants.HF_HUB_DISABLE_XET


def test_the_stated_times():
  """README says how long a stalled transfer takes at most."""
  assert xet.STALL == 60.0
  assert huggingface.POLICY.attempts == Policy().attempts == 5
