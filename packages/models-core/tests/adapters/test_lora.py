"""Low-rank factors: taken from models, merged into weights of any dtype and sharding, put back, and saved merged."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.adapters import (
  Adapter,
  Factors,
  adapter_of,
  lora_rules,
  merge_adapter,
  merge_into,
  merge_lora,
  save_lora_merged,
  save_merged,
  set_adapter,
)
from models_core.errors import AdapterError, CheckpointError, SaveError
from models_core.layers import dotted
from models_core.testing import to_tensors

from .tiny import (
  ALPHA,
  BF16,
  CONFIG,
  FAMILY,
  RANK,
  TABLE,
  D,
  adapted,
  equation_of,
  module_of,
  parameters,
  plain,
  write,
)


def exact(name, variable, model, scale=ALPHA / RANK, shared=False):
  """A parameter with the change of a model's factors, in float64."""
  a, b, w = equation_of(name)
  module, leaf = module_of(model, name)
  factors = (np.asarray(getattr(module, leaf + side)[...], np.float64) for side in ("_lora_a", "_lora_b"))
  equation = f"{a},{b.replace('e', '') if shared else b}->{w}"
  return np.asarray(variable.get_value(), np.float64) + scale * np.einsum(equation, *factors)


def factors_of(model):
  return {dotted(path): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}


class TestAdapterOf:
  def test_factors_are_found_by_the_parameters_that_they_lie_beside(self):
    model = adapted()
    adapter = adapter_of(model, alpha=ALPHA)
    assert (adapter.alpha, adapter.rank) == (ALPHA, RANK)
    assert adapter.factors.keys() == {
      f"layers.{i}.{name}"
      for i in range(2)
      for name in ("q.w", "o.w", "experts.gate", "experts.up", "experts.down")
    }
    found = adapter.factors["layers.1.experts.gate"]
    np.testing.assert_array_equal(found.a, model.layers[1].experts.gate_lora_a[...])
    np.testing.assert_array_equal(found.b, model.layers[1].experts.gate_lora_b[...])
    assert found.rank == RANK
    assert adapter_of(model, alpha=ALPHA, rank=RANK).rank == RANK

  def test_a_model_that_nobody_adapted(self):
    with pytest.raises(AdapterError, match=r"no nnx\.LoRAParam: apply LoRA to it first"):
      adapter_of(plain(), alpha=1.0)

  @pytest.mark.parametrize(("left", "missing"), [("a", "w_lora_b"), ("b", "w_lora_a")])
  def test_a_factor_without_its_twin(self, left, missing):
    model = adapted()
    delattr(model.layers[0].q, missing)
    with pytest.raises(
      AdapterError, match=rf"needs both factors, but these are missing: layers\.0\.q\.{missing}"
    ):
      adapter_of(model, alpha=1.0)

  def test_a_factor_of_another_name(self):
    model = adapted()
    model.layers[0].q.w_lora_c = nnx.LoRAParam(jnp.zeros((2, 2)))
    with pytest.raises(
      AdapterError, match=r"layers\.0\.q\.w_lora_c is an nnx\.LoRAParam: name it after the parameter"
    ):
      adapter_of(model, alpha=1.0)

  def test_all_ranks_must_be_the_given_one(self):
    with pytest.raises(AdapterError, match=r"they have the ranks \[2\], and rank=7 is given"):
      adapter_of(adapted(), alpha=1.0, rank=7)

  def test_each_parameter_may_have_its_own_rank_and_alpha(self):
    model = adapted(names=["layers.0.q.w", "layers.1.q.w", "layers.0.o.w"])
    model.layers[0].o.w_lora_a = nnx.LoRAParam(jnp.ones((24, 5)))
    model.layers[0].o.w_lora_b = nnx.LoRAParam(jnp.ones((5, D)))
    alphas = {"layers.0.q.w": 3.0, "layers.1.q.w": 3.0, "layers.0.o.w": 7.0}
    adapter = adapter_of(model, alpha=alphas)
    assert (adapter.rank, adapter.alpha, adapter.alphas) == (RANK, 3.0, alphas)
    merged, before = (parameters(m) for m in (merge_into(model, adapter, FAMILY), model))
    change = merged["layers.0.o.w"].get_value() - before["layers.0.o.w"].get_value()
    np.testing.assert_allclose(change, np.full((D, 24), 7.0 / 5 * 5), rtol=1e-5)
    with pytest.raises(AdapterError, match=r"alpha= lacks the alpha of layers\.0\.o\.w, layers\.1\.q\.w"):
      adapter_of(model, alpha={"layers.0.q.w": 3.0})


