"""Who is trained and sampled with: tiny models of every family, in every placement, and tunix's own for comparison.

A case is what a user does with a client, such as LoRA with tunix's trainer; a cell is a case for one subject. The
decorators `every_cell` and `some_cells` run a test for subjects, of which the test makes models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from jax.sharding import Mesh
from tunix.models.llama3 import model as tunix_llama3
from tunix.sft import utils

from models_core.dummy_model_creator import create_dummy_model
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3.model import Llama3
from models_llama.llama3.model import ModelConfig as Llama3Config
from models_qwen.qwen3.model import ModelConfig as Qwen3Config
from models_qwen.qwen3.model import Qwen3

from .their_faults import FAULTS

# Sizes that a mesh of 2 x 2 devices divides, and more query heads than KV heads.
V = 64
TINY = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_hidden_dim": 16}
# One layer with a sliding window shorter than the sequences, and one without.
TYPES = Gemma3Config.gemma3_270m().attention_types[4:6]

FAMILIES = {
  "llama3": (Llama3, dataclasses.replace(Llama3Config.llama3p1_8b(), **TINY, vocab_size=V)),
  "qwen3": (Qwen3, dataclasses.replace(Qwen3Config.qwen3_0p6b(), **TINY, vocab_size=V)),
  "qwen3_moe": (Qwen3, dataclasses.replace(Qwen3Config.qwen3_30b_a3b(), **TINY, **EXPERTS, vocab_size=V)),
  "gemma3": (
    Gemma3,
    dataclasses.replace(
      Gemma3Config.gemma3_270m(), **TINY, num_embed=V, sliding_window_size=4, attention_types=TYPES
    ),
  ),
}
# A model of tunix itself, which must fail wherever tunix is at fault.
THEIRS = "tunix"

AXES = ("fsdp", "tp")
# Placement -> the mesh of the model, and the context in which clients are called; tunix shards its batches over the
# mesh of `with mesh:`.
PLACEMENTS: dict[str, tuple[Callable[[], Mesh | None], Callable[[Mesh], Any]]] = {
  "one device": (lambda: None, lambda mesh: contextlib.nullcontext()),
  "Auto": (lambda: Mesh(np.array(jax.devices()).reshape(2, 2), AXES), lambda mesh: mesh),
  "Explicit": (lambda: jax.make_mesh((2, 2), AXES), lambda mesh: contextlib.nullcontext()),
  "Explicit, set_mesh": (lambda: jax.make_mesh((2, 2), AXES), jax.set_mesh),
}

# Modules of projections as users name them to qwix; all experts are one module.
PROJECTIONS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|experts)"

# B * T is the size of no axis of a weight: qwix tells weights from activations by their shapes, too.
B, T = 4, 6
TOKENS = np.random.default_rng(0).integers(3, V, (B, T)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A family in a placement, for one case."""

  case: str
  family: str
  placement: str

  @functools.cached_property
  def mesh(self) -> Mesh | None:
    """None is one device."""
    return PLACEMENTS[self.placement][0]()

  def context(self) -> contextlib.AbstractContextManager:
    """In which clients are called."""
    return PLACEMENTS[self.placement][1](self.mesh)

  def model(self, seed: int = 0, **fields: Any) -> nnx.Module:
    """A model with random weights, with some other fields of its configuration."""
    if self.family == THEIRS:
      return _their_model(self.mesh, seed, **fields)
    model_class, config = FAMILIES[self.family]
    config = dataclasses.replace(config, **fields)
    return create_dummy_model(model_class, config, self.mesh, random_seed=seed, scale=0.15)

  def __str__(self) -> str:
    return f"{self.family}-{re.sub('[^A-Za-z]+', '-', self.placement)}"


def _their_model(mesh: Mesh | None, seed: int, **fields: Any) -> nnx.Module:
  config = tunix_llama3.ModelConfig(
    **TINY | {"vocab_size": V, "rope_theta": 10_000, "norm_eps": 1e-5} | fields
  )
  model = tunix_llama3.Llama3(config, rngs=nnx.Rngs(seed))
  if mesh is not None:
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
  return model


class TheirFault(Exception):
  """An error that a client raises, as `FAULTS` expects it."""


