"""Whether a model and its KV cache fit into memory, before anything is loaded."""

from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING, Any

from models_core.errors import ConfigError

if TYPE_CHECKING:
  import jax

  from models_core.loading import LoadPlan


class MemoryBoundError(ConfigError):
  """A model and its KV cache do not fit into memory."""


def gib(nbytes: int) -> str:
  """Bytes as gibibytes, such as "14.96 GiB"."""
  return f"{nbytes / 2**30:.2f} GiB"


def readable(nbytes: int) -> str:
  """Bytes in the largest unit of which they have one, such as "14.96 GiB" or "512.0 KiB"."""
  for unit, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
    if nbytes >= 2**unit:
      return f"{nbytes / 2**unit:.{2 if unit == 30 else 1}f} {name}"
  return f"{nbytes} B"


def free_host_bytes() -> int | None:
  """Bytes of memory that this machine can still give; None where the system does not say it."""
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    pass
  try:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, OSError, ValueError):
    return None


def check_memory(plan: LoadPlan, tokens: int, rows: int = 1) -> None:
  """Compares the bytes of weights and KV cache with the free memory of each device; a CPU's devices share the host's.

  Args:
    plan: of the model.
    tokens: slots of a row in the KV cache.
    rows: of the KV cache.

  Raises:
    MemoryBoundError: if they do not fit.
  """
  cache = cache_bytes(plan, tokens, rows)
  needed, free = collections.Counter[str](), dict[str, int]()
  weights = plan.bytes_per_device()
  for device, nbytes in weights.items():
    name = "this machine" if device.platform == "cpu" else f"device {device.id}"
    needed[name] += nbytes + cache // len(weights)
    if (left := _free(device)) is not None:
      free[name] = left
  for name, nbytes in needed.items():
    if name in free and nbytes > free[name]:
      raise MemoryBoundError(
        f"weights of {gib(sum(weights.values()))} and a KV cache of {gib(cache)} for {tokens:,} tokens need "
        f"{gib(nbytes)} of {name}, but {gib(free[name])} are free: choose a smaller --dtype, a --mesh of more devices, "
        "fewer tokens, or --no-memory-check"
      )


def _free(device: jax.Device) -> int | None:
  if device.platform == "cpu":
    return free_host_bytes()
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    return None
  return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def cache_bytes(plan: LoadPlan, tokens: int, rows: int) -> int:
  """Bytes of the KV cache of a planned model, over all devices."""
  import jax
  from flax import nnx

  from models_core.layers import shapes_only

  assert plan.family is not None
  make_model, dtype = plan.family.model_class, plan.parameters[0].dtype

  def make() -> Any:
    return make_model(plan.config, rngs=nnx.Rngs(0)).init_cache(rows, tokens, dtype, ring=True)

  with shapes_only():
    leaves = jax.tree.leaves(nnx.eval_shape(make))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
