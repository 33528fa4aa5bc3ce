"""The contract of every architecture, as a test class that the architecture's package subclasses.

    class TestLlama3(FamilyContract):
      family = FAMILY
      config = ModelConfig(...)               # tiny, no field with its default value
      changes = {"num_layers": 3, ...}        # another value for each field

The tests need four devices: put `jax.config.update("jax_num_cpu_devices", 4)` into the package's conftest.py.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as users do, which takes several times as long.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models_core.config import VOCABULARY_FIELDS, field_of
from models_core.digest import digest
from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import ConfigError
from models_core.family import FAMILY_API_VERSION, Family
from models_core.formats import SINGLE, LocalFiles, file_layout, read_safetensors
from models_core.hlo import Program, Use
from models_core.layers import Cache, RematConfig, by_layer, dotted, find_mesh, mean_cross_entropy
from models_core.loading import AbstractParameter, abstract_model, load, plan_load
from models_core.rollout import LazyCheckpoint, from_checkpoint, to_checkpoint
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.score_model import ScoreModel, score_family
from models_core.sharding import ShardingConfig
from models_core.stacks import layer_names, layers_of
from models_core.vocabulary import resize_vocabulary
from models_core.weights import WeightTable, letter_sizes, pieces, put_back

R = TypeVar("R")

# Largest error of float32 logits, relative to the largest logit.
TOLERANCE = 2e-5
# A scan computes the same in other fusions, which round differently; so does a mesh, by up to 6e-6 in gradients.
SCANNED = 1e-5

# All tests use the same B sequences of T tokens, from the first 32 tokens of the vocabulary.
B, T = 2, 7
TOKENS = np.random.default_rng(0).integers(0, 32, (B, T), np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()

# Fields of a configuration that describe how a process runs the model.
_OF_THE_PROCESS = {"shd_config", "remat_config", "scan_layers", "attn_implementation"}

MESHES = {
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), devices=jax.devices()[:4]),
  "auto": lambda: Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp")),
}


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
  """Asserts that the largest error of logits is at most `tolerance` times their largest absolute value."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.isfinite(expected).all()
  error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
  assert error <= tolerance * scale, f"the largest error is {error:.3g}, the largest value {scale:.3g}"


def write_checkpoint(
  directory: pathlib.Path, family: Family, config: Any, model: nnx.Module
) -> dict[str, np.ndarray]:
  """Writes a model as a directory with config.json and one safetensors file. Returns the tensors by name."""
  tensors = to_tensors(model, family.huggingface)
  beginning, starts = file_layout({name: (array.dtype, array.shape) for name, array in tensors.items()})
  data = b"".join(tensors[name].tobytes() for name in sorted(starts, key=starts.__getitem__))
  (directory / SINGLE).write_bytes(beginning + data)
  (directory / "config.json").write_text(json.dumps(family.write_config(config)))
  return tensors


def to_tensors(model: nnx.Module, table: WeightTable) -> dict[str, np.ndarray]:
  """Turns a model's parameters into a checkpoint's tensors, in the first form of each row of a weight table."""
  tensors: dict[str, np.ndarray] = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    name, value = ".".join(map(str, path)), np.asarray(variable.get_value())
    row, at = table.row_of(name)
    for piece in pieces(row, row.forms[0], at, value.shape, letter_sizes(getattr(model, "config", None))):
      tensor = tensors.setdefault(piece.tensor, np.zeros(piece.shape, value.dtype))
      put_back(value[piece.target], piece, tensor)
  return tensors


@pytest.fixture
def compilations() -> Iterator[list[dict[str, str | int]]]:
  """The programs that were compiled since the fixture was called; a conftest.py imports it."""
  found: list[dict[str, str | int]] = []

  def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if "backend_compile" in event:
      found.append(kwargs)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield found
  jax.monitoring.unregister_event_duration_listener(note)


def _draw(parameter: AbstractParameter, dtype: Any = None) -> jax.Array:
  """Random values, on a parameter's devices: around one in a norm, else around zero. They depend on the name alone.

  They are drawn on the host, which compiles nothing. They are so large that attention is far from uniform, and not so
  large that layers amplify how a program rounds.
  """
  names = layer_names(parameter.name)
  shape = parameter.shape if layers_of(parameter.name) is None else parameter.shape[1:]
  values = np.stack(
    [np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.15, shape) for name in names]
  )
  values = (values + (parameter.init == "ones")).reshape(parameter.shape)
  return jax.device_put(values.astype(dtype or parameter.dtype), parameter.sharding)


def shard_nbytes(array: jax.Array) -> int:
  """Bytes of an array on one device."""
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


# XLA takes this many threads for all simulated devices. With one for each core, programs with collectives that run at once
# may take all of them and wait for one another for good.
os.environ.setdefault("NPROC", "64")
# Programs run once, so compiling them is what takes time.
_QUICK = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
# Emitters of fusions take most of a compilation. JAX 0.11 and newer have nothing else.
_COMPILER_OPTIONS: dict[str, bool | str] | None = (
  {"xla_cpu_use_fusion_emitters": False} if _QUICK and jax.__version_info__ < (0, 11) else None
)


