import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError
from models_core.safetensors_loader import load_and_create_model
from models_core.weights.table import WeightTable

D, N, H = 8, 4, 2
PARAMETERS = {
  "emb": ((6, D), P("tp", "fsdp")),
  "layers.0.q": ((D, N, H), P("fsdp", "tp")),
  "layers.1.q": ((D, N, H), P("fsdp", "tp")),
  "norm": ((D,), P()),
}
MAPPING = {
  r"model\.embed\.weight": ("emb", None),
  r"model\.layers\.([0-9]+)\.q_proj\.weight": (r"layers.\1.q", ((1, 0), (D, N, H))),
  r"model\.norm\.weight": ("norm", (None, None)),
}


@pytest.fixture
def tensors(rng):
  shapes = {
    "model.embed.weight": (6, D),
    "model.layers.0.q_proj.weight": (N * H, D),
    "model.layers.1.q_proj.weight": (N * H, D),
    "model.norm.weight": (D,),
  }
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["bf17", "int32", "float64"])
def test_a_dtype_that_parameters_cannot_have_is_an_error(dtype, save, toy, tensors):
  with pytest.raises(TypeError, match=rf"^dtype\b.*{dtype}"):
    load_and_create_model(save(tensors), toy, PARAMETERS, lambda config: MAPPING, dtype=dtype)


