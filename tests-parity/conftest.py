"""Tiny random checkpoints that transformers wrote, read by both sides on every kind of mesh.

`checkpoint(variant)` is a directory that both sides read, `placement` a mesh and a way of calling, and
`assert_parity` compares logits. The table of the largest errors ends the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx
from jax.sharding import Mesh

from models_automodel import AutoModel

jax.config.update("jax_num_cpu_devices", 8)

# Of a float32 result, relative to the largest number in the reference.
TOLERANCE = 2e-5

# Nothing is at its default and nothing is equal by chance: head_dim x heads != hidden, and no axis that is
# sharded over tp=4 divides, apart from the feed-forward block's.
LLAMA = {
  "vocab_size": 101,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "rms_norm_eps": 1e-2,
  "rope_parameters": {"rope_type": "default", "rope_theta": 321.5},
  "max_position_embeddings": 512,
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "eos_token_id": None,
}


def _llama3_scaling(factor: float) -> dict:
  return {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  }


# variant -> (architecture, base of the configuration, what differs from it).
VARIANTS = {
  "untied": ("Llama", LLAMA, {}),
  "tied": ("Llama", LLAMA, {"tie_word_embeddings": True}),
  "divisible": ("Llama", LLAMA, {"vocab_size": 104, "num_attention_heads": 8, "num_key_value_heads": 4}),
  "divisible-tied": (
    "Llama",
    LLAMA,
    {"vocab_size": 104, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
  ),
  "mha": ("Llama", LLAMA, {"num_key_value_heads": 6}),
  "mqa": ("Llama", LLAMA, {"num_key_value_heads": 1}),
  "llama3-8": ("Llama", LLAMA, {"rope_parameters": _llama3_scaling(8.0)}),
  "llama3-32": ("Llama", LLAMA, {"rope_parameters": _llama3_scaling(32.0), "tie_word_embeddings": True}),
  "linear": (
    "Llama",
    LLAMA,
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 777.0, "factor": 2.5}},
  ),
  "theta-small": ("Llama", LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 9.5}}),
  "theta-large": ("Llama", LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 3.3e6}}),
  "eps": ("Llama", LLAMA, {"rms_norm_eps": 3e-1}),
  "biases": ("Llama", LLAMA, {"attention_bias": True, "mlp_bias": True}),
}


def load(path: pathlib.Path, mesh: Mesh | None = None, **kwargs) -> nnx.Module:
  """The model under test."""
  model, _ = AutoModel.from_pretrained(str(path), mesh, progress=False, **kwargs)
  return model


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
  """Weights that keep activations at O(1) and make attention pick; norms and biases are random, too."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim == 1 and name.endswith("bias"):
        weight.normal_(0, 0.5, generator=generator)
      elif weight.ndim == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
      elif "embed_tokens" in name:
        weight.normal_(0, 0.3, generator=generator)
      else:
        gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        weight.normal_(0, gain * weight.shape[1] ** -0.5, generator=generator)


def make_reference(variant: str, seed: int = 0, **changes) -> torch.nn.Module:
  """A random model of transformers, in float32."""
  architecture, base, fields = VARIANTS[variant]
  config = getattr(transformers, f"{architecture}Config")(**base | fields | changes)
  model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
  randomize(model, seed)
  return model


def reference_logits(model: torch.nn.Module, tokens, mask=None, positions=None) -> np.ndarray:
  """transformers' logits [B, T, V] in float32. The mask is of padding, [B, T]."""
  as_long = functools.partial(torch.tensor, dtype=torch.long)
  mask, positions = (None if array is None else as_long(np.asarray(array)) for array in (mask, positions))
  with torch.no_grad():
    out = model(as_long(tokens), attention_mask=mask, position_ids=positions, use_cache=False)
  return out.logits.float().numpy()


@functools.cache
def _mesh(kind: str) -> Mesh | None:
  devices = np.array(jax.devices()).reshape(2, 4)
  makers = {
    "one": lambda: None,
    "explicit": lambda: jax.make_mesh(devices.shape, ("fsdp", "tp")),
    "auto": lambda: Mesh(devices, ("fsdp", "tp")),
  }
  return makers[kind]()


@functools.cache
def _loaded(path: pathlib.Path, mesh: str, dtype: str | None) -> nnx.Module:
  return load(path, _mesh(mesh), dtype=dtype)