class TestMerging:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  @pytest.mark.parametrize("shared", [False, True], ids=["own b", "one b for all experts"])
  def test_the_sum_is_float32_and_rounded_once(self, dtype, shared):
    model = adapted(dtype, shared=shared)
    merged, before = parameters(merge_lora(model, FAMILY, alpha=ALPHA)), parameters(model)
    changed = adapter_of(model, alpha=ALPHA).factors
    assert merged.keys() == before.keys()
    assert len(changed) == 10
    for name, variable in before.items():
      old, new = (np.asarray(v.get_value()) for v in (variable, merged[name]))
      assert new.dtype == jnp.dtype(dtype)
      if name not in changed:
        np.testing.assert_array_equal(new, old)
        continue
      sum_ = exact(name, variable, model, shared=shared)
      assert np.abs(sum_ - old.astype(np.float64)).max() > 0.05
      if dtype == "float32":
        np.testing.assert_allclose(new, sum_, rtol=1e-5, atol=1e-6)
      else:
        # Of a sum that lies between two bfloat16 numbers the nearer is taken; float32's error may decide a tie.
        assert np.mean(new == sum_.astype(np.float32).astype(BF16)) > 0.999

  def test_float32_factors_change_bfloat16_weights(self):
    model = adapted("bfloat16", factor_dtype="float32")
    merged = parameters(merge_lora(model, FAMILY, alpha=ALPHA))
    for name in adapter_of(model, alpha=1.0).factors:
      sum_ = exact(name, parameters(model)[name], model)
      assert np.mean(np.asarray(merged[name].get_value()) == sum_.astype(np.float32).astype(BF16)) > 0.999

  @pytest.mark.parametrize("alpha", [0.5, 2, 16.0])
  def test_the_scale_is_alpha_over_the_rank(self, alpha):
    model = adapted()
    merged = parameters(merge_lora(model, FAMILY, alpha=alpha))
    name = "layers.0.o.w"
    sum_ = exact(name, parameters(model)[name], model, scale=alpha / RANK)
    np.testing.assert_allclose(merged[name].get_value(), sum_, rtol=1e-5, atol=1e-5)

  def test_the_adapted_model_stays_as_it_is_and_the_merged_one_is_plain(self):
    model = adapted()
    before = {name: np.array(v.get_value()) for name, v in (parameters(model) | factors_of(model)).items()}
    merged = merge_lora(model, FAMILY, alpha=ALPHA)
    after = parameters(model) | factors_of(model)
    assert before.keys() == after.keys()
    for name, values in before.items():
      np.testing.assert_array_equal(after[name].get_value(), values)
    assert not factors_of(merged)
    assert type(merged) is FAMILY.model_class
    assert merged.config == model.config

  def test_factors_that_a_model_carries_itself_are_left_out(self):
    """Another adapter is merged into a model that has one: only its own change is there."""
    other = adapter_of(adapted(seed=1), alpha=ALPHA)
    into_plain, into_adapted = (parameters(merge_into(m, other, FAMILY)) for m in (plain(), adapted(seed=2)))
    for name, variable in into_plain.items():
      np.testing.assert_array_equal(into_adapted[name].get_value(), variable.get_value())

  def test_an_adapter_is_merged_into_a_model_where_it_lies(self, mesh):
    adapter = adapter_of(adapted(), alpha=ALPHA)
    expected = parameters(merge_into(plain(), adapter, FAMILY))
    model = plain(mesh=mesh)
    before, merged = parameters(model), parameters(merge_into(model, adapter, FAMILY))
    assert merged.keys() == expected.keys()
    for name, variable in merged.items():
      np.testing.assert_allclose(variable.get_value(), expected[name].get_value(), rtol=1e-6, atol=1e-6)
      assert variable.get_value().sharding == before[name].get_value().sharding
      assert variable.get_metadata()["out_sharding"] == before[name].get_metadata()["out_sharding"]

  def test_factors_may_lie_on_another_mesh_or_in_host_memory(self, mesh, meshes):
    adapter = adapter_of(adapted(), alpha=ALPHA)
    expected = merge_adapter({n: v.get_value() for n, v in parameters(plain()).items()}, adapter, TABLE)
    arrays = {name: v.get_value() for name, v in parameters(plain(mesh=mesh)).items()}
    elsewhere = NamedSharding(meshes("auto", (4,), ("x",)), P())
    for place in (
      np.asarray,
      lambda x: jax.device_put(x, elsewhere),
      lambda x: jax.device_put(x, jax.devices()[3]),
    ):
      moved = {name: Factors(place(f.a), place(f.b)) for name, f in adapter.factors.items()}
      merged = merge_adapter(arrays, Adapter(moved, ALPHA, RANK), TABLE)
      for name, array in merged.items():
        assert array.sharding == arrays[name].sharding
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-6)

  def test_what_an_adapter_does_not_change_is_the_same_array(self):
    adapter = adapter_of(adapted(names=["layers.1.q.w"]), alpha=ALPHA)
    arrays = {name: v.get_value() for name, v in parameters(plain()).items()}
    merged = merge_adapter(arrays, adapter, TABLE)
    assert [name for name, array in merged.items() if array is not arrays[name]] == ["layers.1.q.w"]


