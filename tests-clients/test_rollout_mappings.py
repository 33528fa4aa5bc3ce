"""tunix' own transfer moves every weight of a model into the state of a sampler, with the mappings that the model has.

The samplers' states are written down here by hand: names and shapes as in the models of tpu-inference and sglang-jax.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from qwix._src.core import qarray
from tunix.generate.mappings import MappingConfig
from tunix.generate.utils import transfer_state_with_mappings

from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import ConfigError, ModelsError
from models_core.rollout import from_checkpoint, to_checkpoint
from models_gemma import gemma
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_llama import llama3
from models_llama.llama3.model import ModelConfig as Llama3Config
from models_qwen import qwen2, qwen3
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen3.model import ModelConfig as Qwen3Config

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")

pytestmark = pytest.mark.filterwarnings("ignore")

V, D, F, N, K, H, E, LAYERS, RANK = 64, 32, 48, 4, 2, 8, 4, 2, 3
SIZES = {
  "num_layers": LAYERS,
  "embed_dim": D,
  "hidden_dim": F,
  "num_heads": N,
  "num_kv_heads": K,
  "head_dim": H,
}
EXPERTS = {"num_experts": E, "num_experts_per_tok": 2, "moe_hidden_dim": F}

GEMMA2 = GemmaConfig.gemma2_2b()
MODELS = {
  "llama3": (llama3, dataclasses.replace(Llama3Config.llama3p1_8b(), **SIZES, vocab_size=V)),
  "qwen2": (qwen2, dataclasses.replace(Qwen2Config.qwen2p5_7b(), **SIZES, vocab_size=V)),
  "qwen3": (qwen3, dataclasses.replace(Qwen3Config.qwen3_8b(), **SIZES, vocab_size=V)),
  "qwen3_moe": (qwen3, dataclasses.replace(Qwen3Config.qwen3_30b_a3b(), **SIZES, **EXPERTS, vocab_size=V)),
  "gemma2": (
    gemma,
    dataclasses.replace(GEMMA2, **SIZES, num_embed=V, attention_types=GEMMA2.attention_types[:LAYERS]),
  ),
}

VLLM_LAYER = {
  "self_attn.q_proj.weight": (D, N, H),
  "self_attn.k_proj.weight": (D, K, H),
  "self_attn.v_proj.weight": (D, K, H),
  "self_attn.o_proj.weight": (N, H, D),
  "mlp.gate_proj.weight": (D, F),
  "mlp.up_proj.weight": (D, F),
  "mlp.down_proj.weight": (F, D),
  "input_layernorm.weight": (D,),
  "post_attention_layernorm.weight": (D,),
}
VLLM_BIASES = {
  "self_attn.q_proj.bias": (N, H),
  "self_attn.k_proj.bias": (K, H),
  "self_attn.v_proj.bias": (K, H),
}
SGLANG_LAYER = {
  "self_attn.q_proj.weight": (D, N * H),
  "self_attn.k_proj.weight": (D, K * H),
  "self_attn.v_proj.weight": (D, K * H),
  "self_attn.o_proj.weight": (N * H, D),
  "mlp.gate_proj.weight": (D, F),
  "mlp.up_proj.weight": (D, F),
  "mlp.down_proj.weight": (F, D),
  "input_layernorm.scale": (D,),
  "post_attention_layernorm.scale": (D,),
}
SGLANG_BIASES = {
  "self_attn.q_proj.bias": (N * H,),
  "self_attn.k_proj.bias": (K * H,),
  "self_attn.v_proj.bias": (K * H,),
}
SGLANG_EXPERTS = {
  "self_attn.c_proj.weight": (N * H, D),
  "moe_gate.kernel": (D, E),
  "mlp.wi_0": (E, D, F),
  "mlp.wi_1": (E, D, F),
  "mlp.wo": (E, F, D),
}
VLLM_TOP = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (D, V)}
SGLANG_TOP = {"model.embed_tokens.embedding": (V, D), "model.norm.scale": (D,), "lm_head.embedding": (V, D)}
DENSE = ("self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def flax_names(layer):
  """The names of tpu-inference's Llama."""
  return {
    name.replace("norm.weight", "norm.scale").replace(".weight", ".kernel"): shape
    for name, shape in layer.items()
  }


def without(layer, names):
  return {name: shape for name, shape in layer.items() if name not in names}