def _jit(function: Callable[..., R]) -> Callable[..., R]:
  """`nnx.jit` of a function of a model, without the changes that it makes to the model, and quickly compiled."""

  @functools.partial(jax.jit, static_argnums=0, compiler_options=_COMPILER_OPTIONS)
  def run(graphdef: Any, state: Any, args: tuple[Any, ...]) -> R:
    return function(nnx.merge(graphdef, state), *args)

  @functools.wraps(function)
  def call(model: nnx.Module, *args: Any) -> R:
    return run(*nnx.split(model), args)

  return call


@_jit
def _call(
  model: Any,
  tokens: Any,
  positions: Any,
  cache: Cache | None = None,
  mask: Any = None,
  segment_ids: Any = None,
) -> tuple[jax.Array, Any]:
  return model(tokens, positions, cache, mask, segment_ids=segment_ids)


@_jit
def _call_in_parts(model: Any, tokens: Any, positions: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  hidden, _ = model(tokens, positions, output_hidden_states=True, skip_lm_head=True)
  kept: Any = nnx.pop(model, nnx.Intermediate)["all_hidden_states"]
  return hidden, kept.get_value()[0], model.compute_final_logits(hidden[:, -1:])


@_jit
def _scores(model: Any, tokens: Any, positions: Any) -> jax.Array:
  return model(tokens, positions)[0]


def _loss(model: Any, tokens: Any, positions: Any) -> jax.Array:
  logits, _ = model(tokens, positions)
  return mean_cross_entropy(logits[:, :-1], tokens[:, 1:])


_gradients = _jit(nnx.grad(_loss))


def _step(model: Any, optimizer: nnx.Optimizer, tokens: jax.Array, positions: jax.Array) -> jax.Array:
  value, grads = nnx.value_and_grad(_loss)(model, tokens, positions)
  optimizer.update(model, grads)
  return value


_jitted_step: Any = nnx.jit(_step, donate_argnums=(0, 1))


def _train(model: Any) -> list[float]:
  """Losses of three steps of gradient descent, in which model and optimiser donate their buffers."""
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  # It lies beside the weights after a step; if it did not before, the next step would be another program.
  mesh = find_mesh(model.embedder.input_embedding.get_value())
  if mesh is not None:
    optimizer.step.set_value(jax.device_put(optimizer.step.get_value(), NamedSharding(mesh, PartitionSpec())))
  args = model, optimizer, jnp.asarray(TOKENS), jnp.asarray(POSITIONS)
  step = _jitted_step.lower(*args).compile(_COMPILER_OPTIONS)
  return [float(step(*args)) for _ in range(3)]


def _generate(fill: Callable[..., Any], parameters: Any, tokens: jax.Array) -> Any:
  """Logits of a prefill and of one more token, and the cache."""
  model, positions = fill(parameters), jnp.asarray(POSITIONS)
  logits, cache = model(tokens, positions, model.init_cache(B, T + 1))
  return logits, model(tokens[:, :1], positions[:, :1] + T, cache)


def _forward(fill: Callable[..., Any], parameters: Any, tokens: jax.Array) -> jax.Array:
  return fill(parameters)(tokens, jnp.asarray(POSITIONS))[0]


def _gradient(fill: Callable[..., Any], parameters: Any, tokens: jax.Array) -> Any:
  return jax.grad(lambda parameters: mean_cross_entropy(_forward(fill, parameters, tokens), tokens))(
    parameters
  )


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program of a model.

  Attributes:
    program: what it does, on one device of the mesh.
    weights: names of the parameters with two or more axes.
    config: of the model.
    num_embed: V, rows of the model's embedding.
  """

  program: Program
  weights: frozenset[str]
  config: Any
  num_embed: int

  def sent(self) -> collections.Counter[str]:
    """How often each weight is sent between devices."""
    return collections.Counter(
      name for use in self.program.collectives for name in use.arguments & self.weights
    )

  def reductions(self) -> list[Use]:
    """Reductions over devices of something as large as activations [B / 2, T, D / 2]."""
    least = B // 2 * T * self.config.embed_dim // 2
    names = ("all-reduce", "reduce-scatter")
    uses = [use for use in self.program.collectives if use.instruction.opcode.startswith(names)]
    return [use for use in uses for size in use.instruction.sizes if size >= least]

  def activations_sent(self) -> int:
    """How many activations [.., D / 2], or several times as large, are sent between devices."""
    half = self.config.embed_dim // 2
    sizes = [size for use in self.program.collectives if not use.arguments for size in use.instruction.sizes]
    return sum(size > 0 and size % half == 0 for size in sizes)

  def logits_sent(self) -> list[str]:
    """Instructions that send logits, [B / 2, T, V / 2] or several times as many, between devices."""
    logits = B // 2 * T * self.num_embed // 2
    return [
      use.instruction.line
      for use in self.program.collectives
      if not use.arguments and any(size and size % logits == 0 for size in use.instruction.sizes)
    ]


class Halved(nnx.Module):
  """A wrapper that callers may put around a layer or an attention block without knowing its arguments."""

  def __init__(self, inner: nnx.Module):
    self.inner = inner

  def __call__(self, *args: Any) -> tuple[jax.Array, Any]:
    """Returns half of the inner module's output, and its cache."""
    x, cache = self.inner(*args)
    return x / 2, cache


class Changing(nnx.Module):
  """A wrapper that changes in every call, as dropout and statistics do, and that adds a parameter in its first one."""

  def __init__(self, inner: nnx.Module):
    self.inner = inner
    self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

  def __call__(self, x: jax.Array, *args: Any) -> tuple[jax.Array, Any]:
    """Returns the inner module's output times the parameter, half of it dropped, and its cache."""
    self.calls[...] += 1
    if not hasattr(self, "gain"):
      self.gain = nnx.LoRAParam(jnp.ones(x.shape[-1]), out_sharding=PartitionSpec("tp"), eager_sharding=False)
    x, cache = self.inner(x, *args)
    return self.dropout(x * self.gain[...]), cache


class FamilyContract:
  """Tests of one architecture. Subclass it with the family and a tiny configuration.

  Attributes:
    family: under test.
    config: tiny, with at least two layers, two query heads for each KV head and a vocabulary of 32 tokens.
    changes: another value for each field of the configuration except `shd_config`, `remat_config`, `scan_layers` and
      `attn_implementation`. A field that has no effect in `config`, such as `num_experts` in a dense model, may be left
      out if one of `others` changes it.
    others: further configurations of the family; test each in a subclass of its own, too.
    deep: fields of a configuration with more layers, some of which repeat, for the tests of `scan_layers`.
    even: sizes for the tests of compiled programs, in place of those of `config` that are larger than 1. Two devices
      divide each, no product of them is divisible by T, and the vocabulary is much larger than the rest.
  """

  family: ClassVar[Family]
  config: ClassVar[Any]
  changes: ClassVar[Mapping[str, Any]]
  others: ClassVar[tuple[Any, ...]] = ()
  deep: ClassVar[Mapping[str, Any]] = {"num_layers": 3}
  even: ClassVar[Mapping[str, int]] = {
    "vocab_size": 256,
    "num_embed": 256,
    "embed_dim": 48,
    "hidden_dim": 80,
    "moe_hidden_dim": 36,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 10,
    "num_experts": 4,
  }

  @pytest.fixture(scope="class", autouse=True)
  @classmethod
  def _quick_programs(cls) -> Iterator[None]:
    former = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", _QUICK)
    yield
    jax.config.update("jax_disable_most_optimizations", former)

  @pytest.fixture(scope="class", autouse=True)
  @classmethod
  def _devices(cls) -> None:
    assert jax.device_count() >= 4, (
      'the contract needs four devices: put jax.config.update("jax_num_cpu_devices", 4) into conftest.py'
    )

  @pytest.fixture(scope="class")
  @classmethod
  def model(cls) -> Any:
    """A model on one device."""
    return cls.make(cls.config)

  @pytest.fixture(scope="class", params=sorted(MESHES))
  @classmethod
  def mesh(cls, request: pytest.FixtureRequest) -> Mesh:
    """A mesh of 2 x 2 devices, with Auto and with Explicit axes."""
    return MESHES[request.param]()

  @pytest.fixture(scope="class")
  @classmethod
  def sharded(cls, mesh: Mesh) -> Any:
    """The same model, sharded over the mesh."""
    return cls.make(cls.config, mesh)

  @pytest.fixture(scope="class")
  @classmethod
  def expected(cls, model: Any) -> np.ndarray:
    """Logits [B, T, V] on one device, from one pass without a cache."""
    return np.asarray(_call(model, TOKENS, POSITIONS)[0])

  @classmethod
  def make(cls, config: Any, mesh: Mesh | None = None, dtype: Any = None) -> Any:
    """Makes a model of the family with random weights; all their dtypes are `dtype`, if it is given."""
    model = abstract_model(cls.family.model_class, config, mesh)
    return model.fill({name: _draw(parameter, dtype) for name, parameter in model.parameters.items()})

  @classmethod
  def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name."""
    return {name: p.shape for name, p in abstract_model(cls.family.model_class, config).parameters.items()}

  # Weight tables

  def test_family_is_written_for_this_version_of_the_contract(self) -> None:
    assert self.family.api_version == FAMILY_API_VERSION
    assert "huggingface" in self.family.weights

  def test_every_parameter_has_one_row_in_every_naming_scheme(self) -> None:
    for config in self._all_configs():
      names = self.shapes(config)
      for table, name in itertools.product(self.family.weights.values(), names):
        assert len([row for row in table.rows if row.match(name) is not None]) == 1, (
          f"the parameter {name} must have exactly one row in each weight table"
        )

  def test_every_row_has_a_parameter(self) -> None:
    names = {name for config in self._all_configs() for name in self.shapes(config)}
    for scheme, table in self.family.weights.items():
      for row in table.rows:
        assert any(row.match(name) is not None for name in names), (
          f"weights[{scheme!r}]: no configuration has a parameter {row.ours}"
        )

  def test_loading_and_saving_keep_every_bit(self, model: Any, mesh: Mesh, tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path, self.family, self.config, model)
    config = self.family.read_config(json.loads((tmp_path / "config.json").read_text()))
    abstract = abstract_model(self.family.model_class, config, mesh)
    loaded = load(plan_load(read_safetensors(LocalFiles(str(tmp_path))), abstract, self.family.huggingface))
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, loaded))
    assert ours.keys() == theirs.keys()
    for path, variable in ours.items():
      assert isinstance(theirs[path].get_value(), jax.Array), f"{path} was not loaded"
      np.testing.assert_array_equal(variable.get_value(), theirs[path].get_value())
    self._assert_saves_bit_by_bit(loaded, config, tmp_path)

  def _assert_saves_bit_by_bit(self, loaded: nnx.Module, config: Any, base: pathlib.Path) -> None:
    state = nnx.state(loaded, nnx.Param)
    save_model_to_safetensors(state, base / "again", "9KB", family=self.family, config=config, base=base)
    first, again = (LocalFiles(str(directory)) for directory in (base, base / "again"))
    stored, saved = (read_safetensors(files).tensors for files in (first, again))
    assert stored.keys() == saved.keys()
    for name, info in stored.items():
      other = saved[name]
      assert (info.dtype, info.shape) == (other.dtype, other.shape), name
      assert first.read(info.file, info.start, info.stop) == again.read(
        other.file, other.start, other.stop
      ), name
    raw = json.loads((base / "again" / "config.json").read_text())
    assert self.family.read_config(raw) == config

  def test_arrays_of_a_checkpoint_are_the_saved_tensors_and_fill_a_model(
    self, model: Any, sharded: Any, mesh: Mesh
  ) -> None:
    arrays, expected = to_checkpoint(sharded, self.family), to_tensors(model, self.family.huggingface)
    assert arrays.keys() == expected.keys()
    for name, tensor in expected.items():
      assert np.asarray(arrays[name]).tobytes() == tensor.tobytes(), name
      assert arrays[name].shape == tensor.shape, name
      assert arrays[name].sharding.device_set == set(mesh.devices.flat), name
    other = self.make(self.config, mesh)
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other)))
    from_checkpoint(other, self.family, LazyCheckpoint(sharded, self.family))
    for ours, theirs in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (sharded, other)), strict=True):
      ours, theirs = ours[1].get_value(), theirs[1].get_value()
      np.testing.assert_array_equal(ours, theirs)
      assert ours.sharding == theirs.sharding

  def test_mappings_for_samplers_have_an_entry_for_each_axis(self, model: Any) -> None:
    arrays = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    shapes = {".".join(map(str, path)): variable.get_value().shape for path, variable in arrays.items()}
    for backend in model.BACKEND_MAPPINGS:
      orders, hooks = model.to_hf_transpose_keys(backend), model.to_hf_hook_fns(backend)
      for pattern, (_, spec) in model.BACKEND_MAPPINGS[backend]["to_hf_mappings"].items():
        for name in (pattern.replace("*", str(i)) for i in range(self.config.num_layers)):
          if name in shapes:
            array = np.empty(shapes[name]).transpose(orders.get(pattern))
            assert hooks.get(name, np.asarray)(array).ndim == len(spec), name

  # Configuration

  def _all_configs(self) -> Iterator[Any]:
    yield self.config
    for name, value in self.changes.items():
      yield dataclasses.replace(self.config, **{name: value})
    yield from self.others

  def test_every_config_field_changes_shapes_or_output(self, model: Any, expected: np.ndarray) -> None:
    own = {field.name for field in dataclasses.fields(self.config)} - _OF_THE_PROCESS
    own = {field.name for field in dataclasses.fields(self.config)} - _OF_THE_PROCESS
    elsewhere = {n for other in self.others for n in own if getattr(other, n) != getattr(self.config, n)}
    assert own - elsewhere <= set(self.changes) <= own, (
      "changes must hold another value for each field of the configuration"
    )
    shapes = self.shapes(self.config)
    for name, value in self.changes.items():
      config = dataclasses.replace(self.config, **{name: value})
      if self.shapes(config) == shapes:
        logits, _ = _call(self.make(config), TOKENS, POSITIONS)
        assert np.abs(np.asarray(logits) - expected).max() > 1e-3 * np.abs(expected).max(), (
          f"another value of {name} changes neither shapes nor logits"
        )

  def test_sharding_config_decides_the_shardings(self) -> None:
    names = [field.name for field in dataclasses.fields(ShardingConfig)]
    default = self.config.shd_config
    reversed_specs: dict[str, Any] = {
      n: (v if (v := getattr(default, n)) is None else tuple(reversed(tuple(v)))) for n in names
    }
    config = dataclasses.replace(self.config, shd_config=ShardingConfig(**reversed_specs))
    mesh = MESHES["auto"]()
    before, after = (
      {n: p.sharding for n, p in abstract_model(self.family.model_class, c, mesh).parameters.items()}
      for c in (self.config, config)
    )
    assert before != after

  @pytest.mark.parametrize("remat", [RematConfig.BLOCK, RematConfig.DECODER])
  def test_remat_keeps_fewer_bytes_and_changes_no_logit(
    self, model: Any, expected: np.ndarray, remat: RematConfig
  ) -> None:
    again = self.make(dataclasses.replace(self.config, remat_config=remat))
    assert_close(_call(again, TOKENS, POSITIONS)[0], expected)

    def kept(model: nnx.Module) -> int:
      """Bytes kept for the backward pass, parameters included."""
      graphdef, state = nnx.split(model)
      loss = lambda state: nnx.merge(graphdef, state)(TOKENS, POSITIONS)[0].sum()
      arrays = jax.tree.leaves(jax.eval_shape(lambda state: jax.vjp(loss, state)[1], state))
      return sum(array.size * array.dtype.itemsize for array in arrays)

    assert kept(again) < kept(self.make(dataclasses.replace(self.config, remat_config=RematConfig.NONE)))

  def test_a_wrapper_around_a_layer_or_its_attention_is_called(self, expected: np.ndarray) -> None:
    found = []
    for remat in (RematConfig.NONE, RematConfig.BLOCK, RematConfig.DECODER):
      model = self.make(dataclasses.replace(self.config, remat_config=remat))
      model.layers[0] = Halved(model.layers[0])
      model.layers[1].attn = Halved(model.layers[1].attn)
      found.append(np.asarray(_call(model, TOKENS, POSITIONS)[0]))
      assert_close(found[-1], found[0])
    assert np.abs(found[0] - expected).max() > 1e-2 * np.abs(expected).max()

  # The model as a module

  def test_a_call_changes_the_model_itself(self, mesh: Mesh) -> None:
    model = self.make(self.config, mesh)
    model.layers[0] = changing = Changing(model.layers[0])
    call: Any = nnx.jit(lambda model: model(TOKENS, POSITIONS)[0])
    _, second, third = (np.asarray(call(model)) for _ in range(3))
    assert int(changing.calls[...]) == 3, "a value that a call sets in a module must stay"
    assert np.abs(second - third).max() > 1e-3 * np.abs(second).max(), (
      "dropout must drop other values each time"
    )
    gain: Any = changing.gain.get_raw_value()
    assert gain.sharding.mesh == mesh, "a parameter that a call adds must stay, on the mesh of the model"

  def test_the_state_is_one_tree_on_every_mesh(self, model: Any, sharded: Any) -> None:
    one, other = (jax.tree.flatten(nnx.state(m))[1] for m in (model, sharded))
    assert bool(one == other)  # type: ignore[operator]
    for path, variable in nnx.to_flat_state(nnx.state(sharded, nnx.Param)):
      assert isinstance(variable.get_metadata()["out_sharding"], PartitionSpec), path

  def test_gradients_take_a_parameters_bytes(self, sharded: Any) -> None:
    graphdef, state = nnx.split(sharded)
    grad = jax.jit(jax.grad(lambda state: _loss(nnx.merge(graphdef, state), TOKENS, POSITIONS)))
    held = sum(shard_nbytes(array) for array in jax.tree.leaves(state))
    account: Any = grad.lower(state).compile(_COMPILER_OPTIONS).memory_analysis()
    assert account.output_size_in_bytes <= 1.02 * held

  def test_embeddings_take_the_place_of_tokens(self, model: Any, expected: np.ndarray) -> None:
    embeds = model.embed(TOKENS)
    last = _jit(
      lambda model, embeds: model(None, POSITIONS, inputs_embeds=embeds, decode_only_last_token=True)[0]
    )
    assert_close(last(model, embeds), expected[:, -1:])

  def test_config_survives_config_json(self) -> None:
    for config in self._all_configs():
      raw = json.loads(json.dumps(self.family.write_config(config)))
      again = self.family.read_config(raw)
      assert again == config, "read_config does not return the configuration that write_config wrote"

  @pytest.mark.parametrize("change", [{"head_dim": 3}, {"num_kv_heads": 0}, {"num_heads": -4}], ids=str)
  def test_sizes_that_no_decoder_has_are_refused(self, change: dict[str, int]) -> None:
    fields = {field.name for field in dataclasses.fields(self.config)}
    if not change.keys() <= fields:
      pytest.skip("the configuration has no such field")
    with pytest.raises(ConfigError):
      dataclasses.replace(self.config, **change)

  def test_remat_config_may_be_a_name_or_a_number(self) -> None:
    for member in RematConfig:
      for value in (RematConfig.numbers().get(member, member), member.name, member.name.lower(), member):
        assert dataclasses.replace(self.config, remat_config=value).remat_config is member

  @pytest.mark.parametrize(
    "field", ["attn_implementation", "remat_config", "rope_scaling", "scan_layers", "shd_config"]
  )
  def test_fields_of_another_kind_are_refused(self, field: str) -> None:
    if not hasattr(self.config, field):
      pytest.skip("the configuration has no such field")
    for value in (7.5, "full", {"factor": 2.0}, 1 if field == "scan_layers" else True):
      with pytest.raises(ConfigError, match=f"{field} is .*, expected"):
        dataclasses.replace(self.config, **{field: value})

  # Cache, padding, packing

  @pytest.mark.parametrize("factor", [1, 2, 8])
  def test_prefill_and_decode_equal_one_pass_whatever_the_cache_size(
    self, model: Any, expected: np.ndarray, factor: int
  ) -> None:
    cache = model.init_cache(B, T * factor)
    split = T - 3
    parts = []
    for start, stop in [(0, split), *((t, t + 1) for t in range(split, T))]:
      logits, cache = _call(model, TOKENS[:, start:stop], POSITIONS[:, start:stop], cache)
      parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), expected)
    np.testing.assert_array_equal(cache["layer_0"]["end_index"], [T] * B)

  def test_left_padding_and_chunked_prefill_change_nothing(self, model: Any, expected: np.ndarray) -> None:
    # The first chunk is only padding. All chunks have one size, so that all run one compiled program.
    pad, chunk = 5, 4
    tokens = np.pad(TOKENS, ((0, 0), (pad, 0)))
    positions = np.pad(POSITIONS, ((0, 0), (pad, 0)), constant_values=-1)
    total = T + pad
    causal = np.tril(np.ones((total, total), bool)) & (np.arange(total) >= pad)
    for mask in (None, np.broadcast_to(causal, (B, total, total))):
      cache, parts = model.init_cache(B, total + 2), []
      for start in range(0, total, chunk):
        stop = start + chunk
        part = None if mask is None else mask[:, start:stop]
        logits, cache = _call(model, tokens[:, start:stop], positions[:, start:stop], cache, part)
        parts.append(logits)
      assert_close(np.concatenate(parts, axis=1)[:, pad:], expected)

  def test_right_padding_changes_nothing(self, model: Any, expected: np.ndarray) -> None:
    real = T - 3
    tokens, positions = (np.pad(a[:, :real], ((0, 0), (0, T - real))) for a in (TOKENS, POSITIONS))
    assert_close(_call(model, tokens, positions)[0][:, :real], expected[:, :real])

  def test_rings_change_nothing(self, model: Any, sharded: Any, expected: np.ndarray) -> None:
    """Chunks longer and shorter than a window; padding left, right and between; with and without a mask."""
    if not any(model.windows()):
      assert model.init_cache(B, T, ring=True).keys() == model.init_cache(B, T).keys()
      return
    layout = np.array([[-1, 0, 1, 2, 3, 4, -1, -1, 5, 6], [0, 1, -1, 2, 3, -1, 4, 5, 6, -1]], np.int32)
    real = layout >= 0
    tokens = np.where(real, np.take_along_axis(TOKENS, np.maximum(layout, 0), axis=1), 0)
    total = layout.shape[1]
    causal = np.tril(np.ones((total, total), bool)) & real[:, None, :]
    long, single = (0, 6), [(t, t + 1) for t in range(6, total)]
    for tested, mask, chunks in (
      (model, causal, [long, (6, 8), *single[2:]]),
      (sharded, None, [long, *single]),
    ):
      cache, parts = tested.init_cache(B, total + 20, ring=True), []
      for start, stop in chunks:
        part = None if mask is None else mask[:, start:stop]
        logits, cache = _call(tested, tokens[:, start:stop], layout[:, start:stop], cache, part)
        parts.append(logits)
      sizes = [layer["k"].shape[-1] for layer in cache.values()]
      assert sizes == [min(window or total + 20, total + 20) for window in tested.windows()]
      for row in range(B):
        assert_close(np.concatenate(parts, axis=1)[row, real[row]], expected[row])

  def test_segments_equal_separate_sequences(self, model: Any, sharded: Any, expected: np.ndarray) -> None:
    tokens, positions = TOKENS.reshape(1, -1), POSITIONS.reshape(1, -1)
    segment_ids = np.repeat(np.arange(1, B + 1, dtype=np.int32), T)[None]
    for packed in (model, sharded):
      logits, _ = _call(packed, tokens, positions, None, None, segment_ids)
      assert_close(np.asarray(logits).reshape(expected.shape), expected)

  def test_calls_promote_neither_ranks_nor_dtypes(self, model: Any) -> None:
    mask = np.tril(np.ones((1, T, T), bool)).tolist()
    ids = np.ones((B, T), np.int32).tolist()
    calls: list[Callable[[Any], Any]] = [
      lambda tokens: model(tokens, None, model.init_cache(B, T)),
      lambda tokens: model(tokens, None, model.init_cache(B, T, ring=True)),
      lambda tokens: model(tokens, POSITIONS.tolist(), None, mask)[0],
      lambda tokens: model(tokens, segment_ids=ids, decode_only_last_token=True)[0],
      lambda tokens: ScoreModel(model, rngs=nnx.Rngs(0))(tokens)[0],
      lambda tokens: jax.grad(lambda x: jnp.mean(model(None, inputs_embeds=x)[0]))(model.embed(tokens)),
    ]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
      for call in calls:
        jax.eval_shape(call, TOKENS)

  def test_the_vocabulary_changes_with_the_configuration(self, mesh: Mesh) -> None:
    model = self.make(self.config, mesh)
    size = model.num_embed
    resize_vocabulary(model, size + 3)
    field = field_of(self.config, VOCABULARY_FIELDS)
    assert field is not None
    assert model.config == dataclasses.replace(self.config, **{field: size + 3})
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert {".".join(map(str, p)): v.get_value().shape for p, v in state} == self.shapes(model.config)
    resize_vocabulary(model, size)
    again = nnx.to_flat_state(nnx.state(self.make(self.config, mesh), nnx.Param))
    for (_, ours), (_, theirs) in zip(nnx.to_flat_state(nnx.state(model, nnx.Param)), again, strict=True):
      np.testing.assert_array_equal(ours.get_value(), theirs.get_value())
      assert ours.get_value().sharding == theirs.get_value().sharding

  def test_writing_past_the_cache_is_an_error(self, model: Any) -> None:
    # Two chunks of one size, which run one compiled program; the last token of the second has no slot.
    chunk = T // 2 + 1
    _, cache = _call(model, TOKENS[:, :chunk], POSITIONS[:, :chunk], model.init_cache(B, 2 * chunk - 1))
    rest = TOKENS[:, :chunk], POSITIONS[:, :chunk] + chunk
    with pytest.raises(ValueError, match="cache_size"):
      model(*rest, cache)
    logits, _ = _call(model, *rest, cache)
    assert np.isfinite(logits[:, :-1]).all()
    assert np.isnan(logits[:, -1]).all()

  def test_the_head_can_be_skipped_and_computed_later(
    self, model: Any, sharded: Any, expected: np.ndarray
  ) -> None:
    for tested in (model, sharded):
      hidden, kept, logits = _call_in_parts(tested, TOKENS, POSITIONS)
      np.testing.assert_array_equal(kept, hidden)
      assert_close(logits, expected[:, -1:])

  # Score heads

  def test_scores_are_products_of_the_hidden_states(self, model: Any, sharded: Any) -> None:
    for tested in (model, sharded):
      scored = ScoreModel(tested, rngs=nnx.Rngs(0))
      hidden = np.asarray(_call_in_parts(tested, TOKENS, POSITIONS)[0])
      expected = hidden @ np.asarray(scored.score.w[...]).T
      assert_close(_scores(scored, TOKENS, POSITIONS), expected)
      assert_close(_scores(nnx.merge(*nnx.split(scored)), TOKENS, POSITIONS), expected)
      assert scored.score.w[...].sharding.device_set == tested.final_norm.w[...].sharding.device_set

  def test_score_models_are_saved_and_loaded(self, sharded: Any, mesh: Mesh, tmp_path: pathlib.Path) -> None:
    scored = ScoreModel(sharded, rngs=nnx.Rngs(0), num_scores=3)
    family = score_family(self.family, num_scores=3)
    save_model_to_safetensors(
      nnx.state(scored, nnx.Param), tmp_path / "scored", family=family, config=self.config
    )
    checkpoint = read_safetensors(LocalFiles(str(tmp_path / "scored")))
    assert checkpoint.tensors["score.weight"].shape == (3, self.config.embed_dim)
    raw = json.loads((tmp_path / "scored" / "config.json").read_text())
    assert raw["num_labels"] == 3
    config = family.read_config(raw)
    loaded = load(plan_load(checkpoint, abstract_model(family.model_class, config, mesh), family.huggingface))
    ours, theirs = (nnx.to_flat_state(nnx.state(m)) for m in (scored, loaded))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, variable), (_, again) in zip(ours, theirs, strict=True):
      np.testing.assert_array_equal(variable.get_value(), again.get_value())

  # Stacked layers

  @pytest.fixture(scope="class", params=[None, "explicit"], ids=str)
  @classmethod
  def pair(cls, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model whose layers are a list, and the same with stacked layers, on one device and on an Explicit mesh."""
    if not hasattr(cls.config, "scan_layers"):
      pytest.skip("the configuration has no field scan_layers")
    mesh = None if request.param is None else MESHES[request.param]()
    config = dataclasses.replace(cls.config, **cls.deep)
    return cls.make(config, mesh), cls.make(dataclasses.replace(config, scan_layers=True), mesh)

  def test_stacked_layers_give_the_same_logits_and_caches(self, pair: tuple[Any, Any]) -> None:
    unrolled, scanned = pair
    assert any(layers_of(name) for name in scanned.layers), "`deep` must have layers that repeat"
    theirs, ours = (model.init_cache(B, T, ring=True) for model in pair)
    for start, stop in ((0, T - 1), (T - 1, T)):
      part = np.s_[:, start:stop]
      expected, theirs = _call(unrolled, TOKENS[part], POSITIONS[part], theirs)
      logits, ours = _call(scanned, TOKENS[part], POSITIONS[part], ours)
      assert_close(logits, expected, SCANNED)
    assert bool(jax.tree.structure(ours) == jax.tree.structure(theirs))  # type: ignore[operator]
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      assert_close(one, other, SCANNED)
      assert one.sharding == other.sharding

  def test_stacked_layers_have_the_same_gradients(self, pair: tuple[Any, Any]) -> None:
    grads = [nnx.state(_gradients(model, TOKENS, POSITIONS)) for model in pair]
    # Slices of NumPy's arrays compile nothing.
    expected, stacked = (
      {dotted(path): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}
      for state in grads
    )
    shapes, get = by_layer(stacked, stacked.__getitem__)
    assert list(shapes) == list(expected)
    largest = max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
      assert np.abs(get(name) - array).max() <= SCANNED * largest, name

  def test_stacked_layers_are_the_same_files_and_have_the_same_digest(
    self, pair: tuple[Any, Any], tmp_path: pathlib.Path
  ) -> None:
    unrolled, scanned = pair
    assert digest(scanned) == digest(unrolled)
    for model, name in ((unrolled, "unrolled"), (scanned, "scanned")):
      state = nnx.state(model, nnx.Param)
      save_model_to_safetensors(state, tmp_path / name, "9KB", family=self.family, config=model.config)
    written, again = (
      {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
      for name in ("unrolled", "scanned")
    )
    assert again == written
    mesh = find_mesh(scanned.embedder.input_embedding.get_value())
    abstract = abstract_model(
      self.family.model_class, scanned.config, mesh if isinstance(mesh, Mesh) else None
    )
    files = read_safetensors(LocalFiles(str(tmp_path / "unrolled")))
    loaded = load(plan_load(files, abstract, self.family.huggingface))
    assert digest(loaded) == digest(unrolled)
    for (_, ours), (_, theirs) in zip(
      *(nnx.to_flat_state(nnx.state(m)) for m in (scanned, loaded)), strict=True
    ):
      np.testing.assert_array_equal(ours.get_value(), theirs.get_value())
      assert ours.get_value().sharding == theirs.get_value().sharding

  # Meshes

  @pytest.mark.parametrize("inside", [False, True], ids=["outside set_mesh", "inside set_mesh"])
  def test_sharded_equals_unsharded(
    self, sharded: Any, mesh: Mesh, expected: np.ndarray, inside: bool
  ) -> None:
    call = functools.partial(_call, sharded, TOKENS, POSITIONS)
    if inside:
      with jax.set_mesh(mesh):
        logits, cache = call(sharded.init_cache(B, T))
    else:
      logits, cache = call(sharded.init_cache(B, T))
    assert_close(logits, expected)
    assert cache["layer_0"]["k"].sharding.device_set == set(mesh.devices.flat)

  def test_eager_equals_jitted(self, sharded: Any, expected: np.ndarray) -> None:
    assert_close(sharded(TOKENS, POSITIONS)[0], expected)

  def test_dummy_values_are_the_same_on_every_mesh(self, mesh: Mesh) -> None:
    models = (create_dummy_model(self.family.model_class, self.config, where) for where in (None, mesh))
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in models), strict=True):
      np.testing.assert_array_equal(ours, theirs)

  @pytest.fixture(scope="class")
  @classmethod
  def losses(cls) -> list[float]:
    """Losses of three steps on one device."""
    return _train(cls.make(cls.config))

  def test_gradient_steps_with_donated_state(self, losses: list[float], mesh: Mesh) -> None:
    assert losses[2] < losses[0]
    np.testing.assert_allclose(_train(self.make(self.config, mesh)), losses, rtol=1e-4)

  # Compiled programs

  @classmethod
  def compiled(cls, run: Callable[..., Any], mesh: Mesh | None, *, sampling: bool = False) -> Compiled:
    """Compiles `run(fill, parameters, tokens)`, where `fill(parameters)` is a model of `even` sizes.

    Args:
      run: one of `_generate`, `_forward` and `_gradient`.
      mesh: 2 x 2 devices, or None.
      sampling: whether weights are sharded for sampling, over tp alone.
    """
    own = {field.name for field in dataclasses.fields(cls.config)}
    even = {
      name: size for name, size in cls.even.items() if name in own and (getattr(cls.config, name) or 0) > 1
    }
    sharding = ShardingConfig.get_default_sharding(is_sampling=sampling)
    sharding = dataclasses.replace(sharding, act_btv=("fsdp", None, "tp"))
    config = dataclasses.replace(cls.config, shd_config=sharding, **even)
    abstract = abstract_model(cls.family.model_class, config, mesh)
    struct = jax.ShapeDtypeStruct
    parameters = {n: struct(p.shape, p.dtype, sharding=p.sharding) for n, p in abstract.parameters.items()}
    rows = None if mesh is None else NamedSharding(mesh, PartitionSpec("fsdp"))
    tokens = struct((B, T), jnp.int32, sharding=rows)
    lowered = jax.jit(functools.partial(run, abstract.fill)).lower(parameters, tokens)
    program = Program(lowered.compile(_COMPILER_OPTIONS).as_text() or "")
    weights = frozenset(n for n, p in parameters.items() if len(p.shape) > 1)
    assert weights <= program.arguments
    return Compiled(program, weights, config, parameters["embedder.input_embedding"].shape[0])

  @pytest.mark.parametrize("kind", [None, *sorted(MESHES)], ids=str)
  def test_prefill_and_decode_copy_and_send_no_weight(self, kind: str | None) -> None:
    mesh = None if kind is None else MESHES[kind]()
    compiled = self.compiled(_generate, mesh, sampling=True)
    copies = [use.instruction.line for use in compiled.program.copies if use.arguments & compiled.weights]
    assert not copies, "these instructions copy weights:\n" + "\n".join(copies)
    assert not compiled.sent()
    # The reductions of the prefill and of the step, and nothing else.
    assert compiled.activations_sent() <= 2 * (2 * compiled.config.num_layers + 1)

  def test_a_pass_gathers_each_weight_once_reduces_twice_a_layer_and_sends_no_logits(
    self, mesh: Mesh
  ) -> None:
    compiled = self.compiled(_forward, mesh)
    assert set(compiled.sent().values()) == {1}
    # Attention and feed-forward block of each layer, and the embedding.
    assert 0 < len(compiled.reductions()) <= 2 * compiled.config.num_layers + 1
    assert not compiled.logits_sent()

  def test_a_gradient_gathers_each_weight_at_most_twice_and_sends_no_logits(self, mesh: Mesh) -> None:
    compiled = self.compiled(_gradient, mesh)
    assert 0 < max(compiled.sent().values()) <= 2
    assert not compiled.logits_sent()

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  def test_half_precision_is_kept_and_logits_stay_close(self, expected: np.ndarray, dtype: str) -> None:
    model = self.make(self.config, dtype=dtype)
    logits, cache = _call(model, TOKENS, POSITIONS, model.init_cache(B, T))
    assert logits.dtype == jnp.float32
    assert cache["layer_0"]["k"].dtype == jnp.dtype(dtype)
    # Rounding the activations makes an error of the same order as rounding the weights, which `rounded` shows.
    graphdef, state = nnx.split(model)
    wide = nnx.merge(graphdef, jax.tree.map(lambda array: array.astype(jnp.float32), state))
    rounded = np.asarray(_call(wide, TOKENS, POSITIONS)[0])
    assert np.abs(logits - rounded).mean() < 3 * np.abs(rounded - expected).mean()