class TestWhatDoesNotFit:
  def zeros(self, **changes):
    """Factors of layer 0's q, or what they are changed to, by name."""
    q = Factors(np.zeros((D, RANK), np.float32), np.zeros((RANK, 24), np.float32))
    return Adapter(
      {"layers.0.q.w": q} | {name.replace("__", "."): f for name, f in changes.items()}, 1.0, RANK
    )

  def arrays(self):
    return {name: v.get_value() for name, v in parameters(plain()).items()}

  @pytest.mark.parametrize(
    ("name", "a", "b", "message"),
    [
      (
        "layers__0__k__w",
        (D, 2),
        (2, D),
        r"the adapter changes layers\.0\.k\.w, which the model does not have",
      ),
      (
        "layers__2__q__w",
        (D, 2),
        (2, 4, 6),
        r"the adapter changes layers\.2\.q\.w, which the model does not have",
      ),
      ("layers__0__norm__w", (1, 2), (2, 8), r"layers\.\{i\}\.norm\.w is not a matrix .its layout is 'd'"),
      ("layers__0__q__w", (D, 3), (2, 24), r"q\.w_lora_a has shape \(8, 3\), .*\(24, 8\) needs \(8, 2\)"),
      ("layers__0__q__w", (D, 2), (2, 4, 6), r"q\.w_lora_b has shape \(2, 4, 6\), .* needs \(2, 24\)"),
      ("layers__0__experts__up", (2, 8, 2), (3, 2, 10), r"up_lora_a has shape \(2, 8, 2\)"),
      (
        "layers__0__experts__up",
        (3, 8, 2),
        (1, 2, 10),
        r"up_lora_b has shape \(1, 2, 10\), .* needs \(3, 2, 10\)",
      ),
      ("layers__0__experts__up", (3, 8, 2), (2, 9), r"up_lora_b has shape \(2, 9\), .* needs \(2, 10\)"),
    ],
  )
  def test_it_is_named(self, name, a, b, message):
    adapter = self.zeros(**{name: Factors(np.zeros(a, np.float32), np.zeros(b, np.float32))})
    with pytest.raises(AdapterError, match=message):
      merge_adapter(self.arrays(), adapter, TABLE)
    with pytest.raises(AdapterError, match=message):
      merge_into(plain(), adapter, FAMILY)

  def test_all_of_it_at_once(self):
    odd = Factors(np.zeros((1, RANK), np.float32), np.zeros((RANK, 1), np.float32))
    adapter = self.zeros(layers__0__k__w=odd, layers__0__norm__w=odd, layers__1__o__w=odd)
    with pytest.raises(AdapterError) as caught:
      merge_adapter(self.arrays(), adapter, TABLE)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the adapter does not fit the model:"
    assert len(lines) == 4

  def test_a_model_of_fewer_layers(self):
    arrays = {name: array for name, array in self.arrays().items() if not name.startswith("layers.1.")}
    with pytest.raises(
      AdapterError, match=r"the adapter changes layers\.1\.q\.w, which the model does not have"
    ):
      merge_adapter(arrays, adapter_of(adapted(), alpha=1.0), TABLE)


