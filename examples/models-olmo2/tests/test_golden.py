import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from models_automodel import AutoModel
from models_core.testing import assert_close
from models_olmo2.model import Olmo2

GOLDEN = pathlib.Path(__file__).parent / "golden"
MESHES = {"one": lambda: None, "mesh": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"))}


@pytest.mark.parametrize("mesh", MESHES)
def test_automodel_finds_the_family_and_its_logits_are_those_of_transformers(mesh):
  reference = np.load(GOLDEN / "reference.npz")
  model, _ = AutoModel.from_pretrained(str(GOLDEN), MESHES[mesh]())
  assert type(model) is Olmo2
  config = model.config
  assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (2, 4, 700.0)
  logits, _ = nnx.jit(lambda model, tokens: model(tokens))(model, reference["tokens"])
  assert_close(logits, reference["logits"])
