import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.hlo import Program

# What compilers write: a tuple with comments, layouts with tiles, an argument of a loop, asynchronous instructions.
TEXT = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[4,6], param_1: f32[4]) -> f32[6,4] {
  %param_0 = f32[4,6]{1,0} parameter(0)
  %param_1 = f32[4]{0} parameter(1)
  ROOT %transpose.1 = f32[6,4]{1,0} transpose(%param_0), dimensions={1,0}
}

%product (param_0: f32[4,6], param_1: f32[6,4]) -> f32[4,6] {
  %param_0 = f32[4,6]{1,0} parameter(0)
  %param_1 = f32[6,4]{1,0} parameter(1)
  %dot.1 = f32[4,4]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %dot.2 = f32[4,6]{1,0} dot(%dot.1, %param_0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[4,6], /*index=2*/f32[8])) -> (s32[], f32[4,6], f32[8]) {
  %state = (s32[], f32[4,6]{1,0:T(8,128)}, /*index=2*/f32[8]{0:T(128)S(1)}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %weight = f32[4,6]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %rest = f32[8]{0} get-tuple-element(%state), index=2
  %copy.2 = f32[4,6]{0,1} copy(%weight), metadata={op_name="jit(f)/while/body"}
  ROOT %out = (s32[], f32[4,6]{1,0}, f32[8]{0}) tuple(%count, %weight, %rest)
}

%condition (state.1: (s32[], f32[4,6], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[4,6]{1,0}, f32[8]{0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main.1_spmd (param: f32[4,6], param.1: f32[8]) -> f32[6,8] {
  %param = f32[4,6]{1,0} parameter(0), sharding={devices=[2,1]<=[2]}, metadata={op_name="weights[\\'layers.0.w\\']"}
  %param.1 = f32[8]{0} parameter(1), metadata={op_name="x"}
  %zero = s32[] constant(0)
  %bitcast.1 = f32[24]{0} bitcast(%param)
  %copied = f32[6,4]{1,0} fusion(%bitcast.1, %param.1), kind=kLoop, calls=%fused
  %computed = f32[4,6]{1,0} fusion(%param, %copied), kind=kOutput, calls=%product
  %start = (f32[4,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%param), channel_id=1, dimensions={0}
  %done = f32[8,6]{1,0} all-gather-done(%start)
  %converted = bf16[8,6]{1,0} convert(%done)
  %sum = (f32[4,6]{1,0}, f32[]) all-reduce(%computed, %zero), channel_id=2, to_apply=%add
  %tuple.1 = (s32[], f32[4,6]{1,0}, /*index=2*/f32[8]{0}) tuple(%zero, %param, %param.1)
  %loop = (s32[], f32[4,6]{1,0}, f32[8]{0}) while(%tuple.1), condition=%condition, body=%body
  %after = f32[4,6]{1,0} get-tuple-element(%loop), index=1
  %reshaped = f32[2,12]{1,0} reshape(%after)
  ROOT %padded = f32[6,8]{1,0} pad(%after, %zero), padding=0_2x0_2
}
"""


def names(uses):
  return {use.instruction.name: set(use.arguments) for use in uses}


def test_arguments_are_followed_through_fusions_loops_and_collectives():
  program = Program(TEXT)
  assert program.arguments == {"layers.0.w", "x"}
  assert names(program.copies) == {
    "copied": {"layers.0.w"},
    "converted": {"layers.0.w"},
    "copy.2": {"layers.0.w"},
    "reshaped": {"layers.0.w"},
  }
  assert names(program.collectives) == {"start": {"layers.0.w"}, "sum": set()}
  assert [use.instruction.sizes for use in program.collectives] == [(24, 48), (24, 1)]
  assert [use.instruction.opcode for use in program.collectives] == ["all-gather-start", "all-reduce"]
  assert program.copies[0].instruction.line.startswith("%copied = f32[6,4]{1,0} fusion(")


X, W = jax.ShapeDtypeStruct((2, 12), jnp.float32), jax.ShapeDtypeStruct((12, 20), jnp.float32)


COPYING = {
  "product": (lambda w, x: x @ w["w"], False),
  "one row": (lambda w, x: x[:, :1] * w["w"][0], False),
  "transpose": (lambda w, x: (w["w"].T + 0, x), True),
  "heads": (
    lambda w, x: jnp.einsum("bd,dnh->bnh", x, jnp.moveaxis(w["w"].reshape(12, 4, 5), 1, 0).swapaxes(0, 1)),
    False,
  ),
  "cast": (lambda w, x: x @ w["w"].astype(jnp.float16).astype(jnp.float32), True),
  "loop": (lambda w, x: jax.lax.fori_loop(0, 3, lambda i, y: y @ w["w"] @ w["w"].T, x), False),
  "sine in a loop": (
    lambda w, x: jax.lax.fori_loop(0, 3, lambda i, y: y @ jnp.sin(w["w"]) @ w["w"].T, x),
    True,
  ),
  "branch": (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x @ jnp.exp(w), w["w"]), True),
}


@pytest.mark.parametrize("name", COPYING)
def test_copies_in_programs_of_this_compiler(name):
  function, copied = COPYING[name]
  program = Program(jax.jit(function).lower({"w": W}, X).compile().as_text())
  assert {name for use in program.copies for name in use.arguments} - {"x"} == ({"w"} if copied else set())


def test_collectives_and_their_sizes(mesh):
  struct = lambda shape, *spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
  )

  def run(weights, x):
    def local(w, x):
      w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
      return jax.lax.psum(x @ w, "tp")

    return jax.shard_map(
      local, mesh=mesh, in_specs=(P("fsdp"), P(None, "tp")), out_specs=P(), check_vma=False
    )(weights["w"], x)

  text = jax.jit(run).lower({"w": struct((6, 10), "fsdp")}, struct((3, 12), None, "tp")).compile().as_text()
  found = {
    use.instruction.opcode.removesuffix("-start"): (use.instruction.size, set(use.arguments))
    for use in Program(text).collectives
  }
  assert found == {"all-gather": (math.prod((6, 10)), {"w"}), "all-reduce": (math.prod((3, 10)), set())}
