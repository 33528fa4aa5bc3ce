"""Names that are right but for a wrapper's prefix are one problem, with the remedy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError
from models_core.formats import LocalFiles, read_safetensors
from models_core.loading import abstract_model, load, plan_load
from models_core.weights import Tied, WeightTable

TABLE = WeightTable(
  ("emb", "model.embed.weight", "v d"),
  ("layers.{i}.w", "model.layers.{i}.w.weight", "d"),
  ("head", "lm_head.weight", "v d"),
  tied=[Tied("lm_head.weight", "model.embed.weight")],
)
TENSORS = {"model.embed.weight": (4, 2), "lm_head.weight": (4, 2)} | {
  f"model.layers.{i}.w.weight": (2,) for i in range(8)
}
PARAMETERS = {"emb": ((4, 2), P()), "head": ((4, 2), P())} | {f"layers.{i}.w": ((2,), P()) for i in range(8)}
TIED = {name: shape for name, shape in PARAMETERS.items() if name != "head"}


@pytest.fixture
def plan(save, toy, rng):
  def make(rename, parameters=PARAMETERS, **more):
    tensors = {
      rename(name): rng.normal(size=shape).astype(np.float32) for name, shape in TENSORS.items()
    } | more
    tensors.pop(None, None)
    checkpoint = read_safetensors(LocalFiles(str(save(tensors))))
    return tensors, plan_load(checkpoint, abstract_model(toy, parameters), TABLE)

  return make


def loaded(plan):
  return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(load(plan)))}


@pytest.mark.parametrize(
  "rename", [lambda n: n.removeprefix("model."), lambda n: f"model.{n}"], ids=["without", "twice"]
)
def test_what_transformers_loads_is_loaded(plan, rename):
  tensors, made = plan(rename)
  values = loaded(made)
  np.testing.assert_array_equal(values["emb"][...], tensors[rename("model.embed.weight")])
  np.testing.assert_array_equal(values["layers.7.w"][...], tensors[rename("model.layers.7.w.weight")])
  np.testing.assert_array_equal(values["head"][...], tensors[rename("lm_head.weight")])


def headless(name):
  return None if name == "lm_head.weight" else name.removeprefix("model.")


def test_a_base_model_needs_no_head_if_it_is_tied(plan):
  tensors, made = plan(headless, TIED)
  assert jnp.array_equal(loaded(made)["emb"][...], tensors["embed.weight"])


def test_a_base_model_without_the_head_that_is_needed_says_why(plan):
  with pytest.raises(CheckpointError) as caught:
    plan(headless)
  (problem,) = caught.value.problems
  assert problem.startswith(
    "lm_head.weight is missing: the parameter head (4, 2) needs it; the names lack the prefix"
  )


@pytest.mark.parametrize(
  ("prefix", "said"),
  [
    ("_orig_mod.", "'_orig_mod', which torch.compile adds: save model._orig_mod instead of model"),
    ("module.", "'module', which DataParallel, DDP and DeepSpeed add: save model.module"),
    ("_orig_mod.module.", "'_orig_mod', which torch.compile adds"),
    ("_fsdp_wrapped_module.", "'_fsdp_wrapped_module', which FSDP adds"),
    ("base_model.model.", "one prefix too many: peft adds it: merge the adapter with merge_and_unload()"),
    (
      "policy.",
      "all 10 tensors begin with 'policy.', one prefix too many: save the model inside the wrapper",
    ),
  ],
)
@pytest.mark.parametrize("is_bare", [False, True])
def test_one_prefix_too_many_is_one_problem(plan, prefix, said, is_bare):
  with pytest.raises(CheckpointError) as caught:
    plan(lambda name: prefix + (name.removeprefix("model.") if is_bare else name))
  (problem,) = caught.value.problems
  assert said in problem


def test_a_wrapper_in_the_middle_is_found(plan):
  with pytest.raises(CheckpointError) as caught:
    plan(lambda name: name.replace(".w.weight", "._checkpoint_wrapped_module.w.weight"))
  (problem,) = caught.value.problems
  assert "such as model.layers.0._checkpoint_wrapped_module.w.weight" in problem


def test_the_state_of_a_model_with_an_adapter_is_one_problem(plan):
  factors = {"base_model.model.model.layers.0.w.lora_A.default.weight": np.zeros((1, 2), np.float32)}
  with pytest.raises(CheckpointError) as caught:
    plan(lambda name: f"base_model.model.{name}".replace(".w.", ".w.base_layer."), **factors)
  (problem,) = caught.value.problems
  assert problem.startswith(
    "the tensors are those of a model with an adapter of peft, such as base_model.model."
  )


def test_other_tensors_beside_a_prefix_do_not_hide_it(plan):
  with pytest.raises(CheckpointError) as caught:
    plan(lambda name: f"pretrained_model.{name}", **{"v_head.summary.weight": np.zeros((1, 2), np.float32)})
  (problem,) = caught.value.problems
  assert problem.startswith("the names of 10 of the 11 tensors begin with 'pretrained_model.'")


def test_another_architecture_is_one_problem(plan):
  with pytest.raises(CheckpointError) as caught:
    plan(
      lambda name: (
        name.replace("model.embed", "tok_embeddings").replace("model", "x").replace("lm_head", "output")
      )
    )
  (problem,) = caught.value.problems
  assert problem.startswith("none of the 10 tensors, such as ")
  assert "their naming scheme is Meta's own" in problem


def test_a_few_wrong_names_are_listed(plan):
  with pytest.raises(CheckpointError) as caught:
    plan(lambda name: name.replace("layers.3", "layers.33"))
  assert [problem.split()[0] for problem in caught.value.problems] == [
    "model.layers.3.w.weight",
    "model.layers.33.w.weight",
  ]
