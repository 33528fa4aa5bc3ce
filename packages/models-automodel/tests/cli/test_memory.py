"""The bytes of a model and its cache, against what devices and this machine have left."""

import dataclasses

import pytest

from models_automodel import AutoModel
from models_automodel.cli.memory import MemoryBoundError, cache_bytes, check_memory
from models_core.loading import LoadPlan


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """A device that says how much memory it has."""

  id: int
  limit: int | None
  used: int = 0
  platform = "gpu"

  def memory_stats(self):
    return None if self.limit is None else {"bytes_limit": self.limit, "bytes_in_use": self.used}


@pytest.fixture
def plan(directory):
  return AutoModel.plan(directory)


def on(monkeypatch, *devices):
  """Lets a model take 1,000 bytes of each device."""
  monkeypatch.setattr(LoadPlan, "bytes_per_device", lambda plan: dict.fromkeys(devices, 1000))


def test_a_cache_is_counted_from_its_arrays(plan):
  # Two layers of keys and values of 2 heads of 4 in float32, with positions and one count of tokens.
  assert cache_bytes(plan, 10, 3) == 2 * 3 * (2 * 10 * 2 * 4 * 4 + 10 * 4 + 4)


def test_each_device_must_hold_its_share(plan, monkeypatch):
  each = 1000 + cache_bytes(plan, 10, 1) // 2
  on(monkeypatch, Accelerator(0, each), Accelerator(1, each + 7, used=7))
  check_memory(plan, 10)
  on(monkeypatch, Accelerator(0, each), Accelerator(1, each + 7, used=8))
  with pytest.raises(
    MemoryBoundError, match=r"for 10 tokens need 0\.00 GiB of device 1, but 0\.00 GiB are free"
  ):
    check_memory(plan, 10)


def test_a_device_that_does_not_say_its_memory_is_not_checked(plan, monkeypatch):
  on(monkeypatch, Accelerator(0, None))
  check_memory(plan, 10**9)


def test_devices_of_a_cpu_share_the_memory_of_this_machine(plan, monkeypatch):
  cpus = [dataclasses.replace(Accelerator(i, None)) for i in range(2)]
  monkeypatch.setattr(Accelerator, "platform", "cpu")
  on(monkeypatch, *cpus)
  needed = 2000 + cache_bytes(plan, 10, 1)
  monkeypatch.setattr("models_automodel.cli.memory.free_host_bytes", lambda: needed)
  check_memory(plan, 10)
  monkeypatch.setattr("models_automodel.cli.memory.free_host_bytes", lambda: needed - 1)
  with pytest.raises(MemoryBoundError, match="of this machine"):
    check_memory(plan, 10)
