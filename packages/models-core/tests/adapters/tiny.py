"""A family of nothing but parameters: one for each kind of layout that an adapter meets."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec as P

from models_core.dummy_model_creator import create_dummy_model
from models_core.family import Family
from models_core.layers import dotted, parameter
from models_core.testing import to_tensors
from models_core.weights import Form, Tied, WeightTable

BF16 = np.dtype(ml_dtypes.bfloat16)
RANK, ALPHA = 2, 3.0
E, V, D, N, H, F = 3, 12, 8, 4, 6, 10

L, M = "layers.{i}", "model.layers.{i}"
X = f"{M}.experts"
TABLE = WeightTable(
  ("embed.w", "model.embed.weight", "v d"),
  (f"{L}.norm.w", f"{M}.norm.weight", "d"),
  (f"{L}.q.w", f"{M}.attn.q.weight", "(n h) d"),
  (f"{L}.o.w", f"{M}.attn.o.weight", "d (n h)"),
  (
    f"{L}.experts.gate",
    [Form(f"{X}.{{e}}.gate.weight", "f d -> e f d"), Form(f"{X}.gate_up", "e (0/2 f) d -> e f d")],
  ),
  (
    f"{L}.experts.up",
    [Form(f"{X}.{{e}}.up.weight", "f d -> e f d"), Form(f"{X}.gate_up", "e (1/2 f) d -> e f d")],
  ),
  (f"{L}.experts.down", [Form(f"{X}.{{e}}.down.weight", "d f -> e d f"), Form(f"{X}.down", "e d f")]),
  tied=[Tied("head.weight", "model.embed.weight")],
)

# What follows a parameter's name -> axes of its factors and of itself, "e" being the experts and "r" the rank.
EQUATIONS = {
  "embed.w": ("dr", "rv", "vd"),
  "q.w": ("dr", "rn", "nd"),
  "o.w": ("nr", "rd", "dn"),
  "experts.gate": ("edr", "erf", "efd"),
  "experts.up": ("edr", "erf", "efd"),
  "experts.down": ("efr", "erd", "edf"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  num_layers: int = 2


class Leaves(nnx.Module):
  """Parameters by name, each with its shape and spec."""

  def __init__(self, rngs, init="normal", **shapes):
    for name, (shape, spec) in shapes.items():
      setattr(self, name, parameter(shape, spec, rngs=rngs, init=init))


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.norm = Leaves(rngs, init="ones", w=((D,), P()))
    self.q = Leaves(rngs, w=((N * H, D), P("tp", "fsdp")))
    self.o = Leaves(rngs, w=((D, N * H), P("fsdp", "tp")))
    self.experts = Leaves(
      rngs,
      gate=((E, F, D), P(None, "tp", "fsdp")),
      up=((E, F, D), P(None, "tp", "fsdp")),
      down=((E, D, F), P(None, "fsdp", "tp")),
    )


class Model(nnx.Module):
  def __init__(self, config, *, rngs):
    self.config = config
    self.embed = Leaves(rngs, w=((V, D), P("tp", "fsdp")))
    self.layers = nnx.List([Layer(rngs) for _ in range(config.num_layers)])


FAMILY = Family(
  name="tiny",
  model_types=("tiny",),
  model_class=Model,
  config_class=Config,
  read_config=lambda raw: Config(raw["num_layers"]),
  write_config=lambda config: {"model_type": "tiny", "num_layers": config.num_layers},
  weights={"huggingface": TABLE},
)
CONFIG = Config()


def plain(dtype="float32", mesh=None, seed=0):
  """A model without factors."""
  return create_dummy_model(Model, CONFIG, mesh, dtype=dtype, random_seed=seed, scale=0.3)


def parameters(model):
  """Variables by name, less those of adapters."""
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {dotted(path): v for path, v in flat if not isinstance(v, nnx.LoRAParam)}


def equation_of(name):
  """Of a parameter that can be adapted, else None."""
  return next((equation for end, equation in EQUATIONS.items() if name.endswith(end)), None)


def module_of(model, name):
  """The module that holds a parameter, and the parameter's name within."""
  *path, leaf = name.split(".")
  for part in path:
    model = model[int(part)] if part.isdigit() else getattr(model, part)
  return model, leaf


def adapted(dtype="float32", *, shared=False, factor_dtype=None, seed=0, names=None):
  """A model with factors beside its matrices, or those that are named.

  Args:
    dtype: of the parameters.
    shared: whether all experts have one second factor.
    factor_dtype: of the factors, where it is another one.
    seed: of the factors.
    names: of the parameters that are adapted; None adapts all but the embedding.
  """
  model, rng = plain(dtype), np.random.default_rng(seed)
  for name, variable in parameters(model).items():
    if (equation := equation_of(name)) is None or name not in (names or [name]):
      continue
    if names is None and name == "embed.w":
      continue
    a, b, w = equation
    sizes = dict(zip(w, variable.get_value().shape, strict=True)) | {"r": RANK}
    module, leaf = module_of(model, name)
    for side, axes in (("_lora_a", a), ("_lora_b", b.replace("e", "") if shared else b)):
      value = rng.normal(size=[sizes[axis] for axis in axes]) * 0.3
      setattr(module, leaf + side, nnx.LoRAParam(jnp.asarray(value, factor_dtype or dtype)))
  return model


def write(directory, model, *, fused=False, head=False, **files):
  """Writes a model as a checkpoint, and other files beside it. Returns its tensors."""
  tensors = to_tensors(model, TABLE)
  for layer in range(CONFIG.num_layers if fused else 0):
    module = f"model.layers.{layer}.experts"
    gate, up, down = (
      np.stack([tensors.pop(f"{module}.{e}.{part}.weight") for e in range(E)])
      for part in ("gate", "up", "down")
    )
    tensors |= {f"{module}.gate_up": np.concatenate([gate, up], axis=1), f"{module}.down": down}
  if head:
    tensors["head.weight"] = tensors["model.embed.weight"]
  directory.mkdir(exist_ok=True)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(FAMILY.write_config(CONFIG) | {"eos_token_id": 7}))
  for name, text in files.items():
    (directory / name.replace("__", ".")).write_text(text)
  return tensors
