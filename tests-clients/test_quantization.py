"""qwix: quantised weights, training with quantised products, and LoRA factors beside quantised weights."""

import re

import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from .subjects import PROJECTIONS, TOKENS, Snapshot, cells, logits, some_cells, with_lora
from .test_trainer import make_trainer, train

# The head of a model, which may be its embedding.
HEAD = "lm_head|embedder"
# Type of the weights -> what qwix is told, the dtype in memory, and the largest error of the logits, relative to their
# norm. Four bits are for projections alone.
TYPES = {
  "int8": ("int8", jnp.int8, 0.05, f"{PROJECTIONS}|{HEAD}"),
  "fp8": (jnp.float8_e4m3fn, jnp.float8_e4m3fn, 0.2, f"{PROJECTIONS}|{HEAD}"),
  "int4": ("int4", jnp.int4, 0.3, PROJECTIONS),
  "nf4": ("nf4", jnp.uint4, 0.3, PROJECTIONS),
}


def matrices(names, modules) -> set[str]:
  """Names of the parameters that a rule for modules reaches."""
  found = {name for name in names if re.fullmatch(r"layers\..*_proj(\.w|\.kernel)?", name)}
  assert len(found) == 2 * 7
  if modules.endswith(HEAD):
    found.add("lm_head.w" if "lm_head.w" in names else "embedder.input_embedding")
  return found


def quantised(model) -> dict[str, qwix.QArray]:
  """All QArrays in a model, by the names of the parameters that they replace."""
  found = {}
  for path, module in model.iter_modules():
    for name, value in vars(module).items():
      if isinstance(array := getattr(value, "array", None), qwix.QArray):
        found[".".join(map(str, (*path, name)))] = array
  return found


def error(actual, expected) -> float:
  """Norm of the difference, relative to the norm of the expected numbers."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def quantise(model, kind):
  """The model with quantised weights."""
  weight_qtype, _, _, modules = TYPES[kind]
  rule = qwix.QuantizationRule(module_path=modules, weight_qtype=weight_qtype)
  return qwix.quantize_model(model, qwix.PtqProvider([rule]), **model.get_model_input())


def assert_same_places(arrays, before):
  """Asserts that quantised weights lie where the weights lay."""
  for name, array in arrays.items():
    sharding, ndim = nnx.as_pure(array.qvalue).sharding, array.qvalue.ndim
    assert sharding.is_equivalent_to(before.shardings[name], ndim), (
      f"{name} lies at {sharding}, and lay at {before.shardings[name]}"
    )


def check_ptq(subject, kind):
  _, dtype, tolerance, modules = TYPES[kind]
  model = subject.model()
  with subject.context():
    small, before = quantise(model, kind), Snapshot.of(model)
    arrays = quantised(small)
    assert arrays.keys() == matrices(before.values, modules)
    for name, array in arrays.items():
      assert (array.qvalue.dtype, array.qvalue.shape) == (dtype, before.values[name].shape), name
    if kind != "nf4":
      assert_same_places(arrays, before)
    far = error(logits(small, TOKENS), logits(model, TOKENS))
  assert 0 < far < tolerance


@some_cells("PTQ, int8", 0)
def test_int8(subject):
  check_ptq(subject, "int8")


@some_cells("PTQ, fp8", 1)
def test_fp8(subject):
  check_ptq(subject, "fp8")


@some_cells("PTQ, int4", 2)
def test_int4(subject):
  check_ptq(subject, "int4")


@some_cells("PTQ, nf4", 3)
def test_nf4(subject):
  check_ptq(subject, "nf4")


@cells("sharding of nf4 weights", ("llama3", "Auto"), ("llama3", "Explicit"))
def test_nf4_weights_stay_where_they_lie(subject):
  model = subject.model()
  with subject.context():
    assert_same_places(quantised(quantise(model, "nf4")), Snapshot.of(model))


@some_cells("QAT", 1)
def test_quantisation_aware_training(subject):
  model = subject.model()
  with subject.context():
    rule = qwix.QtRule(module_path=f"{PROJECTIONS}|{HEAD}", weight_qtype="int8", act_qtype="int8")
    aware = qwix.quantize_model(model, qwix.QtProvider([rule]), **model.get_model_input())
    assert 0 < error(logits(aware, TOKENS), logits(model, TOKENS)) < 0.05
    before = Snapshot.of(aware)
    losses = train(make_trainer(aware))
    after = Snapshot.of(aware)
  assert losses[-1] < 0.8 * losses[0]
  assert before.changed(after) == before.values.keys()
  before.assert_same_places(after)


@some_cells("QLoRA", 2)
def test_qlora(subject):
  model = subject.model()
  names = matrices(Snapshot.of(model).values, PROJECTIONS)
  with subject.context():
    model = with_lora(model, weight_qtype="nf4", tile_size=16)
    assert quantised(model).keys() == names
    before = Snapshot.of(model)
    losses = train(make_trainer(model))
    after = Snapshot.of(model)
  # qwix finds quantised weights by their shapes in a module: it takes an expert's gate and up for no weight.
  alike = {name for name in names if re.search(r"experts\.(gate|up)_proj", name)}
  assert before.factors == {f"{name}_lora_{side}" for name in names - alike for side in "ab"}
  assert losses[-1] < 0.95 * losses[0]
  assert before.changed(after) == before.factors
