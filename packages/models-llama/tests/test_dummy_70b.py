"""A random model of 70 billion parameters: traced and compiled for a mesh, but not made."""

import contextlib
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models_core.dummy_model_creator import _maker
from models_core.loading import abstract_model
from models_llama.llama3.model import Llama3, ModelConfig


@pytest.mark.parametrize("inside", [False, True], ids=["outside set_mesh", "inside set_mesh"])
def test_each_device_makes_its_shards_alone_by_one_program_a_kind_of_parameter(inside):
  mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), devices=jax.devices()[:4])
  start = time.perf_counter()
  parameters = abstract_model(Llama3, ModelConfig.llama3_70b(), mesh).parameters
  assert sum(math.prod(p.shape) for p in parameters.values()) == 70_553_706_496
  kinds = {(p.shape, jnp.dtype("bfloat16"), p.sharding, p.init) for p in parameters.values()}
  assert len(parameters) == 723
  # Embedding and head, a norm, q, k and v, o, gate and up, down.
  assert len(kinds) == 7
  for shape, dtype, sharding, init in kinds:
    arguments = (jax.random.key(0), np.uint32(0), np.float32(1))
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
      program = _maker(shape, dtype, sharding, init).lower(*arguments).compile()
    memory = program.memory_analysis()
    shard = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
    assert shard <= memory.output_size_in_bytes < shard + 1000
    # Unfused, a float32 generator keeps 16 bytes for each value of the shard; generating all shards would take 64.
    assert memory.temp_size_in_bytes <= 9 * shard + 1000, shape
  assert time.perf_counter() - start < 120