@functools.cache
def _reference(path: pathlib.Path, dtype: str) -> torch.nn.Module:
  return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A directory that both sides read. Models are shared between tests: change none."""

  path: pathlib.Path

  def model(self, placement: Placement, dtype: str | None = "float32") -> nnx.Module:
    """Ours."""
    return _loaded(self.path, placement.kind, dtype)

  def reference(self, dtype: str = "float32") -> torch.nn.Module:
    """Theirs."""
    return _reference(self.path, dtype)

  def fresh_model(self, placement: Placement) -> nnx.Module:
    """Ours in float32, to be changed."""
    return load(self.path, placement.mesh, dtype="float32")

  def fresh_reference(self) -> torch.nn.Module:
    """Theirs in float32, to be changed."""
    return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

  def logits(self, tokens, mask=None, positions=None, dtype: str = "float32") -> np.ndarray:
    """Theirs [B, T, V], from the file's numbers in float32 unless another dtype is given."""
    return reference_logits(self.reference(dtype), tokens, mask, positions)

  def greedy(self, prompt, new: int) -> np.ndarray:
    """The `new` tokens [B, new] that transformers' own `generate` continues with."""
    prompt = torch.tensor(prompt, dtype=torch.long)
    out = self.reference().generate(
      prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new, pad_token_id=0
    )
    return out[:, prompt.shape[1] :].numpy()


_compiled_call = nnx.jit(lambda model, args, kwargs: model(*args, **kwargs))


@dataclasses.dataclass(frozen=True)
class Placement:
  """A kind of mesh, and how the model is called on it."""

  kind: str
  compiled: bool
  inside: bool = False

  @property
  def mesh(self) -> Mesh | None:
    """None is one device."""
    return _mesh(self.kind)

  def context(self):
    """`jax.set_mesh`, or nothing."""
    return jax.set_mesh(self.mesh) if self.inside else contextlib.nullcontext()

  def call(self, model: nnx.Module, *args, **kwargs):
    """`model(*args, **kwargs)`: logits and cache."""
    with self.context():
      return _compiled_call(model, args, kwargs) if self.compiled else model(*args, **kwargs)

  def logits(self, model: nnx.Module, tokens, positions=None, **kwargs) -> np.ndarray:
    """float32 [B, T, V] without a cache; positions count from 0 unless given."""
    positions = count(tokens) if positions is None else positions
    return np.asarray(self.call(model, tokens, positions, **kwargs)[0])

  def greedy(self, model: nnx.Module, prompt, new: int) -> np.ndarray:
    """The `new` tokens [B, new] that follow, by prefill and steps of one token."""
    B, T = np.shape(prompt)
    cache = model.init_cache(B, T + new)
    logits, cache = self.call(model, prompt, count(prompt), cache)
    out = [np.argmax(np.asarray(logits)[:, -1], -1).astype(np.int32)]
    for position in range(T, T + new - 1):
      logits, cache = self.call(model, out[-1][:, None], np.full((B, 1), position, np.int32), cache)
      out.append(np.argmax(np.asarray(logits)[:, -1], -1).astype(np.int32))
    return np.stack(out, 1)

  def greedy_without_cache(self, model: nnx.Module, prompt, length: int) -> np.ndarray:
    """The tokens [B, length - T] that follow, each from a pass over all slots, of which the last are not seen."""
    T, tokens = np.shape(prompt)[1], np.zeros((len(prompt), length), np.int32)
    tokens[:, :T] = prompt
    for t in range(T, length):
      tokens[:, t] = np.argmax(self.logits(model, tokens)[:, t - 1], -1)
    return tokens[:, T:]


def count(tokens) -> np.ndarray:
  """Positions [B, T] of rows without padding."""
  return np.broadcast_to(np.arange(np.shape(tokens)[1], dtype=np.int32), np.shape(tokens))


PLACEMENTS = {
  "one-eager": Placement("one", compiled=False),
  "one-jit": Placement("one", compiled=True),
  "explicit-eager": Placement("explicit", compiled=False),
  "explicit-jit": Placement("explicit", compiled=True),
  "auto-eager": Placement("auto", compiled=False),
  "auto-jit": Placement("auto", compiled=True),
  "explicit-eager-inside": Placement("explicit", compiled=False, inside=True),
  "explicit-jit-inside": Placement("explicit", compiled=True, inside=True),
  "auto-eager-inside": Placement("auto", compiled=False, inside=True),
  "auto-jit-inside": Placement("auto", compiled=True, inside=True),
}


@pytest.fixture(params=VARIANTS, scope="session")
def variant(request) -> str:
  """Each variant in turn."""
  return request.param


