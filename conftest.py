"""Settings of every test run here: programs run once, so compiling them is what takes time.

JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as users do.
"""

import os
from importlib.metadata import PackageNotFoundError, version

try:
  _jax = tuple(map(int, version("jax").split(".")[:2]))
except PackageNotFoundError:  # naming and sources do without
  _jax = (0, 0)
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and (0, 9) <= _jax <= (0, 10):
  # Emitters of fusions take most of a compilation. Newer versions have nothing else.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# The command would keep programs in the cache of whoever runs the tests.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# XLA takes this many threads for all simulated devices, instead of one for each core. With few, programs with collectives
# that run at once take all of them and wait for one another for good: operations outside of jit, for example.
os.environ.setdefault("NPROC", "64")
