"""Adapters in peft's files: names, shapes, what they change, what comes back, and what is refused."""

import dataclasses
import json
import math
import os

import jax
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
  load_peft_adapter,
  merge_into,
  save_peft_adapter,
  set_adapter,
)
from models_core.errors import AdapterError, CheckpointError, SaveError
from models_core.testing import to_tensors
from models_core.weights import Ignored, WeightTable

from .tiny import ALPHA, CONFIG, FAMILY, RANK, TABLE, D, E, F, adapted, plain

PREFIX = "base_model.model."
EXPERTS = f"{PREFIX}model.layers.0.experts"


@pytest.fixture
def saved(tmp_path):
  """`saved(adapter)`: the directory that it was saved in."""

  def save(adapter=None, folder="adapter", **options):
    adapter = adapter or adapter_of(adapted(), alpha=ALPHA)
    save_peft_adapter(adapter, tmp_path / folder, FAMILY, CONFIG, **options)
    return tmp_path / folder

  return save


def tensors_in(directory):
  return safetensors.numpy.load_file(directory / "adapter_model.safetensors")


def config_in(directory):
  return json.loads((directory / "adapter_config.json").read_text())


def change(directory, **keys):
  """Changes keys of adapter_config.json."""
  (directory / "adapter_config.json").write_text(json.dumps(config_in(directory) | keys))


def replace(directory, edit):
  """Changes the tensors."""
  tensors = tensors_in(directory)
  edit(tensors)
  safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")


def load(directory):
  return load_peft_adapter(directory, FAMILY, CONFIG)


