"""Saving: names, forms, files, dtypes, and a checkpoint that comes back as it was."""

import dataclasses
import json
import os
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError, ConfigError, SaveError
from models_core.family import Family
from models_core.formats.files import LocalFiles
from models_core.formats.safetensors import INDEX, read_safetensors
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import safetensors_writer
from models_core.saving.plan import parse_size, plan_save, plan_state, split_files
from models_core.weights.table import Form, Ignored, Tied, WeightTable

from .toys import made_of

BF16 = np.dtype(ml_dtypes.bfloat16)
STATE = {
  "embed": {"w": np.arange(24, dtype=np.float32).reshape(6, 4)},
  "layers": {
    0: {"q": np.arange(32, dtype=np.float32).astype(BF16).reshape(2, 4, 4)},
    1: {"q": -np.arange(32, dtype=np.float32).astype(BF16).reshape(2, 4, 4)},
  },
  "steps": np.int32(3),
}
FLAT = {
  "embed.w": STATE["embed"]["w"],
  "layers.0.q": STATE["layers"][0]["q"],
  "layers.1.q": STATE["layers"][1]["q"],
  "steps": STATE["steps"],
}

# Experts split or fused, under two prefixes, a tied head and a tower that no model has.
X = "layers.{i}.experts"
MOE = WeightTable(
  ("embed", [Form(f"{p}embed", "v d") for p in ("", "text.")]),
  (f"{X}.gate", [Form(f"{X}.{{e}}.gate", "f d -> e f d"), Form(f"{X}.gate_up", "e (0/2 f) d -> e f d")]),
  (f"{X}.up", [Form(f"{X}.{{e}}.up", "f d -> e f d"), Form(f"{X}.gate_up", "e (1/2 f) d -> e f d")]),
  ("turned", "turned", "d f -> f d"),
  ignored=[Ignored("tower.**", "no part of the model")],
  tied=[Tied("head", "embed"), Tied("text.head", "text.embed")],
)


def save(state, directory, *args, **options):
  if "family" in options:
    options["family"] = dataclasses.replace(options["family"], model_class=made_of(state))
  save_model_to_safetensors(state, directory, *args, **options)
  return load(directory)


def load(directory):
  """By the safetensors library, which checks the files its own way."""
  found = {}
  for file in sorted(directory.glob("*.safetensors")):
    found |= safetensors.numpy.load_file(file)
  return found


def assert_tensors(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    array = np.asarray(array)
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    assert found[name].tobytes() == array.tobytes(), name


def model_of(experts=2, features=3, width=4, layers=2):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  parameters = {"embed": draw(7, width), "turned": draw(5, width)}
  for i in range(layers):
    parameters |= {f"layers.{i}.experts.{part}": draw(experts, features, width) for part in ("gate", "up")}
  return parameters


@pytest.fixture
def family():
  """A family of nothing but a table and a configuration of one number."""

  @dataclasses.dataclass(frozen=True)
  class Config:
    width: int = 4

  return Family(
    name="toy",
    model_types=("toy",),
    model_class=nnx.Module,
    config_class=Config,
    read_config=lambda raw: Config(raw["width"]),
    write_config=lambda config: {"model_type": "toy", "width": config.width},
    weights={"huggingface": MOE},
  )


def base_of(directory, tensors, raw=None):
  directory.mkdir()
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(raw or {"model_type": "toy", "width": 4}))
  return directory


# A state dictionary alone


@pytest.mark.parametrize(
  "make", [dict, nnx.State, lambda state: jax.tree.map(jnp.asarray, state)], ids=["dict", "State", "arrays"]
)
def test_a_state_dictionary_keeps_its_names_and_shapes(make, tmp_path):
  assert_tensors(save(make(STATE), tmp_path / "out"), FLAT)
  assert os.listdir(tmp_path / "out") == ["model.safetensors"]
  assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("state", [{}, {"a": None}, {"a": "text"}, {"key": jax.random.key(0)}])
