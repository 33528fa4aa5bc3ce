"""Reads the configuration from a GGUF file's metadata, as config.json would state it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models_core.config.rope import write_scaling
from models_core.errors import CheckpointError
from models_core.formats import Checkpoint, TensorInfo
from models_core.rope_scaling import Llama3Scaling

_REQUIRED = object()


def _count(value: object) -> int:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError("expected a positive whole number")
  return value


def _number(value: object) -> float:
  """The number, rounded to the shortest decimal that is the same float32: 1e-5 instead of 9.999999747378752e-06."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
    raise ValueError("expected a positive number")
  with np.errstate(over="ignore"):
    single = np.float32(value)
  return float(str(single)) if float(single) == value else float(value)


# A row: config.json's key, GGUF's key after "{architecture}.", the function that reads its value, and the value if the
# file does not have the key (None: config.json's key is left out, too).
_Row = tuple[str, str, Callable[[object], Any], Any]

_EVERY: tuple[_Row, ...] = (
  ("hidden_size", "embedding_length", _count, _REQUIRED),
  ("num_hidden_layers", "block_count", _count, _REQUIRED),
  ("intermediate_size", "feed_forward_length", _count, _REQUIRED),
  ("num_attention_heads", "attention.head_count", _count, _REQUIRED),
  ("num_key_value_heads", "attention.head_count_kv", _count, None),
  ("head_dim", "attention.key_length", _count, None),
  ("rms_norm_eps", "attention.layer_norm_rms_epsilon", _number, _REQUIRED),
  ("max_position_embeddings", "context_length", _count, _REQUIRED),
)
_THETA: tuple[_Row, ...] = (("rope_theta", "rope.freq_base", _number, _REQUIRED),)
# Files of Gemma 1 and 2 do not have this key.
_GEMMA_THETA: tuple[_Row, ...] = (("rope_theta", "rope.freq_base", _number, 10000.0),)
_WINDOW: tuple[_Row, ...] = (("sliding_window", "attention.sliding_window", _count, _REQUIRED),)
_SOFTCAPS: tuple[_Row, ...] = (
  ("attn_logit_softcapping", "attn_logit_softcapping", _number, _REQUIRED),
  ("final_logit_softcapping", "final_logit_softcapping", _number, _REQUIRED),
)
_GEMMA3: tuple[_Row, ...] = (
  ("rope_local_base_freq", "rope.freq_base_swa", _number, 10000.0),
  ("final_logit_softcapping", "final_logit_softcapping", _number, None),
)
_EXPERTS: tuple[_Row, ...] = (
  ("num_experts", "expert_count", _count, _REQUIRED),
  ("num_experts_per_tok", "expert_used_count", _count, _REQUIRED),
  ("moe_intermediate_size", "expert_feed_forward_length", _count, _REQUIRED),
)

_SILU = {"hidden_act": "silu"}
_GELU_TANH = "gelu_pytorch_tanh"


@dataclasses.dataclass(frozen=True)
class _Architecture:
  """How an architecture, a value of `general.architecture`, is read.

  Attributes:
    model_type: the architecture's name in config.json.
    rows: of the keys that its files have.
    implied: keys of config.json, with their values, that follow from the architecture alone.
    inert: keys of GGUF that change no logit of this architecture.
    query_by_width: models with this number of layers have hidden_size / num_attention_heads as query_pre_attn_scalar,
      all others have head_dim; None if the architecture does not have that key.
    biases: pairs of a tensor and the key of config.json that is true if the file holds it.
    pattern: default of config.json's sliding_window_pattern; None if config.json does not have the key. In a pattern of
      6, every sixth layer has full attention.
  """

  model_type: str
  rows: tuple[_Row, ...]
  implied: Mapping[str, object]
  inert: tuple[str, ...] = ()
  query_by_width: int | None = None
  pattern: int | None = None
  biases: tuple[tuple[str, str], ...] = ()