class TestSaving:
  @pytest.mark.parametrize("shared", [False, True], ids=["own b", "one b for all experts"])
  def test_each_matrix_of_the_checkpoint_changes_by_its_b_times_a(self, shared, saved):
    """W [out, in] + alpha / r * B [out, r] @ A [r, in], as peft computes it."""
    adapter = adapter_of(adapted(shared=shared), alpha=ALPHA)
    factors = tensors_in(saved(adapter))
    before = to_tensors(plain(), TABLE)
    after = to_tensors(merge_into(plain(), adapter, FAMILY), TABLE)
    changed = set()
    for name, tensor in before.items():
      module = PREFIX + name.removesuffix(".weight")
      if f"{module}.lora_A.weight" in factors:
        a, b = (factors[f"{module}.lora_{side}.weight"] for side in "AB")
        assert (a.shape, b.shape) == ((RANK, tensor.shape[1]), (tensor.shape[0], RANK))
        np.testing.assert_allclose(after[name], tensor + ALPHA / RANK * b @ a, rtol=1e-5, atol=1e-6)
        changed |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
      else:
        np.testing.assert_array_equal(after[name], tensor)
    assert changed == factors.keys()
    assert len(factors) == 2 * 2 * (2 + 3 * E)

  def test_the_configuration(self, saved):
    config = config_in(saved(base_model="org/name"))
    assert config == {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": "org/name",
      "r": RANK,
      "lora_alpha": ALPHA,
      "rank_pattern": {},
      "alpha_pattern": {},
      "lora_dropout": 0.0,
      "bias": "none",
      "fan_in_fan_out": False,
      "use_rslora": False,
      "use_dora": False,
      "inference_mode": True,
      "modules_to_save": None,
      "trainable_token_indices": None,
      "target_modules": ["down", "gate", "o", "q", "up"],
      "layers_to_transform": None,
      "layers_pattern": None,
    }
    assert config_in(saved(folder="unnamed"))["base_model_name_or_path"] is None

  @pytest.mark.parametrize(
    ("names", "modules", "layers"),
    [
      (["layers.0.q.w", "layers.1.q.w"], ["q"], None),
      (["layers.1.q.w"], ["q"], [1]),
      (["layers.0.q.w", "layers.0.o.w"], ["o", "q"], [0]),
      (["layers.1.q.w", "layers.0.o.w"], ["model.layers.0.attn.o", "model.layers.1.attn.q"], None),
      # peft holds the factors of a head that is the embedding twice, and keeps them the same.
      (["embed.w"], ["embed", "head"], None),
    ],
  )
  def test_modules_are_named_as_short_as_they_are_right(self, names, modules, layers, saved):
    directory = saved(adapter_of(adapted(names=names), alpha=ALPHA))
    config = config_in(directory)
    assert (config["target_modules"], config["layers_to_transform"]) == (modules, layers)
    assert config["layers_pattern"] == ("layers" if layers else None)
    assert config.get("ensure_weight_tying", False) == (names == ["embed.w"])
    assert load(directory).factors.keys() == set(names)

  def test_ranks_and_alphas_of_their_own_are_patterns(self, saved):
    q, up = (adapter_of(adapted(), alpha=ALPHA).factors[f"layers.0.{n}"] for n in ("q.w", "experts.up"))
    wide = Factors(np.ones((24, 5), np.float32), np.ones((5, D), np.float32), 7.0)
    factors = {
      "layers.0.q.w": q,
      "layers.1.q.w": dataclasses.replace(q, alpha=1.0),
      "layers.0.experts.up": up,
    }
    factors |= {"layers.0.o.w": wide, "layers.1.o.w": wide}
    adapter = Adapter(factors, ALPHA, RANK)
    directory = saved(adapter)
    config = config_in(directory)
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert config["rank_pattern"] == {"o": 5}
    assert config["alpha_pattern"] == {"o": 7.0, "^model.layers.1.attn.q": 1.0}
    again = load(directory)
    assert again.alphas == adapter.alphas
    assert {name: f.rank for name, f in again.factors.items()} == {
      name: f.rank for name, f in factors.items()
    }

  def test_factors_on_a_mesh(self, saved, mesh):
    adapter = adapter_of(adapted(), alpha=ALPHA)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "tp") if x.shape[1] % 2 == 0 else P()))
    moved = {name: Factors(place(f.a), place(f.b)) for name, f in adapter.factors.items()}
    expected, found = tensors_in(saved(adapter)), tensors_in(saved(Adapter(moved, ALPHA, RANK), "moved"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
      np.testing.assert_array_equal(found[name], tensor)

  def test_what_is_there_is_replaced_only_when_asked_for(self, saved):
    directory = saved()
    (directory / "README.md").write_text("mine")
    with pytest.raises(SaveError, match="overwrite=True"):
      saved()
    saved(adapter_of(adapted(seed=1), alpha=ALPHA), overwrite=True)
    assert sorted(os.listdir(directory)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    np.testing.assert_array_equal(
      load(directory).factors["layers.0.q.w"].a,
      adapter_of(adapted(seed=1), alpha=1.0).factors["layers.0.q.w"].a,
    )

  def test_both_files_are_on_the_disk_before_they_are_there(self, saved, tmp_path, monkeypatch):
    fsync, on_disk = os.fsync, {}

    def noted(descriptor):
      fsync(descriptor)
      assert not (tmp_path / "adapter").exists() or not on_disk.keys() & {os.fstat(descriptor).st_ino}
      on_disk[os.fstat(descriptor).st_ino] = (os.fstat(descriptor).st_size, (tmp_path / "adapter").exists())

    monkeypatch.setattr(os, "fsync", noted)
    for path in saved().iterdir():
      assert on_disk[path.stat().st_ino] == (path.stat().st_size, False)

  def test_an_adapter_that_does_not_fit_is_not_saved(self, saved, tmp_path):
    odd = Factors(np.zeros((1, 2), np.float32), np.zeros((2, 1), np.float32))
    for name, message in [
      ("layers.0.norm.w", "is not a matrix"),
      ("layers.7.q.w", "which the model does not have"),
    ]:
      with pytest.raises(AdapterError, match=message):
        saved(Adapter({name: odd}, 1.0, 2))
    assert os.listdir(tmp_path) == []

  def test_experts_that_are_one_tensor_have_no_factors_in_peft(self, tmp_path):
    rows = [row for row in TABLE.rows if "experts" not in row.ours]
    fused = [
      (
        "layers.{i}.experts." + part,
        "model.layers.{i}.experts." + part,
        "e f d" if part != "down" else "e d f",
      )
      for part in ("gate", "up", "down")
    ]
    table = WeightTable(*((row.ours, row.forms) for row in rows), *fused)
    family = dataclasses.replace(FAMILY, weights={"huggingface": table})
    adapter = adapter_of(adapted(), alpha=ALPHA)
    with pytest.raises(AdapterError, match=r"experts\.down holds several matrices in one tensor"):
      save_peft_adapter(adapter, tmp_path / "adapter", family, CONFIG)


class TestLoading:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_what_was_saved_comes_back_bit_by_bit(self, dtype, saved):
    model = adapted(dtype)
    adapter = adapter_of(model, alpha=ALPHA)
    again = load(saved(adapter))
    assert (again.rank, again.alpha) == (RANK, ALPHA)
    assert again.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
      assert again.factors[name].a.dtype == factors.a.dtype
      np.testing.assert_array_equal(again.factors[name].a, factors.a)
      np.testing.assert_array_equal(again.factors[name].b, factors.b)
    other = adapted(dtype, seed=1)
    set_adapter(other, again)
    ours, theirs = (jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (model, other))
    for one, another in zip(ours, theirs, strict=True):
      np.testing.assert_array_equal(one, another)

  def test_one_b_for_all_experts_comes_back_as_one_for_each(self, saved):
    model = adapted(shared=True)
    again = load(saved(adapter_of(model, alpha=ALPHA)))
    own = model.layers[1].experts.up_lora_b[...]
    np.testing.assert_array_equal(again.factors["layers.1.experts.up"].b, np.stack([own] * E))

  def test_names_without_peft_s_prefix(self, saved):
    directory = saved()
    expected = load(directory)

    def strip(tensors):
      for name in list(tensors):
        tensors[name.removeprefix(PREFIX)] = tensors.pop(name)

    replace(directory, strip)
    for name, factors in load(directory).factors.items():
      np.testing.assert_array_equal(factors.a, expected.factors[name].a)

  def test_rank_stabilised_lora_is_lora_with_a_larger_alpha(self, saved):
    directory = saved()
    change(directory, use_rslora=True)
    assert load(directory).alpha == ALPHA * math.sqrt(RANK)
    change(directory, use_rslora=False, lora_alpha=16)
    assert load(directory).alpha == 16

  @pytest.mark.parametrize(
    "keys",
    [
      {key: None}
      for key in (
        "bias",
        "use_dora",
        "rank_pattern",
        "modules_to_save",
        "layer_replication",
        "base_model_name_or_path",
      )
    ]
    + [
      {"lora_dropout": 0.1, "inference_mode": False, "task_type": "CAUSAL_LM", "peft_version": "0.21.0"},
      {"auto_mapping": {"base_model_class": "Model"}, "fan_in_fan_out": True, "qalora_group_size": 16},
      {
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "runtime_config": {"ephemeral_gpu_offload": False},
      },
      {
        "loftq_config": {},
        "eva_config": {"rho": 2.0},
        "corda_config": None,
        "lora_ga_config": {"scale": "stable"},
      },
      {"velora_config": {"scale": 1.0}, "monteclora_config": {"num_samples": 8}, "merge_weights": False},
      {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16, "use_qalora": False, "lora_bias": False},
      {"init_lora_weights": "gaussian"},
      {"init_lora_weights": "eva"},
      {"init_lora_weights": "mica"},
      {"init_lora_weights": False},
      # Of a version to come, and saying nothing.
      {"use_something": False, "something_config": None, "some_modules": []},
    ],
    ids=lambda keys: "+".join(f"{key}={value}"[:24] for key, value in keys.items()),
  )
  def test_keys_on_which_no_merged_weight_depends(self, keys, saved):
    directory = saved()
    expected = load(directory)
    change(directory, **keys)
    found = load(directory)
    assert (found.alpha, found.rank, found.factors.keys()) == (ALPHA, RANK, expected.factors.keys())

  def test_a_missing_rank_and_alpha_are_those_of_peft(self, saved):
    directory = saved()
    config = config_in(directory)
    del config["lora_alpha"], config["r"]
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
      AdapterError, match=r"lora_A\.weight has shape \(2, 10\), but the model needs \(8, 10\)"
    ):
      load(directory)
    change(directory, r=RANK)
    assert load(directory).alpha == 8

  @pytest.mark.parametrize(
    ("key", "value", "message"),
    [
      ("peft_type", "IA3", "peft_type='IA3' is not supported: merge it with peft"),
      ("use_qalora", True, "use_qalora=True is not supported, since its factors belong to groups"),
      ("layer_replication", [[0, 1]], "layer_replication=.* is not supported, since it repeats layers"),
      (
        "alora_invocation_tokens",
        [5],
        "alora_invocation_tokens=.* is not supported, since its changes begin",
      ),
      ("arrow_config", {"top_k": 3}, "arrow_config=.* is not supported, since it chooses"),
      ("use_bdlora", {"nblocks": 2}, "use_bdlora=.* is not supported, since its factors are block-diagonal"),
      ("kasa_config", {"beta": 1}, "kasa_config=.* is not supported, since it also removes"),
      ("enable_lora", [True, False], "enable_lora=.* is not supported, since it is of a layer that joins"),
      (
        "use_something",
        True,
        "use_something=True: not known. If the merged weights do not depend on it, remove",
      ),
      ("init_lora_weights", "corda", "init_lora_weights='corda' .*path_initial_model_for_weight_conversion"),
      ("init_lora_weights", "loftq", "init_lora_weights='loftq' .*path_initial_model_for_weight_conversion"),
      (
        "init_lora_weights",
        "lora_ga",
        "init_lora_weights='lora_ga' .*path_initial_model_for_weight_conversion",
      ),
      ("init_lora_weights", "pissa_niter_4", "'pissa_niter_4' .*path_initial_model_for_weight_conversion"),
      ("init_lora_weights", "magic", "init_lora_weights='magic' is not known"),
      ("init_lora_weights", 1, "init_lora_weights=1 is not known"),
      (
        "init_lora_weights",
        "pissa",
        r"'pissa' of layers\.0\.experts\.gate is not supported: merge the adapter",
      ),
      ("bias", "some", "bias is 'some', expected 'none' or 'all' or 'lora_only'"),
      ("use_dora", 1, "use_dora is 1, expected true or false"),
      ("use_dora", True, r"attn\.q\.lora_magnitude_vector is missing, although use_dora is true"),
      ("lora_bias", True, r"attn\.q\.lora_B\.bias is missing, although lora_bias is true"),
      ("modules_to_save", "norm", "modules_to_save is 'norm', expected a list of names"),
      (
        "modules_to_save",
        ["norm"],
        r"lacks tensors that modules_to_save=\['norm'\] names: model\.layers\.0\.norm",
      ),
      (
        "trainable_token_indices",
        [1, True],
        "trainable_token_indices is .*, expected lists of whole numbers",
      ),
      (
        "trainable_token_indices",
        {"embed": [1]},
        "lacks the rows of the embedding that trainable_token_indices",
      ),
      ("target_modules", 3, "target_modules is 3, expected a list of names or a regular expression"),
      ("target_modules", "(q", r"target_modules has '\(q', which is no regular expression"),
      ("layers_to_transform", "1", "layers_to_transform is '1', expected whole numbers"),
      (
        "layers_to_transform",
        [0],
        r"has factors of modules that target_modules=.* does not name.*: model\.layers\.1\.",
      ),
      (
        "exclude_modules",
        ["q"],
        r"has factors of modules that .* does not name.*: model\.layers\.0\.attn\.q",
      ),
      ("target_modules", ["q"], r"has factors of modules that target_modules=\['q'\] does not name"),
      ("target_modules", "all-linear", None),
      ("target_modules", r".*\.(q|o|gate|up|down)", None),
      ("target_modules", ["q", "o", "gate", "up", "down", "unknown"], None),
      ("rank_pattern", {"q": "4"}, r"rank_pattern\['q'\] is '4', expected a positive whole number"),
      ("rank_pattern", {"q": 4}, r"attn\.q\.lora_A\.weight has shape \(2, 8\), but the model needs \(4, 8\)"),
      ("rank_pattern", {"(q": 4}, r"rank_pattern has '\(q', which is no regular expression"),
      ("rank_pattern", {"experts.1.up": 4}, r"the matrices of layers\.0\.experts\.up have several ranks"),
      ("alpha_pattern", {"q": math.nan}, r"alpha_pattern\['q'\] is nan, expected a finite number"),
      ("alpha_pattern", [], "alpha_pattern is \\[\\], expected an object"),
      ("revision", 1, "revision is 1, expected a text"),
      ("r", "2", "r is '2', expected a positive whole number"),
      ("r", 0, "r is 0, expected a positive whole number"),
      ("r", None, "r is None, expected a positive whole number"),
      ("r", True, "r is True, expected a positive whole number"),
      (
        "r",
        5,
        r"lora_A\.weight has shape \(2, \d+\), but the model needs \(5, \d+\) .43 more tensors do not fit",
      ),
      ("lora_alpha", None, "lora_alpha is None, expected a finite number"),
      ("lora_alpha", True, "lora_alpha is True, expected a finite number"),
      ("lora_alpha", math.inf, "lora_alpha is inf, expected a finite number"),
      ("lora_alpha", math.nan, "lora_alpha is nan, expected a finite number"),
    ],
  )
  def test_every_key_is_used_or_refused(self, key, value, message, saved):
    directory = saved()
    change(directory, **{key: value})
    if message is None:
      assert load(directory).rank == RANK
      return
    with pytest.raises(AdapterError, match=message):
      load(directory)

  def test_all_keys_that_are_not_implemented_are_named_at_once(self, saved):
    directory = saved()
    change(directory, use_qalora=True, layer_replication=[[0, 1]], novel=7, strange="x")
    with pytest.raises(AdapterError) as caught:
      load(directory)
    lines = str(caught.value).splitlines()
    assert [line.split("=")[0] for line in lines[1:]] == [
      "  - layer_replication",
      "  - use_qalora",
      "  - novel",
    ]
    assert "novel=7, strange='x': not known" in lines[3]

  @pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "holds a value of type list, expected a JSON object")],
  )
  def test_a_configuration_that_is_none(self, text, message, saved):
    directory = saved()
    (directory / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json {message}"):
      load(directory)

  @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
  def test_a_directory_that_lacks_a_file(self, name, saved):
    directory = saved()
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing: give the directory of a peft adapter"):
      load(directory)

  def test_both_files_that_are_missing_are_named(self, tmp_path):
    with pytest.raises(CheckpointError) as caught:
      load(tmp_path)
    assert len(caught.value.problems) == 2

  def test_a_file_that_is_cut_off(self, saved):
    directory = saved()
    os.truncate(directory / "adapter_model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
      load(directory)

  def test_a_part_of_a_parameter_alone(self, saved):
    directory = saved()
    replace(directory, lambda tensors: tensors.pop(f"{EXPERTS}.1.up.lora_A.weight"))
    with pytest.raises(
      AdapterError,
      match=r"experts\.1\.up\.lora_A\.weight is missing: the adapter must change all of layers\.0\.experts\.up",
    ):
      load(directory)

  def test_an_expert_of_several_is_a_part(self, saved):
    directory = saved()

    def keep_one(tensors):
      for name in [name for name in tensors if not name.startswith(f"{EXPERTS}.0.up.")]:
        del tensors[name]

    replace(directory, keep_one)
    with pytest.raises(AdapterError, match=r"experts\.1\.up\.lora_A\.weight is missing"):
      load(directory)

  def test_tensors_that_fit_no_matrix(self, saved):
    directory = saved()

    def add(tensors):
      for i in range(12):
        tensors[f"{PREFIX}model.layers.{i}.attn.k.lora_A.weight"] = np.zeros((2, D), np.float32)

    replace(directory, add)
    with pytest.raises(
      AdapterError,
      match=r"nothing that these tensors belong to: model\.layers\.0\.attn\.k\.lora_A\.weight, .*, \.\.\.",
    ):
      load(directory)

  def test_a_file_without_tensors(self, saved):
    directory = saved()
    replace(directory, lambda tensors: tensors.clear())
    with pytest.raises(AdapterError, match=r"holds no tensors, although .*\['down', .*gathering the weights"):
      load(directory)

  def test_a_file_that_lacks_modules(self, saved):
    directory = saved()

    def keep_a_layer(tensors):
      for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]

    replace(directory, keep_a_layer)
    with pytest.raises(
      AdapterError,
      match=r"lacks the factors of 5 of the 10 modules that target_modules=.* names: model\.layers\.1\.",
    ):
      load(directory)
    change(directory, layers_to_transform=0)
    assert len(load(directory).factors) == 5

  def test_parts_of_tensors_that_were_not_gathered(self, saved):
    directory = saved()
    replace(directory, lambda tensors: tensors.update({name: np.zeros(0, np.float32) for name in tensors}))
    with pytest.raises(
      AdapterError, match=r"has shape \(0,\), .*: it was saved without gathering the weights"
    ):
      load(directory)

  def test_weights_that_are_a_pickle(self, saved):
    directory = saved()
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(
      CheckpointError, match=r"the pickle adapter_model\.bin, which is not read: load it with peft"
    ):
      load(directory)

  def test_a_name_on_the_hub(self):
    with pytest.raises(
      CheckpointError, match=r"me/adapter: .*\n.*models_automodel\.load_adapter\('me/adapter', model\)"
    ):
      load("me/adapter")

  def test_what_the_base_leaves_out_is_left_out_and_named(self, saved, caplog):
    directory = saved()
    tower = {
      f"{PREFIX}tower.layers.{i}.q.lora_{s}.weight": np.ones((2, 2), np.float32) for i in (0, 1) for s in "AB"
    }
    replace(directory, lambda tensors: tensors.update(tower))
    with pytest.raises(AdapterError, match=r"nothing that these tensors belong to: tower\."):
      load(directory)
    table = WeightTable(*TABLE.rows, ignored=[Ignored("tower.**", "the tower")], tied=TABLE.tied)
    family = dataclasses.replace(FAMILY, weights={"huggingface": table})
    caplog.clear()
    assert len(load_peft_adapter(directory, family, CONFIG).factors) == 10
    assert [record.getMessage() for record in caplog.records] == [
      f"{directory}: 4 tensors not loaded: the tower"
    ]

  def test_names_that_the_model_does_not_have_are_one_problem(self, saved):
    directory = saved()

    def wrap(tensors):
      for name in list(tensors):
        tensors[name.replace(f"{PREFIX}model.", f"{PREFIX}module.model.")] = tensors.pop(name)

    replace(directory, wrap)
    with pytest.raises(
      AdapterError, match=r"^[^\n]*nothing that these tensors belong to: module\.model\.[^\n]*$"
    ):
      load(directory)

  def test_names_of_a_base_class_without_a_head(self, saved):
    directory = saved()
    expected = load(directory)

    def shorten(tensors):
      for name in list(tensors):
        tensors[name.replace(f"{PREFIX}model.", PREFIX)] = tensors.pop(name)

    replace(directory, shorten)
    change(directory, target_modules=r"layers\..*")
    for name, factors in load(directory).factors.items():
      np.testing.assert_array_equal(factors.a, expected.factors[name].a)

  def test_shapes_that_do_not_fit(self, saved):
    directory = saved()
    name = f"{PREFIX}model.layers.1.attn.o.lora_B.weight"
    replace(directory, lambda tensors: tensors.update({name: np.zeros((2, D), np.float32)}))
    with pytest.raises(
      AdapterError, match=r"attn\.o\.lora_B\.weight has shape \(2, 8\), but the model needs \(8, 2\)"
    ):
      load(directory)

  def test_an_adapter_of_a_deeper_model(self, saved):
    shallow = dataclasses.replace(CONFIG, num_layers=1)
    with pytest.raises(
      AdapterError, match=r"the model has nothing that these tensors belong to: model\.layers\.1\."
    ):
      load_peft_adapter(saved(), FAMILY, shallow)


class TestFusedExperts:
  """What peft trains on experts that are one tensor: A [E * r, in] and B [out, r * E]."""

  @pytest.fixture
  def fused(self, tmp_path, rng):
    def write(shapes, targets):
      tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
      safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
      config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_parameters": targets}
      (tmp_path / "adapter_config.json").write_text(json.dumps(config))
      return tensors

    return write

  @pytest.mark.parametrize("deep", ["down", "gate_up"])
  def test_they_are_those_of_each_expert(self, deep, fused, tmp_path):
    """Of gate and up together, and of down: one of them at the module, the other one deeper in."""
    modules = {"down": EXPERTS, "gate_up": EXPERTS} | {deep: f"{EXPERTS}.base_layer"}
    sizes = {"gate_up": (D, 2 * F), "down": (F, D)}
    tensors = fused(
      {
        f"{modules[name]}.lora_{side}.weight": (E * RANK, into) if side == "A" else (out, RANK * E)
        for name, (into, out) in sizes.items()
        for side in "AB"
      },
      ["layers.0.experts.down", "layers.0.experts.gate_up"],
    )
    adapter = load(tmp_path)
    assert adapter.factors.keys() == {f"layers.0.experts.{part}" for part in ("gate", "up", "down")}

    def found(part):
      factors = adapter.factors[f"layers.0.experts.{part}"]
      return np.einsum("eir,ero->eoi", factors.a, factors.b)

    def expected(name):
      a = tensors[f"{modules[name]}.lora_A.weight"].reshape(E, RANK, -1)
      b = tensors[f"{modules[name]}.lora_B.weight"]
      return np.einsum("ore,eri->eoi", b.reshape(b.shape[0], RANK, E), a)

    both = np.concatenate([found("gate"), found("up")], axis=1)
    np.testing.assert_allclose(both, expected("gate_up"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found("down"), expected("down"), rtol=1e-5, atol=1e-6)

  ALONE = {f"{EXPERTS}.lora_A.weight": (E * RANK, D), f"{EXPERTS}.lora_B.weight": (2 * F, RANK * E)}

  def test_one_of_the_tensors_may_be_adapted_alone(self, fused, tmp_path):
    fused(self.ALONE, ["layers.0.experts.gate_up"])
    assert load(tmp_path).factors.keys() == {"layers.0.experts.gate", "layers.0.experts.up"}

  @pytest.mark.parametrize(
    ("targets", "message"),
    [
      (
        ["experts.gate_up"],
        r"lacks the factors of 1 of the 2 modules that target_parameters=.*: model\.layers\.1\.experts\.gate_up",
      ),
      (["layers.0.experts.down"], r"does not name, .*: model\.layers\.0\.experts\.gate_up"),
    ],
  )
  def test_they_are_compared_with_the_configuration(self, targets, message, fused, tmp_path):
    fused(self.ALONE, targets)
    with pytest.raises(AdapterError, match=message):
      load(tmp_path)

  def test_those_that_fit_no_tensor_are_named(self, fused, tmp_path):
    fused({f"{EXPERTS}.lora_A.weight": (E * RANK, F), f"{EXPERTS}.lora_B.weight": (D - 1, RANK * E)}, [])
    with pytest.raises(
      AdapterError,
      match=r"the model has nothing that these tensors belong to: .*layers\.0\.experts\.lora_A\.weight",
    ):
      load(tmp_path)
