"""What a stream runs is compiled before its model has numbers."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from models_core.generation import GREEDY, Sampling, Stop, generate, stream
from models_core.loading import abstract_model

from ..layers.tiny_lm import Config, Model, make

MESHES = {
  "one device": lambda: None,
  "auto": lambda: Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp")),
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2),
}
CASES = {
  "greedy": ([1, 2, 3], {"max_new_tokens": 20, "interval": 4}),
  "in chunks": (list(range(16)) * 40, {"max_new_tokens": 20, "interval": 4}),
  "one token": ([1, 2, 3], {"max_new_tokens": 1}),
  "sampled": (
    [1, 2, 3],
    {
      "max_new_tokens": 40,
      "sampling": Sampling(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.1),
      "stop": Stop(ids=[9]),
    },
  ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_call_after_it_compiles_nothing(mesh, case, compilations):
  # A configuration that no other test has, as programs are kept for all models of one configuration.
  number = 10 * list(CASES).index(case) + list(MESHES).index(mesh)
  config, mesh = Config(windows=(None, 100 + number)), MESHES[mesh]()
  prompt, options = CASES[case]
  structure = abstract_model(Model, config, mesh)
  shapes = structure.fill(
    {
      name: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=p.sharding)
      for name, p in structure.parameters.items()
    }
  )
  model = make(mesh, config)
  del compilations[:]
  stream(shapes, [prompt], **options).compile()
  assert len(compilations) >= 3
  del compilations[:]
  found = generate(model, [prompt], **options)
  assert compilations == []
  assert 1 <= len(found.tokens[0]) <= options["max_new_tokens"]


def test_other_options_are_not_compiled_for(compilations):
  config = Config(windows=(None, 99))
  structure = abstract_model(Model, config)
  shapes = structure.fill(
    {
      name: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=p.sharding)
      for name, p in structure.parameters.items()
    }
  )
  stream(shapes, [[1, 2]], max_new_tokens=4, sampling=GREEDY).compile()
  model = make(None, config)
  del compilations[:]
  generate(model, [[1, 2]], max_new_tokens=4, sampling=Sampling(temperature=1.0))
  assert compilations != []