def test_what_is_no_array_is_an_error(state, tmp_path):
  with pytest.raises(TypeError):
    save_model_to_safetensors(state, tmp_path / "out")
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P(("x", "y")), P(), P(None, None, "y")])
@pytest.mark.parametrize("task", [16, 100, 1 << 20])
def test_any_sharding_gives_the_same_bytes(spec, task, tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors_writer, "_TASK", task)
  monkeypatch.setattr(safetensors_writer, "_IN_FLIGHT", 2 * task)
  mesh = jax.make_mesh((2, 2), ("x", "y"))
  array = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
  sharded = jax.device_put(array, NamedSharding(mesh, spec))
  assert_tensors(save({"a": sharded}, tmp_path / "out"), {"a": array})


def test_data_is_aligned_and_the_header_says_what_it_is(tmp_path):
  sizes = {"odd": np.zeros(3, np.int8), "half": np.zeros(5, np.float16), "wide": np.zeros(3, np.float32)}
  save(sizes | {"a": np.zeros(64, np.int8), "b": np.zeros((2, 16), np.float32)}, tmp_path / "out")
  tensors = read_safetensors(LocalFiles(str(tmp_path / "out"))).tensors
  assert [name for name, t in tensors.items() if t.start % 64 == 0] == ["b", "a", "wide"]
  assert all(t.start % t.dtype.itemsize == 0 for t in tensors.values())
  with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_files_follow_the_umask(tmp_path):
  old = os.umask(0o027)
  try:
    save_model_to_safetensors(STATE, tmp_path / "out", 64)
  finally:
    os.umask(old)
  modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
  assert set(modes.values()) == {0o640}
  assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


# Sizes


@pytest.mark.parametrize(
  ("size", "nbytes"),
  [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5 kb", 1500), ("2GiB", 2**31), ("7", 7), (9, 9)],
)
def test_sizes(size, nbytes):
  assert parse_size(size) == nbytes


@pytest.mark.parametrize(
  "size", ["", "GB", "5 apples", "-1GB", "0KB", 0, -3, True, None, 1.5, "1e9", "nanGB"]
)
def test_a_size_must_be_spelled_right(size, tmp_path):
  with pytest.raises(ValueError, match="is not a file size"):
    save_model_to_safetensors(STATE, tmp_path / "out", size)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("limit", [1, 63, 64, 96, 97, 160, 10**6])
def test_shards_hold_no_more_than_their_limit(limit, tmp_path):
  assert_tensors(save(STATE, tmp_path / "out", limit), FLAT)
  files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
  if limit == 10**6:
    assert files == ["model.safetensors"]
    return
  assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
  held = {}
  for file in files:
    tensors = safetensors.numpy.load_file(tmp_path / "out" / file)
    assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    held |= dict.fromkeys(tensors, file)
  index = json.loads((tmp_path / "out" / INDEX).read_text())
  assert index == {"metadata": {"total_size": 96 + 64 + 64 + 4}, "weight_map": held}


@pytest.mark.parametrize(
  ("limit", "files"),
  [
    (159, [["embed.w"], ["layers.0.q", "layers.1.q", "steps"]]),
    (160, [["embed.w", "layers.0.q"], ["layers.1.q", "steps"]]),
    (228, [["embed.w", "layers.0.q", "layers.1.q", "steps"]]),
    (227, [["embed.w", "layers.0.q", "layers.1.q"], ["steps"]]),
  ],
)
def test_a_shard_is_filled_to_its_limit(limit, files, tmp_path):
  """Of 96, 64, 64 and 4 bytes."""
  save(STATE, tmp_path / "out", limit)
  saved = sorted((tmp_path / "out").glob("*.safetensors"))
  assert [sorted(safetensors.numpy.load_file(path)) for path in saved] == files


# By a table


@pytest.mark.parametrize("fused", [False, True, "mixed"])
@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("head", [False, True])
def test_what_the_base_has_is_what_is_written(fused, prefix, head, family, tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors_writer, "_TASK", 40)
  parameters = model_of()
  tensors = {f"{prefix}embed": parameters["embed"], "turned": np.ascontiguousarray(parameters["turned"].T)}
  for i in range(2):
    gate, up = (parameters[f"layers.{i}.experts.{part}"] for part in ("gate", "up"))
    if fused is True or (fused == "mixed" and i):
      tensors[f"layers.{i}.experts.gate_up"] = np.concatenate([gate, up], axis=1)
    else:
      for part, array in (("gate", gate), ("up", up)):
        tensors |= {f"layers.{i}.experts.{e}.{part}": array[e] for e in range(2)}
  if head:
    tensors[f"{prefix}head"] = parameters["embed"]
  tensors["tower.0.w"] = np.arange(50, dtype=np.float16)
  base = base_of(tmp_path / "base", tensors)
  found = save(parameters, tmp_path / "out", 100, family=family, config=family.config_class(), base=base)
  assert_tensors(found, tensors)


def test_without_a_base_the_first_form_is_written(family, tmp_path):
  parameters = model_of(layers=1)
  found = save(parameters, tmp_path / "out", family=family, config=family.config_class())
  assert found.keys() == {"embed", "turned"} | {
    f"layers.0.experts.{e}.{p}" for e in range(2) for p in ("gate", "up")
  }
  np.testing.assert_array_equal(found["turned"], parameters["turned"].T)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
    "model_type": "toy",
    "width": 4,
    "torch_dtype": "float32",
    "dtype": "float32",
  }