class TestSetAdapter:
  def test_numbers_are_rounded_to_the_dtype_that_the_factors_have(self):
    model, adapter = adapted("bfloat16"), adapter_of(adapted(seed=1), alpha=ALPHA)
    set_adapter(model, adapter)
    for name, variable in factors_of(model).items():
      value, source = variable.get_value(), name.removesuffix("_lora_a").removesuffix("_lora_b")
      expected = adapter.factors[source].a if name.endswith("_a") else adapter.factors[source].b
      assert value.dtype == BF16
      np.testing.assert_array_equal(value, np.asarray(expected).astype(BF16))

  def test_numbers_go_where_the_factors_lie(self, mesh):
    model = adapted(names=["layers.0.q.w"])
    sharding = NamedSharding(mesh, P("fsdp"))
    q = model.layers[0].q
    q.w_lora_a = nnx.LoRAParam(jax.device_put(np.zeros((D, RANK), np.float32), sharding))
    adapter = adapter_of(adapted(names=["layers.0.q.w"], seed=1), alpha=ALPHA)
    set_adapter(model, adapter)
    assert q.w_lora_a[...].sharding == sharding
    np.testing.assert_array_equal(q.w_lora_a[...], adapter.factors["layers.0.q.w"].a)

  def test_the_model_computes_with_them_and_its_weights_stay(self):
    model, adapter = adapted(), adapter_of(adapted(seed=1), alpha=ALPHA)
    set_adapter(model, adapter)
    for name, variable in parameters(merge_lora(model, FAMILY, alpha=ALPHA)).items():
      expected = parameters(merge_into(plain(), adapter, FAMILY))[name]
      np.testing.assert_array_equal(variable.get_value(), expected.get_value())
    for name, variable in parameters(model).items():
      np.testing.assert_array_equal(variable.get_value(), parameters(plain())[name].get_value())

  @pytest.mark.parametrize(
    ("ours", "theirs"),
    [(["layers.0.q.w"], None), (None, ["layers.0.q.w"]), (["layers.0.q.w"], ["layers.0.o.w"])],
  )
  def test_both_must_have_the_same_factors(self, ours, theirs):
    model, adapter = adapted(names=ours), adapter_of(adapted(names=theirs), alpha=1.0)
    before = {name: np.array(v.get_value()) for name, v in factors_of(model).items()}
    with pytest.raises(
      AdapterError, match=r"must have the same factors, but only one of them has layers\.0\."
    ):
      set_adapter(model, adapter)
    for name, variable in factors_of(model).items():
      np.testing.assert_array_equal(variable.get_value(), before[name])

  def test_a_long_list_is_cut(self):
    with pytest.raises(AdapterError) as caught:
      set_adapter(plain(), adapter_of(adapted(), alpha=1.0))
    assert str(caught.value).count("_lora_") == 8
    assert str(caught.value).endswith(", ...")

  def test_shapes_must_be_the_same(self):
    model, adapter = adapted(shared=True), adapter_of(adapted(seed=1), alpha=1.0)
    before = {name: np.array(v.get_value()) for name, v in factors_of(model).items()}
    with pytest.raises(
      AdapterError, match=r"down_lora_b has shape \(2, 8\) in the model, but shape \(3, 2, 8\) in the adapter"
    ):
      set_adapter(model, adapter)
    for name, variable in factors_of(model).items():
      np.testing.assert_array_equal(variable.get_value(), before[name])


class TestGoingOn:
  """A trainer goes on with an adapter: rules for qwix, and what is merged beforehand."""

  def test_rules_name_modules_ranks_and_alphas(self):
    factors = lambda rank, alpha=None: Factors(np.zeros((1, rank)), np.zeros((rank, 1)), alpha)
    adapter = Adapter(
      {
        "layers.0.attn.q_proj.w": factors(2),
        "layers.11.attn.q_proj.w": factors(2),
        "layers.1.attn.q_proj.w": factors(4),
        "lm_head.w": factors(2),
        "layers.0.mlp.experts.up_proj": factors(2, 9.0),
        "layers.0.mlp.experts.gate_proj": factors(2, 9.0),
      },
      alpha=3.0,
      rank=2,
    )
    assert lora_rules(adapter) == [
      {"module_path": "layers/(0|11)/attn/q_proj|lm_head", "rank": 2, "alpha": 3.0},
      {"module_path": "layers/1/attn/q_proj", "rank": 4, "alpha": 3.0},
      {"module_path": "layers/0/mlp/experts", "rank": 2, "alpha": 9.0},
    ]

  def test_what_is_no_factor_is_merged_first(self):
    adapter = adapter_of(adapted(names=["layers.0.q.w"], seed=1), alpha=ALPHA)
    norm = np.full(D, 0.5, np.float32)
    whole = dataclasses.replace(adapter, whole={"layers.1.norm.w": norm})
    model = adapted(names=["layers.0.q.w"])
    with pytest.raises(
      AdapterError, match=r"replaces layers\.1\.norm\.w .*merge adapter\.without_factors\(\)"
    ):
      set_adapter(model, whole)
    base = merge_into(plain(), whole.without_factors(), FAMILY)
    np.testing.assert_array_equal(base.layers[1].norm.w[...], norm)
    np.testing.assert_array_equal(base.layers[0].q.w[...], plain().layers[0].q.w[...])
    set_adapter(model, whole.factors_alone())
    np.testing.assert_array_equal(model.layers[0].q.w_lora_b[...], adapter.factors["layers.0.q.w"].b)

  @pytest.mark.parametrize(("field", "value"), [("magnitude", np.ones((24, 1))), ("initial", "pissa")])
  def test_factors_whose_result_is_no_sum_cannot_be_set(self, field, value):
    adapter = adapter_of(adapted(names=["layers.0.q.w"]), alpha=ALPHA)
    changed = {name: dataclasses.replace(f, **{field: value}) for name, f in adapter.factors.items()}
    with pytest.raises(AdapterError, match=r"layers\.0\.q\.w: a model with LoRA factors computes no"):
      set_adapter(adapted(names=["layers.0.q.w"]), dataclasses.replace(adapter, factors=changed))


