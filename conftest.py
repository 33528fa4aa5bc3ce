"""Settings of every test run here: programs run once, so compiling them is what takes time.

JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as users do. `pytest --one-case` runs one case of each parametrised test.
"""

import os
from importlib.metadata import PackageNotFoundError, version

try:
  _jax = tuple(map(int, version("jax").split(".")[:2]))
except PackageNotFoundError:  # naming and sources do without
  _jax = (0, 0)
# Emitters of fusions take most of a compilation; where nothing else is left, short vectors make less code. Small programs
# compile faster in one piece.
_QUICK = {
  (0, 9): "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
  (0, 10): "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
  (0, 12): "--xla_cpu_prefer_vector_width=128 --xla_cpu_parallel_codegen_split_count=1",
}
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and _jax in _QUICK:
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK[_jax]}"
# The command would keep programs in the cache of whoever runs the tests.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# XLA takes this many threads for all simulated devices, instead of one for each core. With few, programs with collectives
# that run at once take all of them and wait for one another for good: operations outside of jit, for example.
os.environ.setdefault("NPROC", "64")


def pytest_addoption(parser):
  """Adds --one-case."""
  help = "the first case of each parametrised test: for other versions of what a package depends on"
  parser.addoption("--one-case", action="store_true", help=help)


def pytest_collection_modifyitems(config, items):
  """With --one-case, leaves out all cases of a test but the first."""
  if not config.getoption("--one-case"):
    return
  kept = set({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())
  config.hook.pytest_deselected(items=[item for item in items if item not in kept])
  items[:] = [item for item in items if item in kept]
