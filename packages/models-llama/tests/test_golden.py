"""Logits and greedy continuations of transformers, on the checkpoints that make_golden.py wrote."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from models_llama.llama3.params import create_model_from_safe_tensors, read_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOLERANCE = 2e-5
MESHES = {
  "one": lambda: None,
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp")),
  "auto": lambda: Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tp")),
}


@pytest.fixture(scope="module", params=["llama3", "llama3p1", "llama3p2"])
def golden(request):
  directory = GOLDEN / request.param
  reference = np.load(directory / "reference.npz")
  return directory, {name: reference[name] for name in reference.files}


def _load(directory, mesh=None):
  config = read_config(json.loads((directory / "config.json").read_text()))
  return create_model_from_safe_tensors(directory, config, mesh, np.dtype("float32"))


def _positions(tokens, start=0):
  return np.broadcast_to(np.arange(start, start + tokens.shape[1], dtype=np.int32), tokens.shape)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits(golden, mesh):
  directory, reference = golden
  tokens, expected = reference["tokens"], reference["logits"]
  logits, _ = nnx.jit(lambda model, *args: model(*args))(
    _load(directory, MESHES[mesh]()), tokens, _positions(tokens)
  )
  assert np.abs(np.asarray(logits) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_greedy_continuation(golden):
  directory, reference = golden
  tokens, expected = reference["tokens"], reference["greedy"]
  model, (B, T), new = _load(directory), tokens.shape, expected.shape[1]
  step = nnx.jit(lambda model, *args: model(*args))
  logits, cache = step(model, tokens, _positions(tokens), model.init_cache(B, T + new))
  out = []
  for position in range(T, T + new):
    out.append(np.argmax(np.asarray(logits)[:, -1], -1).astype(np.int32)[:, None])
    logits, cache = step(model, out[-1], _positions(out[-1], position), cache)
  np.testing.assert_array_equal(np.concatenate(out, 1), expected)