def norms_of_gemma(layer):
  named = {name.replace("norm.scale", "norm.weight"): shape for name, shape in layer.items()}
  return named | {f"{part}_feedforward_layernorm.weight": (D,) for part in ("pre", "post")}


STATES = {
  ("llama3", "vllm_jax"): (
    {"model.embed.embedding": (V, D), "model.norm.scale": (D,), "model.lm_head": (D, V)},
    flax_names(VLLM_LAYER),
  ),
  ("qwen2", "vllm_jax"): (VLLM_TOP, VLLM_LAYER | VLLM_BIASES),
  ("qwen3", "vllm_jax"): (
    VLLM_TOP,
    VLLM_LAYER | {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)},
  ),
  ("llama3", "sglang_jax"): (SGLANG_TOP, SGLANG_LAYER),
  ("qwen2", "sglang_jax"): (SGLANG_TOP, SGLANG_LAYER | SGLANG_BIASES),
  ("qwen3", "sglang_jax"): (
    SGLANG_TOP,
    SGLANG_LAYER | {"self_attn.q_norm.scale": (H,), "self_attn.k_norm.scale": (H,)},
  ),
  ("qwen3_moe", "sglang_jax"): (
    SGLANG_TOP,
    without(SGLANG_LAYER, DENSE)
    | SGLANG_EXPERTS
    | {"self_attn.q_norm.scale": (H,), "self_attn.k_norm.scale": (H,)},
  ),
  ("gemma2", "sglang_jax"): (
    {"model.embed_tokens.embedding": (V, D), "model.norm.weight": (D,)},
    norms_of_gemma(SGLANG_LAYER),
  ),
}


def state_of(shapes, mesh=None):
  """A sampler's state of zeros, in its own dtype."""
  flat = {
    tuple(int(part) if part.isdigit() else part for part in name.split(".")): nnx.Param(
      jnp.zeros(shape, jnp.bfloat16)
    )
    for name, shape in shapes.items()
  }
  return nnx.State.from_flat_path(flat)


def shapes_of(top, layer):
  return top | {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def transferred(model, shapes, backend, state=None, **sizes):
  """The sampler's arrays after a transfer, called as tunix' samplers call it."""
  config = MappingConfig.build(model=model, backend=backend)
  names, orders = config.to_hf_mappings, config.to_hf_transpose_keys
  if backend == "sglang_jax":
    names |= config.lora_to_hf_mappings
    orders |= config.lora_to_hf_transpose_keys
    options = {"rollout_engine": "sglang_jax"}
  else:
    options = {"key_mapping_hook_fns": config.to_hf_hook_fns}
  target = state_of(shapes)
  transfer_state_with_mappings(
    nnx.state(model) if state is None else state,
    target,
    key_mappings=names,
    transpose_keys=orders,
    num_kv_heads=K,
    head_dim=H,
    **options,
    **sizes,
  )
  return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in target.flat_state()}


# The end of the sampler's name -> Hugging Face's.
HUGGINGFACE = [
  ("model.embed.embedding", "model.embed_tokens.weight"),
  ("model.lm_head", "lm_head.weight"),
  (".embedding", ".weight"),
  (".scale", ".weight"),
  ("c_proj.weight", "o_proj.weight"),
  ("moe_gate.kernel", "mlp.gate.weight"),
  (".kernel", ".weight"),
]
MATRICES = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


def expected(name, shape, tensors, backend):
  """What the sampler needs, from the tensors of Hugging Face's files."""
  parent, _, leaf = name.rpartition(".")
  if leaf in MATRICES:
    return np.stack([tensors[f"{parent}.experts.{e}.{MATRICES[leaf]}.weight"].T for e in range(E)])
  end, theirs = next(((a, b) for a, b in HUGGINGFACE if name.endswith(a)), ("", ""))
  tensor = tensors[name.removesuffix(end) + theirs]
  keeps = "embed" in name or (backend == "sglang_jax" and "lm_head" in name)
  return (tensor if keeps else tensor.T).reshape(shape)


def make(name, mesh=None):
  """A model in which biases and norms are random, too."""
  package, config = MODELS[name]
  model = create_dummy_model(package.FAMILY.model_class, config, mesh, dtype="bfloat16")
  for i, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
    value = variable.get_value()
    drawn = jax.random.normal(jax.random.key(i), value.shape, value.dtype)
    variable.set_value(jax.device_put(drawn, value.sharding))
  return model