def test_parameters_that_the_base_lacks_take_the_form_of_their_likes(family, tmp_path):
  parameters = model_of(layers=1)
  gate, up = (parameters[f"layers.0.experts.{part}"] for part in ("gate", "up"))
  tensors = {
    "text.embed": parameters["embed"],
    "turned": parameters["turned"].T.copy(),
    "layers.0.experts.gate_up": np.concatenate([gate, up], axis=1),
  }
  base = base_of(tmp_path / "base", tensors)
  longer = parameters | {f"layers.1.experts.{p}": parameters[f"layers.0.experts.{p}"] for p in ("gate", "up")}
  found = save(longer, tmp_path / "longer", family=family, config=family.config_class(), base=base)
  assert found.keys() == tensors.keys() | {"layers.1.experts.gate_up"}


@pytest.mark.parametrize("fused", [[0, 2], [1, 2], [1]], ids=str)
def test_parameters_that_the_base_lacks_take_the_form_that_most_of_their_likes_have(fused, family, tmp_path):
  """Of three layers of the base; the model has a fourth."""
  parameters = model_of(layers=4)
  tensors = {"embed": parameters["embed"], "turned": np.ascontiguousarray(parameters["turned"].T)}
  for i in range(3):
    gate, up = (parameters[f"layers.{i}.experts.{part}"] for part in ("gate", "up"))
    if i in fused:
      tensors[f"layers.{i}.experts.gate_up"] = np.concatenate([gate, up], axis=1)
    else:
      for part, array in (("gate", gate), ("up", up)):
        tensors |= {f"layers.{i}.experts.{e}.{part}": array[e] for e in range(2)}
  base = base_of(tmp_path / "base", tensors)
  found = save(parameters, tmp_path / "out", family=family, config=family.config_class(), base=base)
  split = {f"layers.3.experts.{e}.{part}" for e in range(2) for part in ("gate", "up")}
  assert found.keys() - tensors.keys() == ({"layers.3.experts.gate_up"} if len(fused) > 1 else split)


