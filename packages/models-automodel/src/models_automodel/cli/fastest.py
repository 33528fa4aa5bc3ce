"""Which dtype is fastest on this machine's backend, by measurement.

A token of an answer multiplies each weight matrix by a vector, which takes as long as the backend needs to read the
matrix: half as long for bfloat16 on accelerators, but many times longer on CPUs whose backend converts it first.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Mapping

DTYPES = ("float32", "bfloat16")
# Rows and columns of the matrix, which is read from memory in less than a millisecond or converted in 20.
_SIZE = 2048
_REPEATS = 3
_FILE = "automodel-dtypes.json"


def by_speed() -> dict[str, float]:
  """Milliseconds of a matrix-vector product in each dtype, the fastest first.

  They are kept beside the compiled programs, so that a second start chooses the same dtype and takes no time for it.
  """
  import jax

  cache = _cache_file()
  known = _read(cache)
  device = (
    f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}"
  )
  times = known.get(device)
  if not isinstance(times, Mapping) or times.keys() != set(DTYPES):
    times = _measured()
    _write(cache, {**known, device: times})
  return dict(sorted(times.items(), key=lambda item: item[1]))


@functools.cache
def _measured() -> dict[str, float]:
  """Milliseconds of each dtype: the best of interleaved repeats, since other programs can only slow them down."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax.sharding import PartitionSpec

  from models_core.layers import Projection, shapes_only

  with shapes_only():
    shapes = nnx.eval_shape(lambda: Projection(_SIZE, _SIZE, PartitionSpec(None, None), rngs=nnx.Rngs(0)))
  graph, state = nnx.split(shapes)
  run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
  arguments = {
    dtype: jax.tree.map(
      lambda leaf, dtype=dtype: jnp.ones(leaf.shape, dtype), (state, jnp.ones((1, 1, _SIZE)))
    )
    for dtype in DTYPES
  }
  for pair in arguments.values():
    jax.block_until_ready(run(*pair))
  times: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
  for _ in range(_REPEATS):
    for dtype, pair in arguments.items():
      start = time.perf_counter()
      jax.block_until_ready(run(*pair))
      times[dtype].append(time.perf_counter() - start)
  return {dtype: 1000 * min(found) for dtype, found in times.items()}


def _cache_file() -> str | None:
  """Where times are kept; None if compiled programs are not kept in a directory of this machine."""
  import jax

  # The attributes of JAX's configuration are made when it is imported.
  folder, enabled = (
    getattr(jax.config, f"jax_{name}") for name in ("compilation_cache_dir", "enable_compilation_cache")
  )
  if not folder or "://" in folder or not enabled:
    return None
  return os.path.join(folder, _FILE)


def _read(path: str | None) -> dict[str, object]:
  try:
    with open(path or os.devnull, encoding="utf-8") as file:
      found = json.load(file)
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _write(path: str | None, found: Mapping[str, object]) -> None:
  """Keeps times; a folder that cannot be written costs the next start a measurement."""
  if path is None:
    return
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}"
    with open(part, "w", encoding="utf-8") as file:
      json.dump(found, file)
    os.replace(part, path)
  except OSError:
    return
