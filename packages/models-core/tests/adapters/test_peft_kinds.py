"""Adapters of peft that are more than factors, compared with what peft's documentation says they do."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models_core.adapters import load_peft_adapter, merge_into, save_merged, save_peft_adapter
from models_core.errors import AdapterError
from models_core.safetensors_saver import save_model_to_safetensors

from .pair import FAMILY, Config, D, F, V, arrays, plain

RANK, ALPHA = 2, 3
SCALE = ALPHA / RANK
UNTIED, TIED = Config(), Config(weight_tying=True)
# Shapes of a module's weight in transformers.
SHAPES = {"q_proj": (F, D), "o_proj": (D, F), "lm_head": (V, D)}


def numbers(shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.3


def factors(*modules, rank=RANK, rows=V):
  """Factors of some modules: A [r, in] and B [out, r]; of the embedding A [r, rows] and B [dim, r]."""
  tensors = {}
  for seed, module in enumerate(modules):
    if module.endswith("embed_tokens"):
      tensors[f"{module}.lora_embedding_A"] = numbers((rank, rows), seed)
      tensors[f"{module}.lora_embedding_B"] = numbers((D, rank), seed + 50)
    else:
      out, into = SHAPES[module.rpartition(".")[2]]
      out = rows if module == "lm_head" else out
      tensors[f"{module}.lora_A.weight"] = numbers((rank, into), seed)
      tensors[f"{module}.lora_B.weight"] = numbers((out, rank), seed + 50)
  return tensors


def layers(name):
  return [f"model.layers.{i}.{name}" for i in range(2)]


def delta(tensors, module, scale=SCALE):
  """What peft adds to the weight of a module."""
  if module.endswith("embed_tokens"):
    a, b = (tensors[f"{module}.lora_embedding_{side}"] for side in "AB")
    return scale * (b @ a).T
  a, b = (tensors[f"{module}.lora_{side}.weight"] for side in "AB")
  return scale * b @ a


@pytest.fixture
def write(tmp_path):
  """`write(tensors, **keys)`: directory of an adapter of peft."""

  def write(tensors, targets=("q_proj",), **keys):
    safetensors.numpy.save_file(
      {f"base_model.model.{name}": data for name, data in tensors.items()},
      tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets} | keys
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path

  return write


def merged(directory, config=UNTIED, mesh=None):
  """The model that an adapter is merged into, before and after, as arrays by name."""
  model = plain(config, mesh)
  after = merge_into(model, load_peft_adapter(directory, FAMILY, config), FAMILY)
  return arrays(model), arrays(after), after


def check(before, after, **changed):
  """That named parameters have these values, and all others their old ones."""
  changed = {name.replace("__", "."): value for name, value in changed.items()}
  for name, value in after.items():
    expected = changed[name] if name in changed else before[name]
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6, err_msg=name)
  assert changed.keys() <= after.keys()


class TestWhole:
  def test_norms_and_head(self, write):
    norms = {f"{name}.weight": numbers((D,), i) for i, name in enumerate(layers("norm"))}
    head = numbers((V, D), 7)
    directory = write(
      {**factors(*layers("q_proj")), **norms, "lm_head.weight": head}, modules_to_save=["norm", "lm_head"]
    )
    before, after, _ = merged(directory)
    tensors = factors(*layers("q_proj"))
    check(
      before,
      after,
      **{f"layers__{i}__norm__w": norms[f"model.layers.{i}.norm.weight"] for i in range(2)},
      **{
        f"layers__{i}__q_proj__w": before[f"layers.{i}.q_proj.w"] + delta(tensors, m)
        for i, m in enumerate(layers("q_proj"))
      },
      head__w=head,
    )

  def test_names_that_some_versions_write(self, write):
    head = numbers((V, D), 7)
    tensors = factors(*layers("q_proj"))
    old = {"lm_head.modules_to_save.weight": head}
    both = {
      "lm_head.weight": head,
      "lm_head.modules_to_save.weight": head,
      "lm_head.original_module.weight": head + 1,
    }
    for names in (old, both):
      _, after, _ = merged(write({**tensors, **names}, modules_to_save=["lm_head"]))
      np.testing.assert_array_equal(after["head.w"], head)

  def test_factors_belong_to_the_stored_base_layer(self, write):
    tensors = factors(*layers("q_proj"), "lm_head")
    base = numbers((V, D), 7)
    directory = write({**tensors, "lm_head.base_layer.weight": base}, ["q_proj", "lm_head"])
    _, after, _ = merged(directory)
    np.testing.assert_allclose(after["head.w"], base + delta(tensors, "lm_head"), rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterError, match=r"nothing that these tensors belong to: lm_head\.weight"):
      merged(write({**tensors, "lm_head.weight": base}, ["q_proj", "lm_head"]))

  def test_one_that_is_missing(self, write):
    tensors = factors(*layers("q_proj")) | {"model.layers.0.norm.weight": numbers((D,), 0)}
    with pytest.raises(
      AdapterError, match=r"modules_to_save=\['norm'\] names: model\.layers\.1\.norm\.weight"
    ):
      merged(write(tensors, modules_to_save=["norm"]))

  def test_one_of_another_shape(self, write):
    tensors = factors(*layers("q_proj")) | {"model.layers.0.norm.weight": numbers((D + 1,), 0)}
    with pytest.raises(AdapterError, match=r"norm\.weight has shape \(9,\), but the model needs \(8,\)"):
      merged(write(tensors))


class TestBiases:
  BIASES = {f"{name}.base_layer.bias": numbers((F,), 9) for name in layers("q_proj")}

  @pytest.mark.parametrize("bias", ["all", "lora_only"])
  def test_they_are_replaced(self, bias, write):
    _, after, _ = merged(write(factors(*layers("q_proj")) | self.BIASES, bias=bias))
    for i in range(2):
      np.testing.assert_array_equal(after[f"layers.{i}.q_proj.b"], numbers((F,), 9))

  @pytest.mark.parametrize("bias", ["all", "lora_only"])
  def test_they_must_be_there(self, bias, write):
    with pytest.raises(
      AdapterError, match=rf"lacks tensors that bias='{bias}' names: model\.layers\.0\.q_proj\.bias"
    ):
      merged(write(factors(*layers("q_proj")), bias=bias))

  def test_of_modules_without_any_nothing_is_expected(self, write):
    before, after, _ = merged(write(factors(*layers("o_proj")), ["o_proj"], bias="lora_only"))
    np.testing.assert_array_equal(after["layers.0.q_proj.b"], before["layers.0.q_proj.b"])

  def test_those_of_factors_are_added(self, write):
    tensors = factors(*layers("q_proj")) | {
      f"{name}.lora_B.bias": numbers((F,), 9) for name in layers("q_proj")
    }
    before, after, _ = merged(write(tensors, lora_bias=True))
    np.testing.assert_allclose(
      after["layers.1.q_proj.b"], before["layers.1.q_proj.b"] + SCALE * numbers((F,), 9), rtol=1e-5, atol=1e-6
    )

  def test_those_of_factors_need_a_bias(self, write):
    tensors = factors(*layers("o_proj")) | {
      f"{name}.lora_B.bias": numbers((D,), 9) for name in layers("o_proj")
    }
    with pytest.raises(
      AdapterError, match=r"has no bias to add it to, .*: model\.layers\.0\.o_proj, model\.layers\.1"
    ):
      merged(write(tensors, ["o_proj"], lora_bias=True))


class TestOtherArithmetic:
  @pytest.mark.parametrize("suffix", ["", ".weight"])
  def test_dora_scales_each_row_to_its_magnitude(self, suffix, write):
    tensors = factors(*layers("q_proj"))
    magnitudes = {f"{name}.lora_magnitude_vector{suffix}": 1 + numbers((F,), 5) for name in layers("q_proj")}
    before, after, _ = merged(write(tensors | magnitudes, use_dora=True))
    w = before["layers.0.q_proj.w"] + delta(tensors, "model.layers.0.q_proj")
    expected = (1 + numbers((F,), 5))[:, None] * w / np.linalg.norm(w, axis=1, keepdims=True)
    np.testing.assert_allclose(after["layers.0.q_proj.w"], expected, rtol=2e-5, atol=2e-6)

  def test_dora_scales_the_columns_of_an_embedding(self, write):
    name = "model.embed_tokens"
    tensors = factors(name) | {f"{name}.lora_magnitude_vector": 1 + numbers((D,), 5)}
    before, after, _ = merged(write(tensors, ["embed_tokens"], use_dora=True))
    w = before["embed.w"] + delta(tensors, name)
    np.testing.assert_allclose(
      after["embed.w"], (1 + numbers((D,), 5)) * w / np.linalg.norm(w, axis=0), rtol=2e-5, atol=2e-6
    )

  def test_magnitudes_without_dora_are_left_over(self, write):
    tensors = factors(*layers("q_proj")) | {"model.layers.0.q_proj.lora_magnitude_vector": numbers((F,), 5)}
    with pytest.raises(AdapterError, match=r"nothing that these tensors belong to: .*lora_magnitude_vector"):
      merged(write(tensors))

  def test_pissa_takes_out_the_largest_singular_values(self, write):
    tensors = factors(*layers("q_proj"))
    before, after, _ = merged(write(tensors, init_lora_weights="pissa"))
    w = before["layers.1.q_proj.w"]
    u, s, v = np.linalg.svd(w.astype(np.float64))
    s[:RANK] = 0
    expected = u[:, : len(s)] @ np.diag(s) @ v + delta(tensors, "model.layers.1.q_proj")
    assert np.abs(expected - w - delta(tensors, "model.layers.1.q_proj")).max() > 0.1
    np.testing.assert_allclose(after["layers.1.q_proj.w"], expected, rtol=2e-5, atol=2e-6)

  def test_olora_takes_out_the_first_columns_of_q(self, write):
    tensors = factors(*layers("q_proj"))
    before, after, _ = merged(write(tensors, init_lora_weights="olora", use_rslora=True))
    w, scale = before["layers.1.q_proj.w"], ALPHA / np.sqrt(RANK)
    q, r = np.linalg.qr(w.astype(np.float64))
    expected = w - scale * q[:, :RANK] @ r[:RANK] + delta(tensors, "model.layers.1.q_proj", scale)
    np.testing.assert_allclose(after["layers.1.q_proj.w"], expected, rtol=2e-5, atol=2e-6)

  def test_they_are_merged_on_a_mesh(self, write, mesh):
    directory = write(factors(*layers("q_proj")), init_lora_weights="pissa")
    _, expected, _ = merged(directory)
    _, after, model = merged(directory, mesh=mesh)
    np.testing.assert_allclose(
      after["layers.0.q_proj.w"], expected["layers.0.q_proj.w"], rtol=1e-5, atol=1e-6
    )
    assert model.layers[0].q_proj.w[...].sharding == plain(UNTIED, mesh).layers[0].q_proj.w[...].sharding


class TestTies:
  """transformers' model has a module for the head, whose matrix may be the embedding's."""

  def test_the_embedding_alone_is_taken_apart(self, write):
    tensors = factors("model.embed_tokens")
    before, after, model = merged(write(tensors, ["embed_tokens"]), TIED)
    assert model.config == dataclasses.replace(TIED, weight_tying=False)
    check(
      before | {"head.w": before["embed.w"]},
      after,
      embed__w=before["embed.w"] + delta(tensors, "model.embed_tokens"),
    )

  def test_the_head_alone_is_taken_apart(self, write):
    tensors = factors("lm_head")
    before, after, model = merged(write(tensors, ["lm_head"]), TIED)
    assert not model.config.weight_tying
    check(before, after, head__w=before["embed.w"] + delta(tensors, "lm_head"))

  def test_both_stay_one_if_both_change_alike(self, write):
    tensors = factors("model.embed_tokens")
    twin = {
      "lm_head.lora_A.weight": tensors["model.embed_tokens.lora_embedding_B"].T.copy(),
      "lm_head.lora_B.weight": tensors["model.embed_tokens.lora_embedding_A"].T.copy(),
    }
    directory = write(tensors | twin, ["embed_tokens"], ensure_weight_tying=True)
    before, after, model = merged(directory, TIED)
    assert model.config == TIED
    check(before, after, embed__w=before["embed.w"] + delta(tensors, "model.embed_tokens"))

  @pytest.mark.parametrize("ensured", [True, False])
  def test_a_whole_embedding(self, ensured, write):
    tensors = {"model.embed_tokens.weight": numbers((V, D), 5)}
    directory = write(
      tensors, "dummy-target-modules", modules_to_save=["embed_tokens"], ensure_weight_tying=ensured
    )
    before, after, model = merged(directory, TIED)
    assert model.config.weight_tying == ensured
    head = {} if ensured else {"head.w": before["embed.w"]}
    check(before | head, after, embed__w=numbers((V, D), 5))

  def test_rows_belong_to_both(self, write):
    rows = numbers((2, D), 5)
    directory = write(
      {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
      "dummy-target-modules",
      trainable_token_indices=[7, 2],
    )
    before, after, _ = merged(directory, TIED)
    expected = before["embed.w"].copy()
    expected[[7, 2]] = rows
    check(before, after, embed__w=expected)
    before, after, _ = merged(directory, UNTIED)
    check(before, after, embed__w=expected)

  def test_a_row_beyond_the_vocabulary(self, write):
    tensors = {"model.embed_tokens.token_adapter.trainable_tokens_delta": numbers((1, D), 5)}
    with pytest.raises(AdapterError, match=r"replaces row 12 of embed\.w, which has 12 rows"):
      merged(write(tensors, "dummy-target-modules", trainable_token_indices=[V]))

  def test_a_family_that_has_one_matrix_for_both(self, write):
    @dataclasses.dataclass(frozen=True)
    class OneMatrix:
      vocab_size: int = V
      num_layers: int = 2

    class Model(type(plain(TIED))):
      def __init__(self, config, *, rngs):
        super().__init__(TIED, rngs=rngs)

    family = dataclasses.replace(FAMILY, name="one", model_class=Model, config_class=OneMatrix)
    with pytest.raises(
      AdapterError, match=r"one models have one matrix for both: merge it with peft into a model"
    ):
      load_peft_adapter(write(factors("lm_head"), ["lm_head"]), family, OneMatrix())


class TestVocabulary:
  @pytest.mark.parametrize("size", [V + 3, V - 2])
  @pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
  def test_model_and_configuration_get_its_size(self, size, config, write, tmp_path, mesh):
    whole = {
      "model.embed_tokens.weight": numbers((size, D), 5),
      "lm_head.weight": numbers((size, D), 5 + (config is UNTIED)),
    }
    directory = write(factors(*layers("q_proj")) | whole)
    for where in (None, mesh):
      _, after, model = merged(directory, config, where)
      assert model.config == dataclasses.replace(config, vocab_size=size)
      np.testing.assert_array_equal(after["embed.w"], whole["model.embed_tokens.weight"])
      assert ("head.w" in after) == (config is UNTIED)
    save_model_to_safetensors(nnx.state(plain(config)), tmp_path / "base", family=FAMILY, config=config)
    adapter = load_peft_adapter(directory, FAMILY, config)
    save_merged(tmp_path / "base", tmp_path / "out", adapter, FAMILY, config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size
    saved = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(saved["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])
    np.testing.assert_allclose(saved["model.layers.0.q_proj.weight"], after["layers.0.q_proj.w"], rtol=1e-6)

  def test_factors_of_the_grown_embedding(self, write):
    base = numbers((V + 3, D), 5)
    tensors = factors("model.embed_tokens", rows=V + 3)
    directory = write(
      tensors | {"model.embed_tokens.base_layer.weight": base, "lm_head.weight": base}, ["embed_tokens"]
    )
    _, after, _ = merged(directory)
    np.testing.assert_allclose(
      after["embed.w"], base + delta(tensors, "model.embed_tokens"), rtol=1e-5, atol=1e-6
    )

  def test_embedding_without_head(self, write):
    directory = write(factors(*layers("q_proj")) | {"model.embed_tokens.weight": numbers((V + 3, D), 5)})
    adapter = load_peft_adapter(directory, FAMILY, UNTIED)
    with pytest.raises(
      AdapterError, match=r"head\.w needs shape \(15, 8\), but it leaves it with \(12, 8\): save the"
    ):
      merge_into(plain(UNTIED), adapter, FAMILY)

  def test_embedding_and_head_of_different_sizes(self, write):
    tensors = {"model.embed_tokens.weight": numbers((V + 3, D), 5), "lm_head.weight": numbers((V + 4, D), 5)}
    with pytest.raises(AdapterError, match=r"of different vocabularies: embed\.w 15, head\.w 16 rows"):
      merged(write(factors(*layers("q_proj")) | tensors))


class TestWrittenAgain:
  """Each kind is read, written and read again; what is merged is the same."""

  KINDS = {
    "DoRA": (
      UNTIED,
      factors(*layers("q_proj"))
      | {f"{m}.lora_magnitude_vector": 1 + numbers((F,), 5) for m in layers("q_proj")},
      {"use_dora": True},
    ),
    "PiSSA": (UNTIED, factors(*layers("q_proj")), {"init_lora_weights": "pissa"}),
    "whole": (
      UNTIED,
      factors(*layers("q_proj"))
      | {"lm_head.weight": numbers((V, D), 1), "model.layers.0.norm.weight": numbers((D,), 1)},
      {"modules_to_save": ["lm_head", "layers.0.norm"]},
    ),
    "biases": (UNTIED, factors(*layers("q_proj")) | TestBiases.BIASES, {"bias": "all"}),
    "shifts": (
      UNTIED,
      factors(*layers("q_proj")) | {f"{m}.lora_B.bias": numbers((F,), 9) for m in layers("q_proj")},
      {"lora_bias": True},
    ),
    "rows": (
      TIED,
      {"model.embed_tokens.token_adapter.trainable_tokens_delta": numbers((2, D), 5)},
      {"trainable_token_indices": [1, 5], "target_modules": "dummy-target-modules"},
    ),
    "untied": (TIED, factors("lm_head"), {"target_modules": ["lm_head"]}),
    "grown": (
      UNTIED,
      factors(*layers("q_proj"))
      | {"model.embed_tokens.weight": numbers((15, D), 1), "lm_head.weight": numbers((15, D), 2)},
      {},
    ),
  }

  @pytest.mark.parametrize("kind", KINDS)
  def test_it_is_the_same(self, kind, write, tmp_path):
    config, tensors, keys = self.KINDS[kind]
    adapter = load_peft_adapter(write(tensors, **keys), FAMILY, config)
    expected = arrays(merge_into(plain(config), adapter, FAMILY))
    save_peft_adapter(adapter, tmp_path / "again", FAMILY, config)
    again = load_peft_adapter(tmp_path / "again", FAMILY, config)
    found = arrays(merge_into(plain(config), again, FAMILY))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)

  def test_modules_beside_a_vision_tower_have_their_prefix(self, write, tmp_path):
    """The base's names tell; full names are listed, since a tower has modules of the same short names."""
    adapter = load_peft_adapter(write(factors(*layers("q_proj"))), FAMILY, UNTIED)
    held = {
      "model.language_model.embed_tokens.weight": numbers((V, D), 0),
      **{f"model.language_model.layers.{i}.q_proj.weight": numbers((F, D), 0) for i in range(2)},
      "model.vision_tower.layers.0.q_proj.weight": numbers((F, D), 0),
    }
    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file(held, tmp_path / "base" / "model.safetensors")
    save_peft_adapter(adapter, tmp_path / "again", FAMILY, UNTIED, base=tmp_path / "base")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    names = [f"model.language_model.layers.{i}.q_proj" for i in range(2)]
    assert (config["target_modules"], config["base_model_name_or_path"]) == (names, str(tmp_path / "base"))
    tensors = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {name.partition(".lora_")[0] for name in tensors} == {f"base_model.model.{name}" for name in names}
    again = load_peft_adapter(tmp_path / "again", FAMILY, UNTIED)
    assert jax.tree.all(
      jax.tree.map(
        np.array_equal, [vars(f) for f in again.factors.values()], [vars(f) for f in adapter.factors.values()]
      )
    )

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (
        {"whole": {"layers.0.q_proj.w": numbers((F, D), 0)}, "factors": {}},
        r"give layers\.0\.q_proj\.b as well",
      ),
      (
        {"whole": {"layers.0.q_proj.b": numbers((F,), 0)}},
        r"stores all biases, or those of modules with factors",
      ),
    ],
  )
  def test_what_peft_has_no_form_for(self, change, message, write, tmp_path):
    adapter = load_peft_adapter(write(factors(*layers("q_proj"))), FAMILY, UNTIED)
    with pytest.raises(AdapterError, match=message):
      save_peft_adapter(dataclasses.replace(adapter, **change), tmp_path / "again", FAMILY, UNTIED)
