import dataclasses
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from models_automodel import (
  AutoModel,
  CheckpointError,
  ConfigError,
  ModelModule,
  ModelNameError,
  ModelsError,
  ModelSource,
  ShardingError,
  SourceFilesError,
  automodel,
  call_model_config,
  families,
  get_model_module,
)
from models_automodel.digest import digest
from models_core.layers import RematConfig


def weights(model):
  return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


def logits(model):
  tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
  return np.asarray(model(tokens, np.broadcast_to(np.arange(5, dtype=np.int32), (2, 5)))[0])


def saved(directory, again, name):
  """A file of the same model without stacks, loaded and saved."""
  AutoModel.save_pretrained(AutoModel.from_pretrained(directory)[0], again, base=directory, overwrite=True)
  return (again / name).read_bytes()


@pytest.mark.parametrize("kind", [str, pathlib.Path])
@pytest.mark.parametrize("as_argument", ["model_id", "model_path"])
def test_a_local_directory_of_any_name_loads(checkpoint, as_argument, kind):
  directory, tensors = checkpoint
  if as_argument == "model_id":
    model, path = AutoModel.from_pretrained(kind(directory))
  else:
    model, path = AutoModel.from_pretrained("some/name-that-nobody-knows", model_path=kind(directory))
  assert path == str(directory)
  np.testing.assert_array_equal(weights(model)["lm_head.w"], tensors["lm_head.weight"])
  np.testing.assert_array_equal(
    weights(model)["layers.1.attn.o_proj.w"].reshape(16, 16),
    tensors["model.layers.1.self_attn.o_proj.weight"],
  )


def test_stacked_layers_are_loaded_into_place_and_saved_as_they_were(checkpoint, tmp_path):
  directory, tensors = checkpoint
  plan = AutoModel.plan(directory, scan_layers=True)
  assert plan.config.scan_layers
  assert plan.stored_nbytes == sum(tensor.nbytes for tensor in tensors.values())
  model, _ = AutoModel.from_pretrained(directory, scan_layers=True)
  np.testing.assert_array_equal(
    weights(model)["layers.0:2.mlp.down_proj.w"],
    [tensors[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(2)],
  )
  assert str(digest(model)) == str(digest(directory))
  AutoModel.save_pretrained(model, tmp_path / "again", base=directory)
  for name in ("model.safetensors", "config.json"):
    assert (tmp_path / "again" / name).read_bytes() == saved(directory, tmp_path / "plain", name)


@pytest.mark.parametrize(
  "make_mesh",
  [
    lambda d: jax.make_mesh((2, 2), ("fsdp", "tp")),
    lambda d: Mesh(np.array(d).reshape(2, 2), ("fsdp", "tp")),
  ],
  ids=["explicit", "auto"],
)
def test_a_mesh_of_either_kind_holds_the_same_model(checkpoint, make_mesh):
  directory, _ = checkpoint
  mesh = make_mesh(jax.devices()[:4])
  model, _ = AutoModel.from_pretrained(str(directory), mesh)
  assert weights(model)["lm_head.w"].sharding.mesh == mesh
  assert weights(model)["lm_head.w"].addressable_shards[0].data.shape == (32, 8)
  np.testing.assert_allclose(logits(model), logits(AutoModel.from_pretrained(str(directory))[0]), atol=1e-6)


def test_config_fields_are_keyword_arguments(checkpoint):
  directory, _ = checkpoint
  model, _ = AutoModel.from_pretrained(
    str(directory), dtype="bfloat16", remat_config="decoder", rope_theta=77.0
  )
  assert model.config.remat_config is RematConfig.DECODER
  assert model.config.rope_theta == 77.0
  assert {w.dtype for w in weights(model).values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("value", [2, "Block", RematConfig.BLOCK], ids=str)
def test_remat_config_is_a_name_a_number_or_a_member(checkpoint, value):
  plan = AutoModel.plan(checkpoint[0], remat_config=value)
  assert plan.config.remat_config is RematConfig.BLOCK


@pytest.mark.parametrize("value", [0, 4, 2.5, True, None, "all"], ids=str)
def test_another_remat_config_is_a_type_error_with_the_choices(checkpoint, value):
  with pytest.raises(TypeError, match=f"remat_config={value!r} is not one of NONE, BLOCK, DECODER"):
    AutoModel.plan(checkpoint[0], remat_config=value)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({}, "auto"),
    ({"attn_implementation": "splash"}, "splash"),
    ({"use_flash_attention": True}, "auto"),
    ({"use_flash_attention": False}, "dense"),
  ],
  ids=str,
)
def test_attention_is_named(checkpoint, fields, expected):
  assert AutoModel.plan(checkpoint[0], **fields).config.attn_implementation == expected


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"attn_implementation": "sdpa"}, "attn_implementation is 'sdpa', expected one of auto"),
    ({"use_flash_attention": 1}, "use_flash_attention=1, expected True or False"),
    ({"use_flash_attention": True, "attn_implementation": "auto"}, "give only attn_implementation"),
  ],
  ids=str,
)
def test_another_name_of_attention_is_refused(checkpoint, fields, message):
  with pytest.raises((ConfigError, TypeError), match=message):
    AutoModel.plan(checkpoint[0], **fields)


