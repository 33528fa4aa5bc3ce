import logging

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.formats import LocalFiles, read_safetensors
from models_core.loading import abstract_model, load, plan_load
from models_core.shard_cache import ShardCache
from models_core.weights import WeightTable

TABLE = {
  "rows": ((8, 6), P("fsdp")),
  "columns": ((6, 8), P(None, "tp")),
  "both": ((128, 64), P("fsdp", "tp")),
  "odd": ((5, 3), P()),
  "scalar": ((), P()),
  "empty": ((0, 4), P("fsdp")),
}


class Toys:
  """Checkpoints of one place, and loads of them through one cache."""

  def __init__(self, save, toy, directory, limit):
    self.save, self.toy, self.cache = save, toy, ShardCache(str(directory), limit)
    self.made = 0

  def write(self, seed):
    """Writes a checkpoint, always to the same file and of the same size; returns its numbers."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=shape).astype(np.float16) for name, (shape, _) in TABLE.items()}
    self.path = self.save(tensors) / "model.safetensors"
    return tensors

  def plan(self, mesh=None, dtype=np.float32):
    rows = [(name, name, " ".join("abc"[: len(shape)])) for name, (shape, _) in TABLE.items()]
    model = abstract_model(self.toy, TABLE, mesh)
    files = LocalFiles(str(self.path.parent))
    return plan_load(read_safetensors(files), model, WeightTable(*rows), dtype=np.dtype(dtype))

  def load(self, mesh=None, dtype=np.float32, also=b"", make=None):
    plan = self.plan(mesh, dtype)

    def made():
      self.made += 1
      return (make or load)(plan)

    return self.cache.load(plan, plan.model, made, also=also)

  def check(self, model, tensors, dtype=np.float32):
    for name, expected in tensors.items():
      np.testing.assert_array_equal(np.asarray(getattr(model, name)[...]), expected.astype(dtype), name)

  @property
  def entries(self):
    return sorted(entry for entry in self.path.parent.parent.glob("cache/*") if entry.is_dir())


@pytest.fixture
def toys(save, toy, tmp_path):
  return Toys(save, toy, tmp_path / "cache", 1 << 30)


@pytest.fixture
def notes(caplog):
  """Takes the notes of the cache that were logged since it was called last."""

  def take():
    found = [
      r.getMessage().partition(": ")[2]
      for r in caplog.records
      if r.name.startswith("models_core.shard_cache")
    ]
    caplog.clear()
    return found

  caplog.set_level(logging.WARNING)
  return take