_ARCHITECTURES = {
  "llama": _Architecture(
    "llama",
    _EVERY + _THETA,
    _SILU,
    biases=(("blk.0.attn_q.bias", "attention_bias"), ("blk.0.ffn_gate.bias", "mlp_bias")),
  ),
  "qwen2": _Architecture(
    "qwen2", _EVERY + _THETA, _SILU | {"use_sliding_window": False}, inert=("attention.sliding_window",)
  ),
  "qwen3": _Architecture(
    "qwen3", _EVERY + _THETA, _SILU | {"use_sliding_window": False}, inert=("attention.sliding_window",)
  ),
  "qwen3moe": _Architecture(
    "qwen3_moe",
    _EVERY + _THETA + _EXPERTS,
    _SILU
    | {"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    inert=("attention.sliding_window",),
  ),
  "gemma": _Architecture(
    "gemma", _EVERY + _GEMMA_THETA, {"hidden_act": _GELU_TANH, "hidden_activation": _GELU_TANH}
  ),
  "gemma2": _Architecture(
    "gemma2",
    _EVERY + _GEMMA_THETA + _WINDOW + _SOFTCAPS,
    {"hidden_act": _GELU_TANH, "hidden_activation": _GELU_TANH},
    query_by_width=46,
  ),
  "gemma3": _Architecture(
    "gemma3_text",
    _EVERY + _THETA + _WINDOW + _GEMMA3,
    {"hidden_activation": _GELU_TANH},
    query_by_width=62,
    pattern=6,
  ),
}

# Keys that change nothing if they have one of these values, and are refused otherwise. None accepts any value.
_NEUTRAL: Mapping[str, tuple[object, ...] | None] = {
  "vocab_size": None,
  "rope.scaling.finetuned": None,
  "attention.causal": (True,),
  "expert_count": (0,),
  "expert_used_count": (0,),
  "expert_shared_count": (0,),
  "expert_shared_feed_forward_length": (0,),
  "expert_gating_func": (1,),
  "expert_weights_norm": (True,),
  "expert_weights_scale": (0.0, 1.0),
  "leading_dense_block_count": (0,),
  "nextn_predict_layers": (0,),
  "pooling_type": (0,),
  "rope.scale_linear": (1.0,),
  "tensor_data_layout": ("Meta AI original pth",),
  "rope.scaling.attn_factor": (1.0,),
  "rope.scaling.yarn_ext_factor": (1.0,),
  "use_parallel_residual": (False,),
}

# rope.scaling.type -> rows of config.json's rope_scaling.
_SCALINGS: Mapping[str, tuple[_Row, ...]] = {
  "none": (),
  "linear": (("factor", "rope.scaling.factor", _number, _REQUIRED),),
  "yarn": (
    ("factor", "rope.scaling.factor", _number, _REQUIRED),
    ("original_max_position_embeddings", "rope.scaling.original_context_length", _count, _REQUIRED),
    ("beta_fast", "rope.scaling.yarn_beta_fast", _number, None),
    ("beta_slow", "rope.scaling.yarn_beta_slow", _number, None),
    ("attention_factor", "rope.scaling.yarn_attn_factor", _number, None),
  ),
}
_SCALING_TYPE, _SCALING_FACTOR = "rope.scaling.type", "rope.scaling.factor"


def gguf_config(checkpoint: Checkpoint) -> dict[str, Any]:
  """The configuration of a GGUF checkpoint, in the keys of config.json.

  A tensor `rope_freqs.weight` [head_dim / 2] holds divisors of RoPE's frequencies. If they are those of Llama 3.1 or
  3.2, `rope_scaling` is the `llama3` scaling that transformers knows; otherwise it is
  `{"rope_type": "frequency_factors", "factors": [...]}`. This function reads the tensor, which has a few hundred bytes.

  YaRN's `attention_factor` in config.json is the whole factor. It is the one in the GGUF file times 0.1 ln(factor) + 1.

  Args:
    checkpoint: whose format is GGUF.

  Raises:
    CheckpointError: with every key that is missing, malformed or unknown: an unknown key may change the logits.
  """
  where, metadata = checkpoint.files.path, checkpoint.metadata
  name = metadata.get("general.architecture")
  if not isinstance(name, str) or name not in _ARCHITECTURES:
    known = ", ".join(_ARCHITECTURES)
    raise CheckpointError(
      where, [f"general.architecture is {name!r}, which is not implemented; implemented are {known}"]
    )
  architecture = _ARCHITECTURES[name]
  keys = _Keys(name, metadata)
  config: dict[str, Any] = {"model_type": architecture.model_type, **architecture.implied}
  config |= keys.read(architecture.rows)
  embedding = checkpoint.tensors.get("token_embd.weight")
  if embedding is None or len(embedding.shape) != 2:
    keys.problems.append("the tensor token_embd.weight of shape [vocab_size, hidden_size] is missing")
  else:
    config["vocab_size"] = embedding.shape[0]
  config |= {key: True for tensor, key in architecture.biases if tensor in checkpoint.tensors}
  config["tie_word_embeddings"] = "output.weight" not in checkpoint.tensors
  if not keys.problems:
    _complete(config, architecture, keys)
  factors = checkpoint.tensors.get("rope_freqs.weight")
  scaling = _scaling(keys)
  if not keys.problems and factors is not None:
    if scaling is not None:
      keys.problems.append(
        f"RoPE is scaled twice, by the tensor rope_freqs.weight and by the keys {keys.prefix}rope.scaling.*: remove one"
      )
    divisors = _factors(checkpoint, factors, config["head_dim"], keys)
    scaling = _published(divisors, config["rope_theta"]) or {
      "rope_type": "frequency_factors",
      "factors": divisors,
    }
  if scaling is not None:
    config["rope_scaling"] = scaling
  keys.refuse_unknown(architecture.inert)
  if keys.problems:
    raise CheckpointError(where, keys.problems)
  return config


class _Keys:
  """The metadata of an architecture. Remembers which keys were read, and which problems they have.

  Attributes:
    prefix: of the architecture's keys, such as "llama.".
    values: by key, without the prefix.
    used: keys that were read.
    problems: one sentence each.
  """

  def __init__(self, architecture: str, metadata: Mapping[str, object]):
    self.prefix = f"{architecture}."
    self.values = {k.removeprefix(self.prefix): v for k, v in metadata.items() if k.startswith(self.prefix)}
    self.used: set[str] = set()
    self.problems: list[str] = []

  def read(self, rows: tuple[_Row, ...]) -> dict[str, Any]:
    """Reads the keys of rows. Notes a problem for each key that is missing or malformed."""
    found = {}
    for ours, key, convert, absent in rows:
      self.used.add(key)
      if key in self.values:
        try:
          found[ours] = convert(self.values[key])
        except ValueError as error:
          self.problems.append(f"{self.prefix}{key} is {_short(self.values[key])}: {error}")
      elif absent is _REQUIRED:
        self.problems.append(f"the key {self.prefix}{key} is missing")
      elif absent is not None:
        found[ours] = absent
    return found

  def expect(self, key: str, value: object) -> None:
    """Notes a problem if the file has the key with another value."""
    self.used.add(key)
    if key in self.values and not (np.isscalar(self.values[key]) and self.values[key] == value):
      self.problems.append(f"{self.prefix}{key} is {_short(self.values[key])}; only {value!r} is implemented")

  def refuse_unknown(self, inert: tuple[str, ...]) -> None:
    """Notes a problem for each key that was not read and may change the logits."""
    for key in sorted(self.values.keys() - self.used - set(inert)):
      value = self.values[key]
      if (accepted := _NEUTRAL.get(key, ())) is not None and not (np.isscalar(value) and value in accepted):
        self.problems.append(f"{self.prefix}{key} is {_short(value)}, which is not implemented")


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _complete(config: dict[str, Any], architecture: _Architecture, keys: _Keys) -> None:
  """Adds the keys that follow from others, and checks those that must agree with them."""
  hidden, heads, layers = (config[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
  config.setdefault("num_key_value_heads", heads)
  if "head_dim" not in config:
    if hidden % heads:
      keys.problems.append(
        f"{keys.prefix}attention.key_length is missing, and embedding_length {hidden} is not a multiple of "
        f"attention.head_count {heads}: add it"
      )
    config["head_dim"] = hidden // heads
  keys.expect("rope.dimension_count", config["head_dim"])
  keys.expect("attention.value_length", config["head_dim"])
  if architecture.query_by_width is not None:
    by_width = layers == architecture.query_by_width
    config["query_pre_attn_scalar"] = hidden // heads if by_width else config["head_dim"]
  if "sliding_window" in config:
    config |= _pattern(architecture.pattern, layers, keys)


def _pattern(default: int | None, layers: int, keys: _Keys) -> dict[str, Any]:
  """The keys that say which layers have a sliding window: a list of all layers, or a pattern.

  Args:
    default: the pattern if the file states none; None if only the pattern of 2 is implemented.
    layers: number of layers.
    keys: of the architecture.
  """
  key = "attention.sliding_window_pattern"
  value = keys.values.get(key)
  if isinstance(value, np.ndarray):
    keys.used.add(key)
    if value.dtype != np.bool_ or len(value) != layers:
      keys.problems.append(
        f"{keys.prefix}{key} is {_short(value)}: expected {layers} booleans, one for each layer"
      )
    return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in value]}
  if default is None:
    keys.expect(key, 2)
    return {}
  return keys.read((("sliding_window_pattern", key, _count, default),))


def _scaling(keys: _Keys) -> dict[str, Any] | None:
  """config.json's `rope_scaling`, from the keys `rope.scaling.*`; None without scaling."""
  keys.used |= {_SCALING_TYPE, _SCALING_FACTOR}
  # A file with a factor but no type means linear scaling.
  kind = keys.values.get(_SCALING_TYPE, "linear" if _SCALING_FACTOR in keys.values else "none")
  if not isinstance(kind, str) or kind not in _SCALINGS:
    keys.problems.append(
      f"{keys.prefix}{_SCALING_TYPE} is {_short(kind)}, which is not implemented; "
      f"implemented are {', '.join(_SCALINGS)}"
    )
    return None
  found = keys.read(_SCALINGS[kind])
  if "attention_factor" in found and "factor" in found:
    found["attention_factor"] *= 0.1 * math.log(found["factor"]) + 1
  return {"rope_type": kind, **found} if kind != "none" else None


def _published(divisors: list[float], theta: float) -> dict[str, Any] | None:
  """The scaling of Llama 3.1 (by 8) or 3.2 (by 32), if these are its divisors, up to rounding; None otherwise."""
  frequencies = theta ** -(np.arange(len(divisors)) / max(1, len(divisors)))
  for factor in (8.0, 32.0):
    scaling = Llama3Scaling(factor, 1.0, 4.0, 8192)
    if divisors and np.allclose(frequencies / scaling.scale(frequencies), divisors, rtol=1e-5, atol=0):
      return write_scaling(scaling)
  return None


def _factors(checkpoint: Checkpoint, info: TensorInfo, head_dim: int, keys: _Keys) -> list[float]:
  """Reads the numbers of the tensor rope_freqs.weight. Notes a problem, if there is one."""
  if info.dtype != np.float32 or info.codec is not None or info.shape != (head_dim // 2,):
    keys.problems.append(
      f"the tensor rope_freqs.weight is {info.codec.name if info.codec else info.dtype} of shape {info.shape}, "
      f"expected float32 of shape ({head_dim // 2},)"
    )
    return []
  data = checkpoint.files.read(info.file, info.start, info.stop)
  factors = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
  if factors.shape != info.shape or not np.all(np.isfinite(factors) & (factors > 0)):
    keys.problems.append("the tensor rope_freqs.weight must hold finite positive numbers alone")
  return [float(f) for f in factors]