@pytest.fixture(params=PLACEMENTS, scope="session")
def placement(request) -> Placement:
  """Each placement in turn."""
  return PLACEMENTS[request.param]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
  """`checkpoint(variant, seed=0, dtype="float32", **arguments of save_pretrained)`: written once."""

  @functools.cache
  def write(variant: str, seed: int = 0, dtype: str = "float32", **save_arguments) -> Checkpoint:
    path = tmp_path_factory.mktemp(variant)
    make_reference(variant, seed).to(getattr(torch, dtype)).save_pretrained(path, **save_arguments)
    return Checkpoint(path)

  return write


@pytest.fixture
def edit(checkpoint, tmp_path):
  """`edit(variant, config=..., tensors=...)`: a copy whose config.json and tensors went through functions."""

  def write(variant: str, config=lambda raw: raw, tensors=lambda state: state) -> Checkpoint:
    source, target = checkpoint(variant).path, tmp_path / "edited"
    target.mkdir()
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config(raw)))
    state = safetensors.torch.load_file(source / "model.safetensors")
    safetensors.torch.save_file(tensors(state), target / "model.safetensors", {"format": "pt"})
    return Checkpoint(target)

  return write


@pytest.fixture
def checkpoint_of(tmp_path):
  """`checkpoint_of(raw, unreadable=())`: a random model of a config.json, which the reference reads without some keys."""

  def write(raw: dict, unreadable: tuple[str, ...] = ()) -> Checkpoint:
    file, readable = tmp_path / "config.json", {k: v for k, v in raw.items() if k not in unreadable}
    file.write_text(json.dumps(readable))
    config = transformers.AutoConfig.from_pretrained(tmp_path, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    file.write_text(json.dumps(raw))
    return _WithReference(tmp_path, model)

  return write


@dataclasses.dataclass(frozen=True)
class _WithReference(Checkpoint):
  model_in_memory: torch.nn.Module

  def reference(self, dtype: str = "float32") -> torch.nn.Module:
    """Theirs, as it was saved."""
    return self.model_in_memory


@pytest.fixture(scope="session")
def open_checkpoint():
  """`open_checkpoint(directory)`: one that a test wrote itself."""
  return Checkpoint


@pytest.fixture(scope="session")
def random_reference():
  """`random_reference(variant, seed=0, **changes)`: a model of transformers with a changed configuration."""
  return make_reference


@pytest.fixture(scope="module")
def optimized():
  """Compiles as users do: where the numbers of optimised code are the point, or its speed is needed."""
  former = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", former)


@pytest.fixture
def tokens() -> np.ndarray:
  """int32 [4, 40] below every variant's vocabulary."""
  return np.random.default_rng(1).integers(0, 101, (4, 40), dtype=np.int32)


@pytest.fixture
def many_tokens() -> np.ndarray:
  """int32 [32, 40] below every variant's vocabulary: for statistics of sequences."""
  return np.random.default_rng(2).integers(0, 101, (32, 40), dtype=np.int32)


@pytest.fixture
def assert_no_larger_error():
  """`assert_no_larger_error(ours, theirs)`: errors [models, B, T, V] against the truth, on average and at their worst.

  Their worst is the largest of each sequence, averaged: that of a single sequence is one number of thousands, and chance.
  """

  def check(ours, theirs) -> None:
    for name, statistic in (("mean", np.mean), ("largest of a sequence", lambda e: np.max(e, (2, 3)).mean())):
      ratio = statistic(np.asarray(ours)) / statistic(np.asarray(theirs))
      print(f"{name}: {ratio:.2f} of theirs")
      assert ratio <= 1, f"the {name} of our errors is {ratio:.2f} of theirs"

  return check


_ERRORS = pytest.StashKey[dict]()


def pytest_configure(config):
  config.stash[_ERRORS] = {}


@pytest.fixture
def assert_parity(request):
  """`assert_parity(ours, theirs)`: the error is at most TOLERANCE of the largest number of theirs."""

  def check(ours, theirs, tolerance: float = TOLERANCE, what: str = "") -> None:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    errors, name = request.config.stash[_ERRORS], request.node.originalname + (f" {what}" if what else "")
    if (spec := getattr(request.node, "callspec", None)) and "variant" in spec.params:
      name += f" {spec.params['variant']}"
    errors[name] = max(errors.get(name, 0.0), error)
    assert error <= tolerance, f"{what} differs by {error:.2e} of its largest number"

  return check


def pytest_terminal_summary(terminalreporter, config):
  if errors := config.stash[_ERRORS]:
    terminalreporter.section("largest errors, relative to the reference's largest number")
    for name, error in errors.items():
      terminalreporter.write_line(f"{error:.1e}  {name}")