def test_parameters_without_their_likes_take_the_form_of_others_with_as_many(family, tmp_path):
  """Most names of the base have the second prefix, those of layers the first one."""
  both = lambda name: [Form(f"{prefix}{name}", "d") for prefix in ("", "text.")]
  names = ("norm", "scale", "gain", "bias")
  table = WeightTable(*((name, both(name)) for name in names), ("layers.{i}", both("m.{i}")))
  family = dataclasses.replace(family, weights={"huggingface": table})
  values = np.arange(3, dtype=np.float32)
  held = dict.fromkeys(["text.norm", "text.scale", "text.gain", "m.0"], values)
  base = base_of(tmp_path / "base", held)
  parameters = dict.fromkeys([*names, "layers.0", "layers.1"], values)
  found = save(parameters, tmp_path / "out", family=family, config=family.config_class(), base=base)
  assert found.keys() - held.keys() == {"text.bias", "m.1"}


def test_layers_that_the_model_lacks_are_left_out_and_named(family, tmp_path, caplog):
  longer = model_of(layers=2)
  save(longer, tmp_path / "base", family=family, config=family.config_class())
  shorter = {name: array for name, array in longer.items() if not name.startswith("layers.1.")}
  found = save(shorter, tmp_path / "out", family=family, config=family.config_class(), base=tmp_path / "base")
  assert not [name for name in found if name.startswith("layers.1.")]
  assert "4 tensors of the base are not saved" in caplog.text


def test_a_base_of_another_architecture_is_an_error(family, tmp_path):
  base = base_of(tmp_path / "base", {"embed": model_of()["embed"], "other.w": np.zeros(3, np.float32)})
  with pytest.raises(CheckpointError, match=r"other\.w \(3,\) is unexpected"):
    save_model_to_safetensors(
      model_of(), tmp_path / "out", family=family, config=family.config_class(), base=base
    )
  assert not (tmp_path / "out").exists()


def test_a_half_of_a_fused_tensor_is_an_error():
  table = WeightTable(("gate", "gate_up", "(0/2 f) d -> f d"))
  with pytest.raises(TypeError, match=r"gate_up.*would be incomplete: only gate fills it"):
    plan_save({"gate": np.zeros((3, 4), np.float32)}, table)


def test_fields_of_the_base_that_are_not_ours_stay(family, tmp_path):
  save(model_of(), tmp_path / "first", family=family, config=family.config_class())
  raw = {"model_type": "toy", "width": 9, "eos_token_id": [1, 2], "dtype": "bfloat16"}
  (tmp_path / "first" / "config.json").write_text(json.dumps(raw))
  save(model_of(), tmp_path / "out", family=family, config=family.config_class(), base=tmp_path / "first")
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
    "model_type": "toy",
    "width": 4,
    "eos_token_id": [1, 2],
    "dtype": "float32",
    "torch_dtype": "float32",
  }


def test_a_configuration_that_config_json_cannot_state_is_an_error(family, tmp_path):
  broken = dataclasses.replace(
    family, read_config=lambda raw: family.config_class(5), model_class=made_of(model_of())
  )
  with pytest.raises(ConfigError, match="width would be read back with another value"):
    save_model_to_safetensors(model_of(), tmp_path / "out", family=broken, config=family.config_class())
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"config": 1}, {"family": True}, {"base": "."}])
def test_family_config_and_base_go_together(options, family, tmp_path):
  options = {key: family if key == "family" else value for key, value in options.items()}
  with pytest.raises(ConfigError):
    save_model_to_safetensors(model_of(), tmp_path / "out", **options)


def test_what_belongs_to_a_model_comes_along(family, tmp_path):
  base = base_of(tmp_path / "base", {"embed": model_of()["embed"]})
  comes = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE"]
  stays = ["README.md", "pytorch_model.bin", "model.gguf", "optimizer.pt", "trainer_state.json", "events.out"]
  for name in comes + stays:
    (base / name).write_text(f"words of {name}")
  save(model_of(), tmp_path / "out", family=family, config=family.config_class(), base=base)
  for name in comes:
    assert (tmp_path / "out" / name).read_text() == f"words of {name}"
  assert sorted(os.listdir(tmp_path / "out")) == sorted([*comes, "config.json", "model.safetensors"])


# Dtypes


