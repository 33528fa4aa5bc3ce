"""Settings of every test run here: programs run once, so compiling them is what takes time."""

import os
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
try:
  _jax = tuple(map(int, version("jax").split(".")[:2]))
except PackageNotFoundError:  # naming and sources do without
  _jax = (0, 0)
if (0, 9) <= _jax <= (0, 10):
  # Emitters of fusions take most of a compilation. Newer versions have nothing else.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
