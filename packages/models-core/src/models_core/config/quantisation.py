"""How quantised checkpoints are recognised: by what their configuration states, and by the tensors that they hold.

The tensors decide whether weights are quantised. A configuration may outlive the quantisation that it describes, as
after a merge of adapters in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from models_core.formats import Files, read_json

_CONFIG = "config.json"
# Keys of config.json that describe a quantisation.
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
# Other files that do, and the key in them that holds the description; None is the whole file.
_FILES: Mapping[str, str | None] = {
  "hf_quant_config.json": "quantization",
  "quantize_config.json": None,
  "quant_config.json": None,
}


@dataclasses.dataclass(frozen=True)
class Scheme:
  """A library, or a format, of quantised weights.

  Attributes:
    name: as messages call it.
    methods: values of `quant_method` that state it.
    marks: last parts of the names of tensors that only this scheme has.
    on_floats: whether models of this scheme differ from plain ones even if their weights are stored as floats.
  """

  name: str
  methods: tuple[str, ...]
  marks: tuple[str, ...] = ()
  on_floats: bool = False


# fmt: off
SCHEMES = (
  #      name                     quant_method                             tensors
  Scheme("bitsandbytes",          ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
                                  ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes__nf4",
                                   "bitsandbytes__fp4", "SCB", "weight_format")),
  Scheme("compressed-tensors",    ("compressed-tensors",),                 ("weight_packed", "weight_shape", "weight_global_scale",
                                                                            "input_global_scale", "weight_g_idx", "compressed", "bitmask")),
  Scheme("NVIDIA ModelOpt",       ("modelopt", "modelopt_fp4", "modelopt_mixed"),
                                  ("weight_scale_2", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")),
  Scheme("FP8 blocks",            ("fp8",),                                ("weight_scale_inv", "qscale_weight", "activation_scale",
                                                                            "gate_up_proj_scale_inv", "down_proj_scale_inv")),
  Scheme("FBGEMM FP8",            ("fbgemm_fp8",),                         ("input_scale_ub",)),
  Scheme("AWQ",                   ("awq",)),
  Scheme("GPTQ",                  ("gptq",),                               ("g_idx",)),
  Scheme("AutoRound",             ("auto-round", "intel/auto-round")),
  Scheme("GPTQ or AWQ",           (),                                      ("qweight", "qzeros")),
  Scheme("MXFP4",                 ("mxfp4",),                              ("gate_up_proj_blocks", "gate_up_proj_scales",
                                                                            "down_proj_blocks", "down_proj_scales")),
  Scheme("HQQ",                   ("hqq",),                                ("W_q",)),
  Scheme("Quanto",                ("quanto",),                             ("_data", "_scale")),
  Scheme("torchao",               ("torchao",),                            ("_weight_qdata", "_weight_scale", "_weight_zero_point")),
  Scheme("AQLM",                  ("aqlm",),                               ("codes", "codebooks")),
  Scheme("EETQ",                  ("eetq",),                               ("weight_scales",)),
  Scheme("ExLlama",               ("exl2", "exl3"),                        ("q_weight", "q_scale", "q_groups", "q_invperm", "trellis", "suh", "svh")),
  Scheme("HIGGS",                 ("higgs",),                              ("tables2",)),
  Scheme("SpQR",                  ("spqr",),                               ("dense_weights", "buff0")),
  Scheme("VPTQ",                  ("vptq",),                               ("centroids", "indices")),
  Scheme("AMD Quark",             ("quark",)),
  Scheme("BitNet",                ("bitnet",), on_floats=True),
  Scheme("FP-Quant",              ("fp_quant",),                           ("dqweight", "forward_hadamard_matrix"), on_floats=True),
  Scheme("MLX",                   ("mlx",),                                ("biases",)),
)
# fmt: on

# Last parts of names that several schemes share: numbers that belong to weights in 8 bits or fewer.
_SHARED = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "output_scale", "scales")

_REMEDY = "load the unquantised repository or a GGUF file"


@dataclasses.dataclass(frozen=True)
class Stated:
  """What a checkpoint's files state about its quantisation.

  Attributes:
    place: file and key of the statement.
    method: as the statement calls it; None if it names none.
    scheme: of the method; None if it is not known.
    described: the statement itself; empty if it is a name alone.
  """

  place: str
  method: str | None
  scheme: Scheme | None
  described: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """What messages call the quantisation."""
    return self.scheme.name if self.scheme else self.method or "an unnamed method"

  def __str__(self) -> str:
    return f"{self.place} says that the weights are quantised by {self.name}"


def stated_quantisation(files: Files, raw: Mapping[str, Any] | None = None) -> Stated | None:
  """What a checkpoint's configuration states about its quantisation; None if it states nothing.

  Args:
    files: of the checkpoint.
    raw: config.json, if it has been read.

  Raises:
    ConfigError: if a file that could state it is not a JSON object.
  """
  names = set(files.names())
  places = [(_CONFIG, key) for key in QUANTISATION_KEYS] + list(_FILES.items())
  read: dict[str, Mapping[str, Any]] = {} if raw is None else {_CONFIG: raw}
  for name, key in places:
    if name not in read and name not in names:
      continue
    if name not in read:
      read[name] = read_json(files, name)
    whole = read[name]
    text = whole.get("text_config") if name == _CONFIG else None
    for prefix, level in (("", whole), ("text_config.", text if isinstance(text, Mapping) else {})):
      if found := level if key is None else level.get(key):
        method = _method(name, key, found, whole)
        place = name if key is None else f"{name}: {prefix}{key}"
        scheme = next((one for one in SCHEMES if method in one.methods), None)
        return Stated(place, method, scheme, found if isinstance(found, Mapping) else {})
  return None


def _method(file: str, key: str | None, value: Any, raw: Mapping[str, Any]) -> str | None:
  """The method of a description of a quantisation; None if it names none."""
  if not isinstance(value, Mapping):
    return str(value)
  if isinstance(method := value.get("quant_method"), str):
    return method
  if file == "hf_quant_config.json":
    return "modelopt"
  if value.get("load_in_4bit") or value.get("load_in_8bit"):
    return "bitsandbytes"
  # MLX repeats its description under the other key, without a method.
  if key == "quantization" or raw.get("quantization") == value:
    return "mlx"
  return "compressed-tensors" if key == "compression_config" else None


def scheme_of(tensors: Iterable[str]) -> Scheme | None:
  """The scheme whose marks are among the names of tensors; None if there are none, or only marks that many share."""
  ends = set(map(_end, tensors))
  return next((scheme for scheme in SCHEMES if not ends.isdisjoint(scheme.marks)), None)


def is_mark(tensor: str) -> bool:
  """Whether a tensor's name is that of one which exists only beside quantised weights."""
  return "." in tensor and _end(tensor) in _MARKS