def test_a_dtype_is_that_of_floating_point_parameters(tmp_path):
  found = save(STATE, tmp_path / "out", dtype="float16")
  assert_tensors(found, {n: a if n == "steps" else a.astype(np.float16) for n, a in FLAT.items()})


def test_halves_of_a_fused_tensor_have_one_dtype(family, tmp_path):
  parameters = model_of(layers=1)
  halves = parameters | {"layers.0.experts.up": parameters["layers.0.experts.up"].astype(BF16)}
  gate_up = np.zeros((2, 6, 4), np.float32)
  base = base_of(tmp_path / "base", {"embed": parameters["embed"], "layers.0.experts.gate_up": gate_up})
  found = save(halves, tmp_path / "out", family=family, config=family.config_class(), base=base)
  expected = [halves["layers.0.experts.gate"], halves["layers.0.experts.up"].astype(np.float32)]
  np.testing.assert_array_equal(found["layers.0.experts.gate_up"], np.concatenate(expected, axis=1))


def test_numbers_that_do_not_fit_are_an_error(tmp_path):
  state = {"a": np.array([1.0, 1e6], BF16)}
  with pytest.raises(SaveError, match=r"a: .* does not fit into float16"):
    save_model_to_safetensors(state, tmp_path / "out", dtype="float16")
  assert not os.listdir(tmp_path)
  infinite = save({"a": np.array([np.inf, np.nan], BF16)}, tmp_path / "out", dtype="float16")
  assert np.isinf(infinite["a"][0])
  assert np.isnan(infinite["a"][1])


@pytest.mark.parametrize(
  ("dtype", "largest"),
  [
    ("float8_e4m3fn", 448),
    ("float8_e5m2", 57344),
    ("float8_e4m3fnuz", 240),
    ("float8_e5m2fnuz", 57344),
    ("float16", 65504),
  ],
)
def test_the_largest_number_fits_and_none_beyond(dtype, largest, tmp_path):
  """Some of these types have no infinity: what is too large for them would become NaN."""
  dtype = np.dtype(jnp.dtype(dtype))
  save_model_to_safetensors({"a": np.float32([largest, -largest, np.nan])}, tmp_path / "fits", dtype=dtype)
  files = LocalFiles(str(tmp_path / "fits"))
  info = read_safetensors(files).tensors["a"]
  stored = np.frombuffer(files.read(info.file, info.start, info.stop), dtype).astype(np.float32)
  np.testing.assert_array_equal(stored, [largest, -largest, np.nan])
  for beyond in (2 * largest, -2 * largest):
    with pytest.raises(
      SaveError, match=rf"a: {beyond}.* does not fit into {dtype}: write it in another dtype"
    ):
      save_model_to_safetensors({"a": np.float32([0, beyond])}, tmp_path / "out", dtype=dtype)
  assert os.listdir(tmp_path) == ["fits"]


@pytest.mark.parametrize(
  ("dtype", "message"),
  [
    ("int32", "expected a floating-point type"),
    ("bool", "expected a floating-point type"),
    ("bf17", "dtype='bf17' is not a data type"),
    ("float64", "jax_enable_x64"),
  ],
)
def test_a_dtype_that_is_no_float_is_an_error(dtype, message, tmp_path):
  with pytest.raises(TypeError, match=message):
    save_model_to_safetensors(STATE, tmp_path / "out", dtype=dtype)
  assert not (tmp_path / "out").exists()