class TestSavingMerged:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  @pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
  def test_the_checkpoint_is_as_it_was_but_for_the_change(self, dtype, fused, tmp_path):
    base = tmp_path / "base"
    tensors = write(
      base,
      plain(dtype),
      fused=fused,
      tokenizer__json="words",
      pytorch_model__bin="pickles",
      README__md="of the base",
    )
    adapter = adapter_of(adapted(), alpha=ALPHA)
    save_merged(base, tmp_path / "out", adapter, FAMILY, CONFIG)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "words"
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["eos_token_id"], raw["dtype"]) == (7, dtype)
    saved = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    write(tmp_path / "expected", merge_into(plain(dtype), adapter, FAMILY), fused=fused)
    expected = safetensors.numpy.load_file(tmp_path / "expected" / "model.safetensors")
    assert saved.keys() == tensors.keys() == expected.keys()
    for name, tensor in expected.items():
      assert saved[name].dtype == np.dtype(jnp.dtype(dtype))
      np.testing.assert_array_equal(saved[name], tensor)
    assert any((saved[name] != tensors[name]).any() for name in tensors)

  def test_a_head_that_repeats_the_embedding_repeats_the_merged_one(self, tmp_path):
    tensors = write(tmp_path / "base", plain(), head=True)
    adapter = adapter_of(adapted(names=["embed.w"]), alpha=ALPHA)
    save_merged(tmp_path / "base", tmp_path / "out", adapter, FAMILY, CONFIG)
    saved = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(saved["head.weight"], saved["model.embed.weight"])
    assert (saved["model.embed.weight"] != tensors["model.embed.weight"]).any()

  def test_a_family_s_saver_takes_the_factors_of_a_model(self, tmp_path):
    write(tmp_path / "base", plain("bfloat16"))
    model = adapted("bfloat16", factor_dtype="float32")
    save = lambda base, target, model, **how: save_lora_merged(model, FAMILY, base, target, **how)
    save(tmp_path / "base", tmp_path / "out", model, rank=RANK, alpha=ALPHA)
    saved = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in to_tensors(merge_lora(model, FAMILY, alpha=ALPHA), TABLE).items():
      np.testing.assert_array_equal(saved[name], tensor)
    with pytest.raises(AdapterError, match="rank=7 is given"):
      save(tmp_path / "base", tmp_path / "again", model, rank=7, alpha=ALPHA)
    with pytest.raises(AdapterError, match=r"no nnx\.LoRAParam"):
      save(tmp_path / "base", tmp_path / "again", plain(), rank=RANK, alpha=ALPHA)
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]

  def test_what_cannot_be_saved_leaves_nothing(self, tmp_path):
    write(tmp_path / "base", plain())
    odd = Adapter({"layers.9.q.w": Factors(np.zeros((D, 2)), np.zeros((2, 4, 6)))}, 1.0, 2)
    with pytest.raises(AdapterError, match=r"layers\.9\.q\.w"):
      save_merged(tmp_path / "base", tmp_path / "out", odd, FAMILY, CONFIG)
    adapter = adapter_of(adapted(), alpha=ALPHA)
    with pytest.raises(SaveError, match="exists"):
      save_merged(tmp_path / "base", tmp_path / "base", adapter, FAMILY, CONFIG)
    with pytest.raises(CheckpointError, match="no such file or directory"):
      save_merged(tmp_path / "missing", tmp_path / "out", adapter, FAMILY, CONFIG)
    tensors = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    safetensors.numpy.save_file(tensors | {"other": np.zeros(3)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match="other"):
      save_merged(tmp_path / "base", tmp_path / "out", adapter, FAMILY, CONFIG)
    assert os.listdir(tmp_path) == ["base"]