def _end(tensor: str) -> str:
  return tensor.rpartition(".")[2]


_MARKS = frozenset(mark for scheme in SCHEMES for mark in scheme.marks).union(_SHARED)


def quantisation_problem(stated: Stated | None, marks: Iterable[str], narrow: Mapping[str, str]) -> str:
  """The sentence about weights that are quantised.

  Args:
    stated: what the configuration states.
    marks: names of tensors that exist only beside quantised weights.
    narrow: dtypes of weights that are no floating-point numbers, or only beside a scale, by name.
  """
  marks = sorted(marks)
  count, shown = len(marks or narrow), (marks or list(narrow))[0]
  what = f"{count} tensors such as {shown}" if count > 1 else shown
  if not marks:
    what += f" {'are' if count > 1 else 'is'} {narrow[shown]}"
  if not marks and stated is None:
    return (
      f"{what}, and no quantisation is known that says what these integers stand for: weights are floating-point "
      f"numbers; {_REMEDY}"
    )
  scheme = scheme_of(marks)
  name = stated.name if stated is not None else scheme.name if scheme else "an unnamed method"
  if stated is None:
    return (
      f"the weights are quantised by {name} ({what}), but no configuration says how: add the config.json of the "
      f"repository, or {_REMEDY}"
    )
  return f"the weights are quantised by {name} ({stated.place}; {what}), which is not read here: {_REMEDY}"