MESHES = {
  "one device": lambda: None,
  "auto": lambda: jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp")),
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), devices=jax.devices()[:4]),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("name", "backend"), STATES)
def test_every_weight_arrives(name, backend, mesh):
  model, shapes = make(name, MESHES[mesh]()), shapes_of(*STATES[name, backend])
  tensors = {key: np.asarray(value) for key, value in to_checkpoint(model, MODELS[name][0].FAMILY).items()}
  found = transferred(model, shapes, backend)
  assert found.keys() == shapes.keys()
  for key, shape in shapes.items():
    assert np.any(found[key] != 0), key
    np.testing.assert_array_equal(found[key], expected(key, shape, tensors, backend), err_msg=key)
  # Nothing of the model is left over, either.
  leaves = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert leaves == sum(array.size for array in found.values())


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_padded_heads_and_repeated_kv_heads(name):
  """vLLM pads heads to 128 numbers and repeats KV heads so that each device has one."""
  wide = {"self_attn.q_proj": (D, N, 128), "self_attn.o_proj": (N, 128, D)}
  wide |= {f"self_attn.{part}_proj": (D, 4, 128) for part in "kv"}
  biases = {"self_attn.q_proj": (N, 128), "self_attn.k_proj": (4, 128), "self_attn.v_proj": (4, 128)}
  top, layer = STATES[name, "vllm_jax"]
  layer = layer | {f"{key}.weight": shape for key, shape in wide.items()}
  if name == "qwen2":
    layer |= {f"{key}.bias": shape for key, shape in biases.items()}
  model = make(name)
  tensors = {key: np.asarray(value) for key, value in to_checkpoint(model, MODELS[name][0].FAMILY).items()}
  found = transferred(model, shapes_of(top, layer), "vllm_jax")
  for i in range(LAYERS):
    of = f"model.layers.{i}.self_attn"
    q = tensors[f"{of}.q_proj.weight"].T.reshape(D, N, H)
    k = tensors[f"{of}.k_proj.weight"].T.reshape(D, K, H).repeat(2, axis=1)
    o = tensors[f"{of}.o_proj.weight"].T.reshape(N, H, D)
    for part, numbers, axis in (("q", q, 2), ("k", k, 2), ("o", o, 1)):
      array = found[f"{of}.{part}_proj.weight"]
      within, beyond = np.split(array, [H], axis=axis)
      np.testing.assert_array_equal(within, numbers)
      assert not beyond.any()
    if name == "qwen2":
      bias = tensors[f"{of}.k_proj.bias"].reshape(K, H).repeat(2, axis=0)
      np.testing.assert_array_equal(found[f"{of}.k_proj.bias"][:, :H], bias)


def test_lora_factors_arrive_at_sglang():
  model = make("llama3")
  provider = qwix.LoraProvider(module_path=".*(q_proj|o_proj|up_proj|down_proj)", rank=RANK, alpha=2.0)
  tokens = jnp.ones((1, 4), jnp.int32)
  model = qwix.apply_lora_to_model(model, provider, tokens, tokens, rngs=nnx.Rngs(0))
  for i, leaf in enumerate(
    jax.tree.leaves(nnx.state(model, nnx.LoRAParam), is_leaf=lambda x: isinstance(x, nnx.Variable))
  ):
    leaf.set_value(jax.random.normal(jax.random.key(i), leaf.get_value().shape, jnp.bfloat16))
  sizes = {
    "self_attn.q_proj": (N * H, D),
    "self_attn.o_proj": (D, N * H),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
  }
  factors = {f"{key}.A_buffer": (1, RANK, into) for key, (_, into) in sizes.items()}
  factors |= {f"{key}.B_buffer": (1, out, RANK) for key, (out, _) in sizes.items()}
  top, layer = STATES["llama3", "sglang_jax"]
  found = transferred(model, shapes_of(top, layer | factors), "sglang_jax")
  for i, own in enumerate(model.layers):
    blocks = {"self_attn": own.attn, "mlp": own.mlp}
    for key in sizes:
      block, part = key.split(".")
      module = getattr(blocks[block], part)
      for side, factor in (("A", module.w_lora_a), ("B", module.w_lora_b)):
        array = found[f"model.layers.{i}.{key}.{side}_buffer"]
        np.testing.assert_array_equal(array, np.asarray(factor[...]).T[None])