@pytest.mark.parametrize("value", ["linear", 8, {"rope_type": "linear", "factor": 8.0}], ids=str)
def test_what_is_no_rope_scaling_is_refused_with_the_choices(checkpoint, value):
  with pytest.raises(ConfigError, match=r"rope_scaling is .*, expected None or a scaling .*LinearScaling"):
    AutoModel.plan(checkpoint[0], rope_scaling=value)


@pytest.mark.parametrize(
  ("keyword", "near"),
  [
    ("dtpye", "dtype"),
    ("strict_shard", "strict_sharding"),
    ("model_download_pat", "model_download_path"),
    ("intermediate_ckpt", "intermediate_ckpt_dir"),
    ("rng_sed", "rng_seed"),
    ("model_sorce", "model_source"),
    ("meshes", "mesh"),
    ("rope_teta", "rope_theta"),
  ],
)
def test_an_unknown_keyword_is_a_type_error_with_the_nearest_one(checkpoint, keyword, near):
  with pytest.raises(TypeError, match=f"'{keyword}'.*did you mean '{near}'"):
    AutoModel.from_pretrained(str(checkpoint[0]), **{keyword: 1})


def test_a_keyword_that_plan_lacks_is_no_answer_to_itself(checkpoint):
  with pytest.raises(TypeError, match="'rng_seed'") as caught:
    AutoModel.plan(str(checkpoint[0]), rng_seed=0)
  assert "did you mean 'rng_seed'" not in str(caught.value)


@pytest.mark.parametrize(
  ("field", "value", "kind"),
  [
    ("rope_theta", "1e6", "a number"),
    ("num_layers", 2.0, "a whole number"),
    ("num_heads", True, "a whole number"),
    ("weight_tying", "false", "True or False"),
    ("shd_config", None, "a ShardingConfig"),
  ],
)
def test_a_field_takes_values_of_its_kind(checkpoint, field, value, kind):
  with pytest.raises(TypeError, match=f"{field}={value!r}, expected {kind}"):
    AutoModel.from_pretrained(checkpoint[0], **{field: value})


@pytest.mark.parametrize("mesh", [["a device"], "huggingface", AbstractMesh((2,), ("fsdp",))], ids=repr)
def test_a_mesh_must_be_one_of_devices(checkpoint, mesh):
  with pytest.raises(TypeError, match=f"mesh is {type(mesh).__name__}, expected a jax.sharding.Mesh"):
    AutoModel.from_pretrained(checkpoint[0], mesh)


def test_a_configuration_can_be_handed_over(checkpoint, config):
  directory, _ = checkpoint
  changed = dataclasses.replace(config, rope_scaling=None)
  model, _ = AutoModel.from_pretrained(str(directory), config=changed)
  assert model.config == changed
  with pytest.raises(ModelsError, match="belongs to no installed family"):
    AutoModel.from_pretrained(str(directory), config=pytest)


def test_dtype_must_be_one(checkpoint):
  with pytest.raises(TypeError, match="float64, which JAX supports only with jax_enable_x64"):
    AutoModel.from_pretrained(checkpoint[0], dtype="float64")
  with pytest.raises(TypeError, match="dtype='bloat16'"):
    AutoModel.from_pretrained(str(checkpoint[0]), dtype="bloat16")


def test_one_error_names_what_is_missing_extra_mis_shaped_and_doubled(edit_config, checkpoint):
  from models_llama.llama3 import FAMILY  # noqa: F401 - its files are rewritten below

  directory = edit_config()
  import safetensors.numpy

  tensors = dict(checkpoint[1])
  doubled = {"model.norm.weight": tensors["model.norm.weight"]}
  del tensors["model.layers.0.mlp.up_proj.weight"]
  tensors["model.layers.0.mlp.side_proj.weight"] = np.zeros((3, 3), np.float32)
  tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
  (directory / "model.safetensors").unlink()
  safetensors.numpy.save_file(tensors, directory / "a.safetensors")
  safetensors.numpy.save_file(doubled, directory / "b.safetensors")
  with pytest.raises(CheckpointError) as caught:
    AutoModel.from_pretrained(str(directory))
  text = str(caught.value)
  assert "4 problems" in text
  assert "model.layers.0.mlp.up_proj.weight is missing" in text
  assert "model.layers.0.mlp.side_proj.weight (3, 3) is unexpected" in text
  assert "lm_head.weight has shape (63, 16), but the parameter lm_head.w (64, 16) needs (64, 16)" in text
  assert "model.norm.weight occurs twice: in a.safetensors and in b.safetensors" in text