def cells(case: str, *pairs: tuple[str, str]) -> Callable[[Callable], Callable]:
  """Runs a test for pairs of a family and a placement.

  Where a client is at fault, the test must raise its error, and some error with the client's own model.
  """
  at_fault = dict.fromkeys(placement for _, placement in pairs if (case, placement) in FAULTS)
  subjects = [Subject(case, *pair) for pair in (*pairs, *((THEIRS, placement) for placement in at_fault))]

  def parameter(subject: Subject) -> Any:
    fault = FAULTS.get((subject.case, subject.placement))
    marks = [pytest.mark.xfail(strict=True, raises=TheirFault, reason=fault.reason)] if fault else []
    return pytest.param(subject, id=str(subject), marks=marks)

  def decorate(test: Callable) -> Callable:
    @functools.wraps(test)
    def run(subject: Subject, **fixtures: Any) -> None:
      fault = FAULTS.get((subject.case, subject.placement))
      try:
        test(subject, **fixtures)
      except Exception as error:
        if fault and (subject.family == THEIRS or re.search(fault.message, str(error))):
          raise TheirFault(fault.reason) from error
        raise

    return pytest.mark.parametrize("subject", [parameter(subject) for subject in subjects])(run)

  return decorate


def every_cell(case: str) -> Callable[[Callable], Callable]:
  """Runs a test for every family in every placement."""
  return cells(case, *itertools.product(FAMILIES, PLACEMENTS))


def some_cells(case: str, *shifts: int) -> Callable[[Callable], Callable]:
  """Runs an expensive test for every family and every placement once for each shift, which decides who meets whom."""
  families, placements = list(FAMILIES), list(PLACEMENTS)
  size = len(families)
  return cells(
    case, *((families[(i + shift) % size], placements[i]) for shift in shifts for i in range(size))
  )


def with_lora(model: nnx.Module, **rule: Any) -> nnx.Module:
  """The model with LoRA factors at its projections, as qwix adds them."""
  provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=4, alpha=8.0, **rule)
  return qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))


def model_input(tokens: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """What tunix's trainers hand to the model for tokens [B, T] with a padding mask [B, T]."""
  return {
    "positions": utils.build_positions_from_mask(mask),
    "attention_mask": utils.make_causal_attn_mask(mask),
  }


@nnx.jit
def logits(model: nnx.Module, tokens: jax.Array) -> jax.Array:
  """Logits [B, T, V] of tokens [B, T] without padding, in one pass."""
  mask = jnp.ones(tokens.shape, bool)
  return model(tokens, cache=None, **model_input(tokens, mask))[0]


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """Values and shardings of a model's parameters at one time, by name.

  Attributes:
    values: copies of the values.
    shardings: where they lie.
    factors: names of the LoRA factors.
  """

  values: dict[str, np.ndarray]
  shardings: dict[str, jax.sharding.Sharding]
  factors: frozenset[str]

  @classmethod
  def of(cls, model: nnx.Module) -> Snapshot:
    """Takes one of a model."""
    variables = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    arrays = {name: variable.get_value() for name, variable in variables.items()}
    return cls(
      {name: np.array(array) for name, array in arrays.items()},
      {name: array.sharding for name, array in arrays.items()},
      frozenset(name for name, variable in variables.items() if isinstance(variable, nnx.LoRAParam)),
    )

  def changed(self, later: Snapshot) -> frozenset[str]:
    """Names of the parameters whose bits differ in a later snapshot, which must have the same parameters."""
    assert self.values.keys() == later.values.keys()
    return frozenset(
      name for name, value in self.values.items() if value.tobytes() != later.values[name].tobytes()
    )

  def assert_same_places(self, later: Snapshot) -> None:
    """Asserts that every parameter lies where it lay."""
    for name, sharding in self.shardings.items():
      moved, ndim = later.shardings[name], self.values[name].ndim
      assert sharding.is_equivalent_to(moved, ndim), f"{name} lies at {moved}, and lay at {sharding}"
    if len(next(iter(self.shardings.values())).device_set) > 1:
      assert not all(sharding.is_fully_replicated for sharding in self.shardings.values())


class Tokenizer:
  """Turns each character into a token, with the methods that tunix asks for."""

  characters = (string.ascii_letters + string.digits)[: V - 3]

  def encode(self, text: str, **kwargs: Any) -> list[int]:
    """Without a token for the beginning, which tunix's sampler adds."""
    return [self.characters.index(character) + 3 for character in text]

  def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
    """Leaves out the three tokens that are no characters."""
    return "".join(self.characters[i - 3] for i in ids if i >= 3)

  def pad_id(self) -> int:
    """Padding."""
    return 0

  def bos_id(self) -> int:
    """The beginning of a sequence."""
    return 1

  def eos_id(self) -> int:
    """Its end."""
    return 2