def test_the_familys_mappings_alone_suffice():
  """Without a model tunix gets no hooks, and reshapes by itself what needs no padding."""
  config = MappingConfig.build(mapping_obj=qwen3.BACKEND_MAPPINGS["vllm_jax"])
  model, shapes = make("qwen3"), shapes_of(*STATES["qwen3", "vllm_jax"])
  target = state_of(shapes)
  transfer_state_with_mappings(
    nnx.state(model),
    target,
    key_mappings=config.to_hf_mappings,
    key_mapping_hook_fns=config.to_hf_hook_fns,
    transpose_keys=config.to_hf_transpose_keys,
  )
  found = {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in target.flat_state()}
  for key, array in transferred(model, shapes, "vllm_jax").items():
    np.testing.assert_array_equal(found[key], array)


def test_what_a_sampler_has_no_place_for_is_an_error():
  with pytest.raises(
    ConfigError, match=r"have no place for layers\.0\.mlp\.experts\.\w+: hand the weights over"
  ):
    MappingConfig.build(model=make("qwen3_moe"), backend="vllm_jax")
  with pytest.raises(ConfigError, match="no mapping for the backend 'vllm', only for vllm_jax, sglang_jax"):
    MappingConfig.build(model=make("qwen3"), backend="vllm")


def dequantised(held):
  """What qwix makes of numbers on one device, in float32, where it rounds as little as we do."""
  qvalue, scale = (jnp.asarray(np.asarray(part.get_value())) for part in (held.qvalue, held.scale))
  return np.asarray(
    qarray.dequantize(dataclasses.replace(held, qvalue=qvalue, scale=scale.astype(jnp.float32)))
  )


@pytest.mark.parametrize(
  "rule",
  [
    {"weight_qtype": "int8"},
    {"weight_qtype": "int4", "tile_size": 8},
    {"weight_qtype": "nf4", "tile_size": 8},
  ],
  ids=str,
)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_quantised_weights_are_those_that_qwix_means(name, mesh, rule):
  model = make(name, MESHES[mesh]())
  tokens = jnp.ones((1, 4), jnp.int32)
  provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*(_proj|lm_head)", **rule)])
  quantised = qwix.quantize_model(model, provider, tokens, tokens)
  found = to_checkpoint(quantised, MODELS[name][0].FAMILY)
  plain = to_checkpoint(model, MODELS[name][0].FAMILY)
  assert found.keys() == plain.keys()
  with pytest.raises(ModelsError, match="is quantised: set the weights of the model that was quantised"):
    from_checkpoint(quantised, MODELS[name][0].FAMILY, plain)
  for i, layer in enumerate(quantised.layers):
    for part in ("q", "k", "v", "o"):
      held = getattr(layer.attn, f"{part}_proj").w.array
      expected = dequantised(held).astype(jnp.bfloat16)
      key = f"model.layers.{i}.self_attn.{part}_proj.weight"
      np.testing.assert_array_equal(found[key], expected)
      assert found[key].dtype == jnp.bfloat16
      assert np.any(np.asarray(found[key]) != np.asarray(plain[key]))


@pytest.mark.parametrize("rule", [{}, {"weight_qtype": "nf4", "tile_size": 8}], ids=["LoRA", "QLoRA"])
def test_factors_of_qwix_are_merged(rule):
  model = make("llama3")
  tokens = jnp.ones((1, 4), jnp.int32)
  provider = qwix.LoraProvider(module_path=".*q_proj", rank=RANK, alpha=6.0, **rule)
  adapted = qwix.apply_lora_to_model(model, provider, tokens, tokens, rngs=nnx.Rngs(0))
  projection = adapted.layers[1].attn.q_proj
  projection.w_lora_b.set_value(jnp.ones_like(projection.w_lora_b[...]))
  key = "model.layers.1.self_attn.q_proj.weight"
  found = to_checkpoint(adapted, llama3.FAMILY, alpha=6.0)[key]
  a, b = (np.asarray(factor[...], np.float64) for factor in (projection.w_lora_a, projection.w_lora_b))
  if rule:
    base = dequantised(projection.w.array).astype(np.float64)
  else:
    base = np.asarray(projection.w[...], np.float64)
  exact = base + 6.0 / RANK * (a @ b).T
  np.testing.assert_array_equal(found, exact.astype(np.float32).astype(jnp.bfloat16))