def test_every_type_that_jax_has_comes_back(tmp_path):
  kinds = [bool, "u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "c8"]
  kinds += [BF16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
  state = {str(np.dtype(kind)): np.array([[0, 1, 1]]).astype(kind) for kind in kinds}
  save_model_to_safetensors(state, tmp_path / "out")
  files = LocalFiles(str(tmp_path / "out"))
  found = read_safetensors(files).tensors
  assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
    n: (a.dtype, a.shape) for n, a in state.items()
  }
  for name, info in found.items():
    assert files.read(info.file, info.start, info.stop) == state[name].tobytes()


def test_empty_arrays_and_scalars(tmp_path):
  state = {"empty": np.zeros((0, 3), np.float32), "rows": np.zeros((3, 0), np.float32), "one": np.float32(2)}
  assert_tensors(save(state, tmp_path / "out"), state)


def test_a_plan_needs_shapes_alone():
  shapes = {"a": jax.ShapeDtypeStruct((3, 4), np.dtype("float32"))}
  (file,) = split_files(plan_state(shapes), 10**9)
  assert file.nbytes == len(file.layout[0]) + 48


def test_progress_is_told_of_all_bytes(tmp_path):
  totals, counts = [], []
  save(STATE, tmp_path / "saved", 100, on_total=totals.append, on_bytes=counts.append)
  assert totals == [sum(counts)] == [sum(array.nbytes for array in FLAT.values())]


# Shapes and the configuration


@dataclasses.dataclass(frozen=True)
class Sizes:
  vocab_size: int = 7
  num_layers: int = 2
  weight_tying: bool = False


SIZES = Family(
  name="sized",
  model_types=("sized",),
  model_class=lambda config, *, rngs: made_of(sized(config))(config, rngs=rngs),
  config_class=Sizes,
  read_config=lambda raw: Sizes(*(raw[field.name] for field in dataclasses.fields(Sizes))),
  write_config=lambda config: {"model_type": "sized"} | dataclasses.asdict(config),
  weights={
    "huggingface": WeightTable(
      ("embedder.input_embedding", "embed", "v d"), ("lm_head.w", "head", "v d"), ("layers.{i}.w", "{i}", "d")
    )
  },
)


def sized(config):
  rows = {"embedder.input_embedding": np.zeros((config.vocab_size, 4), np.float32)}
  rows |= {} if config.weight_tying else {"lm_head.w": rows["embedder.input_embedding"]}
  return rows | {f"layers.{i}.w": np.zeros(4, np.float32) for i in range(config.num_layers)}


@pytest.mark.parametrize(
  "change", [{"vocab_size": 9}, {"num_layers": 3}, {"num_layers": 1}, {"weight_tying": True}], ids=str
)
def test_parameters_of_another_configuration_are_refused_with_the_field(change, tmp_path):
  ((field, value),) = change.items()
  parameters = sized(Sizes(**change))
  with pytest.raises(ConfigError, match=rf"config=dataclasses\.replace\(model\.config, {field}={value}\)"):
    save_model_to_safetensors(parameters, tmp_path / "out", family=SIZES, config=Sizes())
  assert not os.listdir(tmp_path)
  save_model_to_safetensors(parameters, tmp_path / "out", family=SIZES, config=Sizes(**change))
  assert json.loads((tmp_path / "out" / "config.json").read_text())[field] == value


def test_parameters_of_no_configuration_are_refused_with_their_shapes(tmp_path):
  parameters = sized(Sizes()) | {
    "layers.0.w": np.zeros(5, np.float32),
    "lm_head.w": np.zeros((9, 4), np.float32),
  }
  with pytest.raises(
    ConfigError, match=r"lm_head\.w has shape \(9, 4\), but the configuration needs \(7, 4\) \(and 1 more"
  ):
    save_model_to_safetensors(parameters, tmp_path / "out", family=SIZES, config=Sizes())
  assert not os.listdir(tmp_path)


def test_a_statement_that_the_base_was_quantised_is_not_repeated(tmp_path):
  raw = {"quantization_config": {"quant_method": "awq"}, "text_config": None, "quantization": {}}
  base = base_of(
    tmp_path / "base", {"embed": np.zeros((7, 4), np.float32)}, raw | SIZES.write_config(Sizes())
  )
  save_model_to_safetensors(sized(Sizes()), tmp_path / "out", family=SIZES, config=Sizes(), base=base)
  assert not raw.keys() - {"text_config"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
