"""Memory by the compiler's account: a long prompt in chunks, and a cache that is written in place."""

import jax
import numpy as np
import pytest

from models_core.generation import programs, prompts
from models_core.generation.placement import Placed
from models_core.generation.sampling import GREEDY, numbers_of, steps_of
from models_core.generation.stopping import Stop, ends_of

from ..layers.tiny_lm import Config, make

LONG, CACHE = 100_000, 100_352


@pytest.fixture(scope="module")
def placed():
  return Placed.of(make(None, Config(windows=(None,))))


def account(placed, program, *args):
  return program.lower(placed.leaves, *args).compile().memory_analysis()


def test_a_prompt_of_100_000_tokens(placed):
  assert prompts.lengths_of_chunks(LONG) == [192] + [prompts.CHUNK] * 195
  temporaries = {}
  for size in (CACHE // 4, CACHE):
    cache = placed.run(programs.cache_program(placed.structure, 1, size, None))
    program = programs.prefill_program(placed.structure, programs.Places.of(cache))
    chunk = np.zeros((1, prompts.CHUNK), np.int32)
    found = account(placed, program, chunk, chunk, cache)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert found.alias_size_in_bytes >= nbytes
    temporaries[size] = found.temp_size_in_bytes
  # A few numbers for each slot grow with the prompt: positions, which take 4 bytes.
  assert temporaries[CACHE] - temporaries[CACHE // 4] <= 8 * (CACHE - CACHE // 4)


def test_the_loop_writes_its_cache_in_place(placed):
  cache = placed.run(programs.cache_program(placed.structure, 2, CACHE, None))
  steps, numbers, ends = steps_of(GREEDY), numbers_of(GREEDY), ends_of(Stop())
  row = jax.ShapeDtypeStruct((2,), np.int32)
  rows = {
    "token": row,
    "position": row,
    "ended": jax.ShapeDtypeStruct((2,), bool),
    "count": jax.ShapeDtypeStruct((), np.int32),
    "seeds": jax.ShapeDtypeStruct((2,), np.uint32),
    "recent": jax.ShapeDtypeStruct((2, 0), np.int32),
  }
  program = programs.decode_program(placed.structure, steps, programs.Places.of(cache))
  found = account(placed, program, cache, rows, rows["ended"], np.int32(8), numbers, ends)
  nbytes = sum(x.nbytes for x in jax.tree.leaves(cache))
  assert found.alias_size_in_bytes >= nbytes
  # Attention weights of one token, and at most one copy of keys and values in another order; none is kept.
  assert found.temp_size_in_bytes <= 1.5 * nbytes
