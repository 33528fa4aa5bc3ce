"""Experts on TPU v5e: what is multiplied, what is sent between devices, and what memory it takes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from models_core.layers import Experts, explicit_axes
from models_core.sharding import ShardingConfig

B, T, D, E, F, N = 8, 256, 512, 32, 256, 4
ROWS = B * T * N
# Of three products of all rows in the forward pass, six in the backward pass.
FLOPS = 9 * 2 * ROWS * D * F


def compiled(spec, shardings, mesh=None):
  """The gradient of a sum of squares: by x, the experts' weights and the three stacks."""
  e, d, f = spec
  config = ShardingConfig.get_default_sharding()
  config = dataclasses.replace(
    config, act_btd=("fsdp", None, None), exp_weight_edf=spec, exp_weight_efd=(e, f, d)
  )
  with nnx.use_eager_sharding(False):
    module = nnx.eval_shape(lambda: Experts(E, D, F, jax.nn.silu, config, rngs=nnx.Rngs(0)))

  def run(x, weights, gate, up, down, experts):
    copy = nnx.clone(module)
    for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
      getattr(copy, name).set_value(value)
    return copy(x, experts, weights)

  def loss(*arrays):
    call = run
    if axes := explicit_axes(mesh):
      call = jax.sharding.auto_axes(run, axes=axes, out_sharding=shardings[0])
    return jnp.sum(call(*arrays).astype(jnp.float32) ** 2)

  half, tokens, stack = jnp.bfloat16, (B, T), ((E, F, D), (E, F, D), (E, D, F))
  shapes = [((*tokens, D), half), ((*tokens, N), jnp.float32), *((s, half) for s in stack)]
  shapes.append(((*tokens, N), jnp.int32))
  args = [jax.ShapeDtypeStruct(*s, sharding=at) for s, at in zip(shapes, shardings, strict=True)]
  gradient = jax.grad(loss, tuple(range(5)))
  # An Auto mesh is in context while a model is called.
  context = (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh is not None else nnx.use_eager_sharding(False)
  )
  with context:
    return jax.jit(gradient, out_shardings=tuple(shardings[:5])).lower(*args).compile()


def test_no_product_is_of_all_rows_with_all_experts(devices):
  program = compiled((None, None, None), [SingleDeviceSharding(devices[0])] * 6)
  # Loops over blocks count once; with all experts the account is 32 times as high.
  assert program.cost_analysis()["flops"] < 1.1 * FLOPS
  # In bfloat16: x and its gradient for each row, and what lies between the products. For all experts, 32 times one.
  assert program.memory_analysis().temp_size_in_bytes < 8 * ROWS * D * 2


@pytest.mark.parametrize(("kind", "shape"), [("Auto", (4,)), ("Explicit", (2, 2))])
def test_rows_are_sent_to_their_experts_and_tokens_are_not_gathered(devices, kind, shape):
  names = ("fsdp", "tp")[: len(shape)]
  mesh = Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType[kind],) * len(shape))
  f = "tp" if len(shape) > 1 else None
  specs = [("fsdp",), ("fsdp",), ("fsdp", f), ("fsdp", f), ("fsdp", None, f), ("fsdp",)]
  text = compiled(("fsdp", None, f), [NamedSharding(mesh, PartitionSpec(*s)) for s in specs], mesh).as_text()
  # There and back, in both passes.
  assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) == 4
  gathered = re.findall(r"= \(?(\w+)\[[\d,]*\]\S* all-gather(?:-start)?\(", text)
  assert set(gathered) == {"s32"}  # counts of rows