@pytest.mark.parametrize("place", ["one device", "mesh"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float16"])
def test_a_dictionary_of_patterns_permutes_and_reshapes(place, dtype, save, toy, tensors, mesh):
  mesh = mesh if place == "mesh" else None
  model = load_and_create_model(save(tensors), toy, PARAMETERS, lambda config: MAPPING, mesh, dtype=dtype)
  expected = {
    "emb": tensors["model.embed.weight"],
    "norm": tensors["model.norm.weight"],
    ("layers", 0, "q"): tensors["model.layers.0.q_proj.weight"].T.reshape(D, N, H),
    ("layers", 1, "q"): tensors["model.layers.1.q_proj.weight"].T.reshape(D, N, H),
  }
  flat = {path if len(path) > 1 else path[0]: v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
  assert flat.keys() == expected.keys()
  for path, array in flat.items():
    np.testing.assert_array_equal(np.asarray(array), expected[path].astype(dtype or np.float32), strict=True)
  if mesh is not None:
    assert flat["emb"].sharding == NamedSharding(mesh, P("tp", "fsdp"))
    assert flat["layers", 1, "q"].sharding == NamedSharding(mesh, P("fsdp", "tp"))


def test_a_weight_table_or_a_function_that_gives_one_is_a_mapping_too(save, toy, tensors):
  table = WeightTable(
    ("emb", "model.embed.weight", "v d"),
    ("layers.{i}.q", "model.layers.{i}.q_proj.weight", "(n h) d -> d n h"),
    ("norm", "model.norm.weight", "d"),
  )
  directory = save(tensors)
  plain = load_and_create_model(directory, toy, PARAMETERS, lambda config: MAPPING)
  for mapping in (table, lambda config: table):
    model = load_and_create_model(directory, toy, PARAMETERS, mapping)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(plain), nnx.state(model))
  with pytest.raises(TypeError, match="preprocess_fn"):
    load_and_create_model(directory, toy, PARAMETERS, table, preprocess_fn=dict)


def test_the_mapping_is_made_from_the_config(save, toy, tensors):
  seen = []
  load_and_create_model(save(tensors), toy, PARAMETERS, lambda config: seen.append(config) or MAPPING)
  assert seen == [PARAMETERS]


class TestProblems:
  def problems(self, directory, toy, mapping, parameters=PARAMETERS, **options):
    with pytest.raises(CheckpointError) as caught:
      load_and_create_model(directory, toy, parameters, lambda config: mapping, **options)
    assert str(directory) in str(caught.value)
    return caught.value.problems

  def test_a_pattern_must_match_the_whole_name(self, save, toy, tensors):
    tensors |= {
      "model.norm.weight.x": np.zeros(1, np.float32),
      "x.model.norm.weight": np.zeros(1, np.float32),
    }
    found = self.problems(save(tensors), toy, MAPPING)
    assert [problem.split()[0] for problem in found] == ["model.norm.weight.x", "x.model.norm.weight"]
    assert all("is unexpected: no pattern" in problem for problem in found)

  def test_a_tensor_that_two_patterns_match_is_ambiguous(self, save, toy, tensors):
    (problem,) = self.problems(save(tensors), toy, MAPPING | {r"model\.n.*": ("other", None)})
    assert "model.norm.weight (8,) is ambiguous: 2 patterns" in problem

  def test_two_tensors_for_one_name_are_duplicates(self, save, toy, tensors):
    mapping = MAPPING | {r"model\.layers\.([0-9]+)\.q_proj\.weight": ("layers.0.q", None)}
    (problem,) = self.problems(save(tensors), toy, mapping)
    assert problem.startswith("layers.0.q occurs twice")

  @pytest.mark.parametrize(
    "transform", [((1, 0, 2), None), ((0, 0), None), ((0, 2), None), (None, (3, 3)), ((1, 0), (-1, -1))]
  )
  def test_an_impossible_transform_is_named(self, save, toy, tensors, transform):
    (problem,) = self.problems(save(tensors), toy, MAPPING | {r"model\.embed\.weight": ("emb", transform)})
    assert f"model.embed.weight (6, 8) does not fit the transform {transform}" in problem

  def test_missing_unexpected_and_misshaped_parameters_are_one_error(self, save, toy, tensors):
    mapping = MAPPING | {
      r"model\.embed\.weight": ("emb", ((1, 0), None)),
      r"model\.norm\.weight": ("final_norm", None),
    }
    found = self.problems(save(tensors), toy, mapping)
    assert len(found) == 3
    assert "model.embed.weight gives emb the shape (8, 6), but the parameter has the shape (6, 8)" in found[0]
    assert "the parameter norm (8,) is missing" in found[1]
    assert "model.norm.weight gives final_norm, which is unexpected" in found[2]

  def test_broken_headers_are_told_with_the_rest(self, save, toy, tensors):
    directory = save(tensors)
    (directory / "model.safetensors").write_bytes(b"")
    (problem,) = self.problems(directory, toy, MAPPING)
    assert problem.startswith("model.safetensors: not a safetensors file: it has only 0 bytes")

  def test_a_directory_without_weights_is_refused(self, toy, tmp_path):
    assert self.problems(tmp_path, toy, MAPPING) == ("no safetensors file: the directory is empty",)


class TestPreprocess:
  PARAMETERS = {
    "layers.0.qkv": ((3, N, D, H), P(None, "tp", "fsdp")),
    "layers.1.qkv": ((3, N, D, H), P(None, "tp", "fsdp")),
    "norm": ((D,), P("tp")),
  }
  MAPPING = {
    r"l\.([0-9]+)\.([qkv])\.weight": (r"tmp.layers.\1.attn.\2", ((1, 0), (D, N, H))),
    r"norm": ("norm", None),
  }

  @pytest.fixture
  def tensors(self, rng):
    names = [f"l.{i}.{x}.weight" for i in range(2) for x in "qkv"]
    tensors = {name: rng.normal(size=(N * H, D)).astype(ml_dtypes.bfloat16) for name in names}
    return tensors | {"norm": rng.normal(size=D).astype(ml_dtypes.bfloat16)}

  @staticmethod
  def stack(state):
    output, pending = {}, {}
    for key, value in state.items():
      if match := re.fullmatch(r"tmp\.layers\.([0-9]+)\.attn\.([qkv])", key):
        pending.setdefault(match[1], {})[match[2]] = value
      else:
        output[key] = value
    for layer, qkv in pending.items():
      output[f"layers.{layer}.qkv"] = jnp.stack([qkv[x].transpose(1, 0, 2) for x in "qkv"])
    return output

  @pytest.mark.parametrize("place", ["one device", "mesh"])
  @pytest.mark.parametrize("dtype", [None, jnp.float32])
  def test_a_function_of_the_flat_dictionary_makes_parameters(self, place, dtype, save, toy, tensors, mesh):
    mesh = mesh if place == "mesh" else None
    model = load_and_create_model(
      save(tensors), toy, self.PARAMETERS, lambda config: self.MAPPING, mesh, self.stack, dtype
    )
    for i in range(2):
      array = model.layers[i]["qkv"][...]
      expected = np.stack([tensors[f"l.{i}.{x}.weight"].T.reshape(D, N, H).swapaxes(0, 1) for x in "qkv"])
      np.testing.assert_array_equal(np.asarray(array), expected.astype(dtype or expected.dtype), strict=True)
      if mesh is not None:
        assert array.sharding == NamedSharding(mesh, P(None, "tp", "fsdp"))
    np.testing.assert_array_equal(
      np.asarray(model.norm[...]), tensors["norm"].astype(dtype or tensors["norm"].dtype)
    )

  def test_it_may_return_a_nested_dictionary(self, save, toy, tensors):
    def nest(state):
      flat = self.stack(state)
      return {"norm": flat["norm"], "layers": {i: {"qkv": flat[f"layers.{i}.qkv"]} for i in range(2)}}

    directory = save(tensors)
    nested = load_and_create_model(
      directory, toy, self.PARAMETERS, lambda c: self.MAPPING, preprocess_fn=nest
    )
    flat = load_and_create_model(
      directory, toy, self.PARAMETERS, lambda c: self.MAPPING, preprocess_fn=self.stack
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(nested), nnx.state(flat))

  def test_what_it_returns_is_checked_like_a_checkpoint(self, save, toy, tensors):
    def wrong(state):
      return {"norm": jnp.zeros(3), "layers.0.qkv": jnp.zeros((3, N, D, H)), "left": jnp.zeros(1)}

    with pytest.raises(CheckpointError) as caught:
      load_and_create_model(save(tensors), toy, self.PARAMETERS, lambda c: self.MAPPING, preprocess_fn=wrong)
    found = sorted(caught.value.problems)
    assert "preprocess_fn gives left, which is unexpected" in found[0]
    assert "preprocess_fn gives norm the shape (3,), but the parameter has the shape (8,)" in found[1]
    assert "the parameter layers.1.qkv (3, 4, 8, 2) is missing" in found[2]


def test_a_model_of_flax_layers_without_annotations_loads(save, rng, mesh):
  class Foreign(nnx.Module):
    def __init__(self, config, *, rngs):
      self.linear = nnx.Linear(4, 6, rngs=rngs)
      self.norm = nnx.LayerNorm(6, rngs=rngs)
      self.conv = nnx.Conv(2, 3, (3,), rngs=rngs)
      self.batch_norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
      return self.norm(self.linear(x))

  shapes = {
    "linear.weight": (6, 4),
    "linear.bias": (6,),
    "norm.weight": (6,),
    "norm.bias": (6,),
    "conv.weight": (3, 2, 3),
    "conv.bias": (3,),
    "bn.weight": (2,),
    "bn.bias": (2,),
    "bn.running_mean": (2,),
    "bn.running_var": (2,),
  }
  tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  tensors["bn.num_batches_tracked"] = np.array(3, np.int64)
  mapping = {
    r"linear\.weight": ("linear.kernel", ((1, 0), None)),
    r"norm\.weight": ("norm.scale", None),
    r"conv\.weight": ("conv.kernel", ((2, 1, 0), None)),
    r"(.*)\.bias": (r"\1.bias", None),
    r"bn\.weight": ("batch_norm.scale", None),
    r"bn\.running_(mean|var)": (r"batch_norm.\1", None),
    r"bn\.num_batches_tracked": ("unused", None),
  }

  def rename(state):
    state = {name.replace("bn.", "batch_norm."): array for name, array in state.items()}
    del state["unused"]
    return state

  for place in (None, mesh):
    model = load_and_create_model(save(tensors), Foreign, None, lambda c: mapping, place, rename)
    np.testing.assert_array_equal(model.conv.kernel[...], tensors["conv.weight"].transpose(2, 1, 0))
    np.testing.assert_array_equal(model.batch_norm.mean[...], tensors["bn.running_mean"])
    x = rng.normal(size=(2, 4)).astype(np.float32)
    y = x @ tensors["linear.weight"].T + tensors["linear.bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    expected = y * tensors["norm.weight"] + tensors["norm.bias"]
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, rtol=1e-4, atol=1e-5)
