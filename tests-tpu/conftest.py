"""Programs are compiled for TPU v5e without a TPU, by the libtpu that TPU_LIBRARY_PATH names; nothing is run."""

import os
import pathlib

import pytest

# Read when jax is imported.
os.environ |= {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
  "JAX_PLATFORMS": "cpu",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


@pytest.fixture(scope="session")
def devices():
  """Four devices, two by two."""
  if not pathlib.Path(os.environ.get("TPU_LIBRARY_PATH", "")).is_file():
    pytest.fail("TPU_LIBRARY_PATH names no libtpu.so: run `nox -s tpu`, which installs it")
  from jax.experimental import topologies

  return topologies.get_topology_desc("v5e:2x2", "tpu").devices