def test_the_plan_costs_a_mesh_without_reading_weights(checkpoint, tmp_path):
  directory, tensors = checkpoint
  headers = (directory / "model.safetensors").read_bytes()
  length = int.from_bytes(headers[:8], "little") + 8
  (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
  # A file of holes: right in size, without data.
  with open(tmp_path / "model.safetensors", "wb") as file:
    file.write(headers[:length])
    file.truncate(len(headers))
  mesh = jax.make_mesh((2, 2), ("fsdp", "tp"))
  plan = AutoModel.plan(str(tmp_path), mesh)
  assert plan.num_parameters == sum(t.size for t in tensors.values())
  assert plan.stored_nbytes == sum(t.nbytes for t in tensors.values())
  model, _ = AutoModel.from_pretrained(str(directory), mesh)
  for device, nbytes in plan.bytes_per_device().items():
    shards = [
      s.data.nbytes for w in weights(model).values() for s in w.addressable_shards if s.device == device
    ]
    assert nbytes == sum(shards)
  assert "4 devices, each holding" in str(plan)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_model_is_cut_to_its_first_layers_and_nothing_else_is_read(config, tmp_path, count):
  """The files of the other layers are gone when weights are read."""
  import safetensors.numpy

  from models_core.dummy_model_creator import create_dummy_model
  from models_core.loading import load
  from models_core.testing import write_checkpoint
  from models_llama.llama3 import FAMILY

  deep = dataclasses.replace(config, num_layers=4)
  tensors = write_checkpoint(tmp_path, FAMILY, deep, create_dummy_model(FAMILY.model_class, deep))
  (tmp_path / "model.safetensors").unlink()
  layer_of = {name: int(name.split(".")[2]) if ".layers." in name else -1 for name in tensors}
  for layer in range(-1, 4):
    own = {name: array for name, array in tensors.items() if layer_of[name] == layer}
    safetensors.numpy.save_file(own, tmp_path / f"layer{layer}.safetensors")
  plan = AutoModel.plan(tmp_path, layers=range(count))
  others = {name for name, layer in layer_of.items() if layer >= count}
  reason = f"layers from {count} on, which were not requested"
  assert dict(plan.ignored) == dict.fromkeys(others, reason)
  assert any(reason in note for note in plan.notes()) == (count < 4)
  for layer in range(count, 4):
    (tmp_path / f"layer{layer}.safetensors").unlink()
  model = load(plan)
  assert len(model.layers) == model.config.num_layers == count
  assert plan.stored_nbytes == sum(array.nbytes for name, array in tensors.items() if name not in others)
  for i, layer in enumerate(model.layers):
    expected = tensors[f"model.layers.{i}.mlp.up_proj.weight"]
    np.testing.assert_array_equal(layer.mlp.up_proj.w[...], expected)


def test_a_cut_model_computes_what_its_layers_do(checkpoint):
  whole, _ = AutoModel.from_pretrained(checkpoint[0])
  model, path = AutoModel.from_pretrained(checkpoint[0], layers=range(1))
  assert path == str(checkpoint[0])
  whole.layers = nnx.List(whole.layers[:1])
  whole.config = model.config
  np.testing.assert_array_equal(logits(model), logits(whole))


@pytest.mark.parametrize("layers", [range(0), range(1, 2), range(99), 1])
def test_layers_are_the_first_of_those_that_there_are(checkpoint, layers):
  with pytest.raises(ValueError, match=r"expected range\(n\) for an n from 1 to "):
    AutoModel.plan(str(checkpoint[0]), layers=layers)


def test_strict_sharding_lists_the_sizes_that_divide(checkpoint):
  mesh = jax.make_mesh((1, 4), ("fsdp", "tp"))
  assert "k_proj" in str(AutoModel.plan(str(checkpoint[0]), mesh))
  with pytest.raises(
    ShardingError, match=r"k_proj.*2 heads are not divisible by tp=4 \(sizes that divide it: 1, 2\)"
  ):
    AutoModel.from_pretrained(str(checkpoint[0]), mesh, strict_sharding=True)


@pytest.mark.parametrize(
  ("changes", "error", "message"),
  [
    ({"model_type": ...}, ConfigError, "no model_type"),
    ({"model_type": "mamba"}, ModelNameError, "no installed family reads model_type 'mamba'"),
    ({"hidden_size": ...}, ConfigError, "hidden_size is missing"),
    ({"hidden_act": "gelu"}, ConfigError, "hidden_act is 'gelu'"),
    ({"moe_layers": 3}, ConfigError, "moe_layers=3"),
    ({"rope_theta": 5.0}, ConfigError, "stated twice and differs"),
  ],
)
def test_a_config_that_does_not_fit_is_refused(edit_config, changes, error, message):
  with pytest.raises(error, match=message) as caught:
    AutoModel.from_pretrained(str(edit_config(**changes)))
  assert isinstance(caught.value, ModelsError)


def test_a_family_that_is_not_installed_is_refused_with_the_command_that_installs_it(
  edit_config, monkeypatch
):
  monkeypatch.setattr(families, "entry_of", lambda category: None)
  with pytest.raises(
    ImportError, match=r"is a qwen3 model: (uv )?pip install .*models-automodel.*\[qwen\]"
  ) as caught:
    AutoModel.from_pretrained(str(edit_config(model_type="qwen3")))
  assert isinstance(caught.value, ModelsError)


def test_broken_json_is_a_config_error_that_names_the_file(edit_config):
  directory = edit_config()
  (directory / "config.json").write_text('{"model_type": "llama", "model_type": "qwen2"}')
  with pytest.raises(ConfigError, match=r"config\.json is not valid JSON: the key 'model_type' occurs twice"):
    AutoModel.from_pretrained(str(directory))


def test_a_missing_directory_is_said_so(tmp_path):
  with pytest.raises(SourceFilesError, match="nowhere"):
    AutoModel.from_pretrained("any/name", model_path=tmp_path / "nowhere")
  # A path is no repository, even where it reads like one.
  with pytest.raises(SourceFilesError, match="google/gemma-2-2b"):
    AutoModel.from_pretrained(pathlib.PurePosixPath("google/gemma-2-2b"))


def test_an_adapter_beside_a_whole_model_is_one_of_its_files(tmp_path, checkpoint):
  (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}')
  (tmp_path / "adapter_model.safetensors").write_bytes(b"")
  shutil.copytree(checkpoint[0], tmp_path, dirs_exist_ok=True)
  assert AutoModel.plan(tmp_path).parameters


def test_a_source_that_is_not_installed_is_said_so():
  with pytest.raises(SourceFilesError, match=r"no source 'internal'.*models\.sources"):
    AutoModel.from_pretrained("any/name", model_source=ModelSource.INTERNAL)


def test_presets_resolve_by_name_and_variant():
  assert call_model_config("llama-3.1-8b") == call_model_config("Llama-3.1-8B-Instruct")
  assert call_model_config("llama-3.2-1b").weight_tying
  assert get_model_module("llama-3.1-8b", ModelModule.MODEL).__name__ == "models_llama.llama3.model"
  with pytest.raises(ModelNameError, match="has no preset llama3p1_9b; it has llama3_8b, "):
    call_model_config("llama-3.1-9b")
  with pytest.raises(ModelNameError, match="nearest known"):
    call_model_config("lama-3.1-8b")


def test_without_config_json_the_preset_of_the_name_is_taken(edit_config):
  directory = edit_config()
  (directory / "config.json").unlink()
  with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \(64, 16\).*\(128256, 2048\)"):
    AutoModel.from_pretrained("meta-llama/Llama-3.2-1B", model_path=directory)


def test_importing_it_imports_no_family():
  code = "import sys; from models_automodel import AutoModel; print([m for m in sys.modules if m.split('.')[0] in ('models_llama', 'tokenizers', 'huggingface_hub')])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_the_package_is_typed():
  import models_automodel

  assert (pathlib.Path(models_automodel.__file__).parent / "py.typed").exists()


def test_the_system_reads_ahead_while_a_load_is_planned(checkpoint, monkeypatch, tmp_path):
  directory = checkpoint[0]
  asked = []
  monkeypatch.setattr(automodel, "read_ahead", lambda files, names: asked.append((files.path, names)))
  AutoModel.plan(directory)
  # A later call reads the cache alone.
  AutoModel.from_pretrained(directory, dtype="bfloat16", cache_dir=tmp_path / "cache", progress=False)
  assert not asked
  AutoModel.from_pretrained(directory, progress=False)
  assert asked == [(str(directory), ["model.safetensors"])]
