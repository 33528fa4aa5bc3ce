"""Which implementation a call of attention takes, the kernels, and attention on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models_core.errors import ConfigError
from models_core.hlo import Program
from models_core.layers import ATTENTION_IMPLEMENTATIONS, AttentionCase, explain_attention, explain_case
from models_core.layers.attention import attend
from models_core.layers.splash import attend_splash
from models_core.layers.visibility import visible_keys

from .tiny_lm import SHARDING, Config, make

P = PartitionSpec
CASE = AttentionCase(
  rows=1,
  queries=4096,
  keys=4096,
  heads=8,
  kv_heads=2,
  head_dim=64,
  dtype="bfloat16",
  platform="tpu",
  counted=True,
)
CHOICES = [
  ({}, "splash", "cudnn", "NVIDIA's GPUs only, and this is a tpu"),
  ({"platform": "cpu"}, "blockwise", "splash", "TPUs only, and this is a cpu"),
  ({"counted": False}, "blockwise", "splash", "it has positions or a cache"),
  ({"mask": True, "counted": False}, "blockwise", "splash", "it has a mask of its own"),
  ({"sequence_shards": 4}, "blockwise", "splash", "divides its sequence into 4 parts"),
  ({"queries": 1, "counted": False}, "dense", "blockwise", "fewer than 64 queries"),
  ({"queries": 128, "sequence_shards": 4}, "dense", "blockwise", "fewer than 64 queries on a device"),
  ({"queries": 64, "keys": 64}, "dense", "splash", "one block"),
  ({"queries": jax.export.symbolic_shape("t")[0]}, "dense", "blockwise", "symbolic"),
  ({"products_replaced": True}, "dense", "blockwise", "a library replaces JAX's products"),
  ({"platform": "gpu", "soft_cap": 30.0}, "blockwise", "cudnn", "soft cap"),
  ({"platform": "gpu", "packed": True}, "blockwise", "cudnn", "several sequences"),
  # On a CPU, too, it says what a GPU would refuse.
  (
    {"platform": "cpu", "soft_cap": 30.0},
    "blockwise",
    "cudnn",
    "GPUs only, and this is a cpu; it has a soft cap",
  ),
  # Where cuDNN is not installed, as here, JAX says so.
  ({"platform": "gpu"}, "blockwise", "cudnn", "JAX says: cuDNN is not detected"),
]


@pytest.mark.parametrize(("change", "taken", "other", "reason"), CHOICES, ids=[str(c[0]) for c in CHOICES])
def test_the_choice_and_its_reasons(change, taken, other, reason) -> None:
  case = dataclasses.replace(CASE, **change)
  found = explain_case(case)
  assert found.taken == taken
  assert reason in found.why_not[other]
  assert {found.taken, *found.why_not} == {*ATTENTION_IMPLEMENTATIONS} - {"auto"}
  if "queries" not in change:
    with pytest.raises(ConfigError, match=f"attn_implementation='{other}' cannot take this attention.*auto"):
      explain_case(case, other)


def test_a_name_is_taken_but_a_few_queries_are_computed_at_once() -> None:
  assert explain_case(CASE, "dense").taken == "dense"
  assert explain_case(CASE, "blockwise").why_not["splash"] == "blockwise is asked for"
  assert explain_case(dataclasses.replace(CASE, queries=1, counted=False), "splash").taken == "dense"


@pytest.mark.parametrize("name", ["flash_attention_2", None, 3, ["auto"]], ids=str)
def test_another_name_is_refused_with_the_choices(name) -> None:
  with pytest.raises(ConfigError, match=r"attn_implementation is .*, expected one of auto, cudnn, splash"):
    explain_case(CASE, name)


B, T, N, K, H = 2, 256, 4, 2, 16
RNG = np.random.default_rng(0)
Q, OUT = (RNG.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(2))
KEYS, VALUES = (RNG.normal(size=(B, T, K, H)).astype(np.float32) for _ in range(2))
STRAIGHT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
SEGMENTS = np.stack([np.arange(T) >= 130, np.arange(T) >= 200]).astype(np.int32)


def results(attend, *arrays):
  """The result and the gradients."""
  return jax.jit(lambda *arrays: (lambda out, vjp: (out, *vjp(jnp.asarray(OUT))))(*jax.vjp(attend, *arrays)))(
    *arrays
  )


def assert_close(ours, theirs) -> None:
  for one, other in zip(ours, theirs, strict=True):
    assert np.abs(np.asarray(one) - np.asarray(other)).max() <= 2e-6 * np.abs(np.asarray(other)).max()


@pytest.mark.parametrize(
  ("window", "soft_cap", "segments", "kv_heads"),
  [(None, None, None, 2), (40, 2.0, SEGMENTS, 1)],
  ids=["causal", "window, soft cap, packed, one key head"],
)
def test_splash_attention_is_the_same(window, soft_cap, segments, kv_heads) -> None:
  visible = visible_keys(jnp.asarray(STRAIGHT), segment_ids=segments, window=window, counted=True)
  arrays = Q, KEYS[:, :, :kv_heads], VALUES[:, :, :kv_heads]
  assert_close(
    results(lambda *qkv: attend_splash(*qkv, visible, 0.3, soft_cap, interpret=True), *arrays),
    results(
      lambda *qkv: attend(*qkv, visible, scale=0.3, soft_cap=soft_cap, implementation="dense"), *arrays
    ),
  )


MESHES = {
  "sequence": ((2, 2), ("cp", "tp"), P(None, "cp", "tp"), 2),
  "more parts than key heads": ((4,), ("tp",), P(None, None, "tp"), 2),
  "one key head": ((2, 2), ("fsdp", "tp"), P("fsdp", None, "tp"), 1),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh_keys_are_gathered_once_and_loops_send_nothing(name, kind) -> None:
  shape, names, spec, kv_heads = MESHES[name]
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(shape), names, axis_types=(kind,) * len(names))
  arrays = Q, KEYS[:, :, :kv_heads], VALUES[:, :, :kv_heads]
  left = jnp.asarray(np.maximum(STRAIGHT - np.array([[13], [70]]), -1), jnp.int32)
  mask = jnp.asarray(RNG.random((B, T, T)) < 0.3) if name == "one key head" else None

  def run(implementation, spec, *qkv):
    visible = visible_keys(left, None, mask, jnp.asarray(SEGMENTS), 90)
    return attend(*qkv, visible, scale=0.3, implementation=implementation, spec=spec)

  expected = results(lambda *qkv: run("dense", P(), *qkv), *arrays)
  heads = spec[2] if kv_heads % mesh.shape[spec[2]] == 0 else None
  specs = spec, *[P(*spec[:2], heads)] * 2
  placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
  out = jax.device_put(OUT, NamedSharding(mesh, spec))

  def both(out, *qkv):
    result, vjp = jax.vjp(lambda *qkv: run("blockwise", spec, *qkv), *qkv)
    return result, *vjp(out)

  program = jax.jit(both).lower(out, *placed).compile()
  assert_close(program(out, *placed), expected)
  text = program.as_text()
  sent = [use.instruction.opcode.removesuffix("-start") for use in Program(text).collectives]
  entry = text[text.index("\nENTRY") :]
  assert all(f"{opcode}" in entry for opcode in sent)
  assert len(sent) == sum(entry.count(f" {opcode}(") for opcode in set(sent)), "a loop sends something"
  if name == "sequence":
    assert sorted(sent) == ["all-gather"] * 2 + ["reduce-scatter"] * 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_model_whose_sequence_is_divided_over_a_mesh(kind) -> None:
  shd = dataclasses.replace(
    SHARDING,
    act_btd=("fsdp", "cp", None),
    act_btf=("fsdp", "cp", None),
    act_btnh=("fsdp", "cp", None, None),
  )
  config = Config(windows=(None, 90), shd_config=shd)
  tokens, out = RNG.integers(0, 16, (B, T)), RNG.normal(size=(B, T, 16)).astype(np.float32)
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "cp"), axis_types=(kind,) * 2)
  placed = jax.device_put(tokens, NamedSharding(mesh, P("fsdp", "cp")))

  def both(model, tokens):
    graphdef, state = nnx.split(model)
    run = lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0]

    def loss(state, tokens, out):
      return jnp.sum(run(state, tokens) * out)

    return jax.jit(run), jax.jit(jax.grad(loss)), state

  run, grad, state = both(make(None, config), tokens)
  expected = run(state, tokens), *jax.tree.leaves(grad(state, tokens, out))
  run, grad, state = both(make(mesh, config), placed)
  program = run.lower(state, placed).compile()
  logits = program(state, placed)
  assert logits.sharding.shard_shape(logits.shape) == (1, T // 2, 16)
  weights = jax.device_put(out, logits.sharding)
  for ours, theirs in zip((logits, *jax.tree.leaves(grad(state, placed, weights))), expected, strict=True):
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()
  sent = [use.instruction for use in Program(program.as_text()).collectives]
  keys = [one for one in sent if one.size == T * config.num_kv_heads * config.head_dim]
  assert len(keys) == 2 * len(config.windows), "keys and values must be gathered once a layer"
  assert max(one.size for one in sent) == max(one.size for one in keys)


def test_a_call_is_explained_without_being_run() -> None:
  q, k = (jax.ShapeDtypeStruct((1, 1 << 17, n, 64), jnp.bfloat16) for n in (8, 2))

  def layers(q, k, v):
    positions = jnp.arange(q.shape[1])[None]
    for window in (None, 512, 512):
      q = attend(q, k, v, visible_keys(positions, window=window, counted=True), scale=0.1)
    return q

  whole, window = explain_attention(layers, q, k, k)
  assert (whole.taken, whole.case.window, window.case.window) == ("blockwise", False, True)
  assert "\n  not splash: it runs on TPUs only, and this is a cpu" in str(whole)
  assert str(whole).startswith("bfloat16 q [1, 131072, 8, 64], k and v [1, 131072, 2, 64] on cpu, counted: b")
