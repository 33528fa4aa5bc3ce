"""Loads checkpoints of several kinds, with each library in turns, beside the floor: a plain read into huge pages.

Each measurement is a fresh process that first touches more memory than it will need (a page that a machine touches
for the first time can cost ten times a warm one), reads the files once into the page cache, or drops them from it, and
imports what it uses. Then the clock runs from the call to the last array that is ready. A second clock reads every byte
of the result once, so that a loader that only maps its files pays for it in sight. This pass combines all values by
exclusive or, which must give what the files' tensors give: in whatever order and layout a library keeps them.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import mmap
import os
import pathlib
import platform
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import floor
import numpy as np

MIB = 2**20
# meta-llama/Llama-3.2-1B's config.json, with fewer layers: a layer is 122 MB, the embedding 525 MB.
CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 128000,
  "eos_token_id": 128001,
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 4,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.45.0.dev0",
  "use_cache": True,
  "vocab_size": 128256,
}
# A dense model of 290 tensors, and one whose tensors are nearly all experts.
DENSE = CONFIG | {
  "hidden_size": 1024,
  "intermediate_size": 3584,
  "num_attention_heads": 16,
  "num_hidden_layers": 32,
  "vocab_size": 49152,
}
MOE = {
  "architectures": ["Qwen3MoeForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "decoder_sparse_step": 1,
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "max_position_embeddings": 40960,
  "mlp_only_layers": [],
  "model_type": "qwen3_moe",
  "moe_intermediate_size": 384,
  "norm_topk_prob": True,
  "num_attention_heads": 16,
  "num_experts": 64,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 14,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "vocab_size": 32768,
}
# checkpoint name -> (path in models_llama, path in google-tunix)
LAYER_NAMES = {
  "input_layernorm": ("input_layernorm.w", "input_layernorm.w"),
  "self_attn.q_proj": ("attn.q_proj.w", "attn.q_proj.w"),
  "self_attn.k_proj": ("attn.k_proj.w", "attn.k_proj.w"),
  "self_attn.v_proj": ("attn.v_proj.w", "attn.v_proj.w"),
  "self_attn.o_proj": ("attn.o_proj.w", "attn.o_proj.w"),
  "post_attention_layernorm": ("post_attention_layernorm.w", "post_attention_layernorm.w"),
  "mlp.gate_proj": ("mlp.gate_proj.w", "mlp.gate_proj.kernel"),
  "mlp.up_proj": ("mlp.up_proj.w", "mlp.up_proj.kernel"),
  "mlp.down_proj": ("mlp.down_proj.w", "mlp.down_proj.kernel"),
}
TOP_NAMES = {"model.embed_tokens": "embedder.input_embedding", "model.norm": "final_norm.w"}


# --- The checkpoint --------------------------------------------------------------------------------------------


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
  """Names and shapes of all tensors, in the order of the file."""
  d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
  experts = config.get("num_experts", 0)
  n, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
  layer = {
    "input_layernorm": (d,),
    "self_attn.q_proj": (n, d),
    "self_attn.k_proj": (k, d),
    "self_attn.v_proj": (k, d),
    "self_attn.o_proj": (d, n),
    "post_attention_layernorm": (d,),
  }
  if experts:
    f = config["moe_intermediate_size"]
    layer |= {"self_attn.q_norm": (h,), "self_attn.k_norm": (h,), "mlp.gate": (experts, d)}
  for block in [f"mlp.experts.{i}" for i in range(experts)] or ["mlp"]:
    layer |= {f"{block}.gate_proj": (f, d), f"{block}.up_proj": (f, d), f"{block}.down_proj": (d, f)}
  table = {"model.embed_tokens.weight": (config["vocab_size"], d)}
  for i in range(config["num_hidden_layers"]):
    table |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
  return table | {"model.norm.weight": (d,)}


def write(directory: pathlib.Path, config: dict, align: int, shard_bytes: int = 400 * 10**6) -> None:
  """Writes config.json, bf16 shards of random weights and their index."""
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  for name, shape in shapes(config).items():
    if shards[-1] and sum(map(math.prod, [*shards[-1].values(), shape])) * 2 > shard_bytes:
      shards.append({})
    shards[-1][name] = shape
  random = np.random.default_rng(0)

  def weight(shape: tuple[int, ...]) -> np.ndarray:
    return bfloat16(random.standard_normal(shape, np.float32) * np.float32(config["initializer_range"]))

  write_shards(
    directory, config, align, [{n: ("BF16", shape) for n, shape in s.items()} for s in shards], weight
  )


def write_shards(
  directory: pathlib.Path,
  config: dict,
  align: int,
  shards: list[dict[str, tuple[str, tuple[int, ...]]]],
  values: Callable[..., np.ndarray],
) -> None:
  """Writes files, their index and config.json. Data starts at an odd multiple of `align` bytes.

  Args:
    directory: is made.
    config: for config.json.
    align: bytes.
    shards: of each file, the names of its tensors with their types, as safetensors calls them, and shapes.
    values: makes a tensor of a shape, or of a shape and a type where tensors have several.
  """
  directory.mkdir(parents=True, exist_ok=True)
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, shape) in shard.items():
      size = math.prod(shape) * ITEMSIZE[kind]
      header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
      end += size
      weight_map[name] = file
    total += end
    text = json.dumps(header).encode()
    # An odd multiple, so that the data is never better aligned than it is said to be.
    text += b" " * ((align - 8 - len(text)) % (2 * align))
    with open(directory / file, "wb") as f:
      f.write(struct.pack("<Q", len(text)) + text)
      for kind, shape in shard.values():
        f.write(np.ascontiguousarray(values(shape) if kind == "BF16" else values(shape, kind)))
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  (directory / "config.json").write_text(
    json.dumps(config, indent=2)
  )  # last: it says that the rest is complete


ITEMSIZE = {"BF16": 2, "F8_E4M3": 1, "I32": 4, "I64": 8}


def bfloat16(values: np.ndarray) -> np.ndarray:
  """The upper halves of float32 values, which are bf16."""
  return (values.view(np.uint32) >> 16).astype(np.uint16)


def tensors(directory: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """Each tensor of the files as uint16, by a reader of this script's own."""
  for file in files(directory):
    with open(file, "rb") as f:
      (length,) = struct.unpack("<Q", f.read(8))
      header = json.loads(f.read(length))
    data = np.memmap(file, np.uint8, "r", 8 + length)
    for name, entry in header.items():
      if name != "__metadata__":
        start, stop = entry["data_offsets"]
        yield name, data[start:stop].view(np.uint16).reshape(entry["shape"])


def files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The shards."""
  return sorted(directory.glob("*.safetensors"))


def size_of(directory: pathlib.Path) -> int:
  """Bytes of all shards."""
  return sum(file.stat().st_size for file in files(directory))


# --- The ways to load ------------------------------------------------------------------------------------------
# Each function imports what it needs and returns the call to be timed, which returns the loaded arrays.


def one_device_mesh():
  """A mesh of the first device, with the axis names of both libraries' defaults."""
  return mesh_of(1)


def mesh_of(devices: int):
  """A mesh of one device, or of (2, devices / 2)."""
  import jax

  shape = (1, 1) if devices == 1 else (2, devices // 2)
  return jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(shape), ("fsdp", "tp"))


def ready(model) -> list:
  """Waits for every array of a model, and returns all."""
  import jax
  from flax import nnx

  return jax.block_until_ready(jax.tree.leaves(nnx.state(model)))


def parameter(model, path: str) -> np.ndarray:
  """A parameter's values, not copied where the array lies in this process's memory."""
  for step in path.split("."):
    model = model[int(step)] if step.isdecimal() else getattr(model, step)
  return np.asarray(model[...]).view(np.uint16)


def path_of(name: str, which: int) -> str:
  """The parameter that holds a checkpoint's tensor."""
  name = name.removesuffix(".weight")
  if name in TOP_NAMES:
    return TOP_NAMES[name]
  layer, _, rest = name.removeprefix("model.layers.").partition(".")
  return f"layers.{layer}.{LAYER_NAMES[rest][which]}"


def models_automodel(directory: pathlib.Path, devices: int, dtype: str | None) -> Callable[[], list]:
  """This workspace's AutoModel."""
  # AutoModel imports a family when it is asked for.
  import models_llama.llama3  # noqa: F401
  import models_qwen.qwen3  # noqa: F401
  from models_automodel import AutoModel

  mesh = mesh_of(devices)
  return lambda: ready(AutoModel.from_pretrained(str(directory), mesh, dtype=dtype, progress=False)[0])


def google_tunix(directory: pathlib.Path, devices: int, dtype: str | None) -> Callable[[], list]:
  """google-tunix's loader, as its AutoModel calls it."""
  import jax.numpy as jnp

  config = json.loads((directory / "config.json").read_text())
  fields = {
    "num_layers": config["num_hidden_layers"],
    "vocab_size": config["vocab_size"],
    "embed_dim": config["hidden_size"],
    "hidden_dim": config.get("moe_intermediate_size", config["intermediate_size"]),
    "num_heads": config["num_attention_heads"],
    "head_dim": config["head_dim"],
    "num_kv_heads": config["num_key_value_heads"],
    "rope_theta": int(config["rope_theta"]),
    "norm_eps": config["rms_norm_eps"],
  }
  if "num_experts" in config:
    from tunix.models.qwen3 import model, params

    fields |= {name: config[name] for name in ("num_experts", "num_experts_per_tok")}
    fields["use_tied_embedding"] = config["tie_word_embeddings"]
  else:
    from tunix.models.llama3 import model, params

    fields["weight_tying"] = config["tie_word_embeddings"]
  mesh = mesh_of(devices)
  wanted = None if dtype is None else jnp.dtype(dtype)
  return lambda: ready(
    params.create_model_from_safe_tensors(str(directory), model.ModelConfig(**fields), mesh, dtype=wanted)
  )


def safetensors_jax(directory: pathlib.Path, devices: int, dtype: str | None) -> Callable[[], list]:
  """The safetensors library alone: its files as JAX arrays, without a model, on one device."""
  import jax
  from safetensors.flax import load_file

  def load() -> list:
    arrays = [array for file in files(directory) for array in load_file(file).values()]
    return jax.block_until_ready([array.astype(dtype) if dtype else array for array in arrays])

  return load


def transformers_torch(directory: pathlib.Path, devices: int, dtype: str | None) -> Callable[[], list]:
  """transformers' AutoModelForCausalLM, as torch tensors."""
  import torch
  import transformers

  wanted = torch.float32 if dtype == "float32" else torch.bfloat16
  is_fp8 = "quantization_config" in json.loads((directory / "config.json").read_text())
  decoded = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if is_fp8 else {}

  def load() -> list:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=wanted, **decoded)
    return [p.detach().view(torch.int32 if dtype else torch.int16).numpy() for p in model.parameters()]

  return load


# --- The checkpoints -------------------------------------------------------------------------------------------


def write_dense(directory: pathlib.Path, align: int) -> None:
  """The dense model as safetensors."""
  write(directory, DENSE, align)


def write_moe(directory: pathlib.Path, align: int) -> None:
  """The model of experts as safetensors."""
  write(directory, MOE, align)


def write_fp8(directory: pathlib.Path, align: int) -> None:
  """The dense model in FP8 with a scale for each block of 128 x 128, as Qwen and DeepSeek publish theirs."""
  said = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
  }

  def parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    blocks = tuple(-(-size // 128) for size in shape)
    return {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("BF16", blocks)}

  write_quantised(directory, align, said, parts)


def write_w4a16(directory: pathlib.Path, align: int) -> None:
  """The dense model in 4 bits with a scale for 128 columns, as llm-compressor writes it."""
  weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
  said = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
  }

  def parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
      f"{name}_packed": ("I32", (shape[0], shape[1] // 8)),
      f"{name}_scale": ("BF16", (shape[0], shape[1] // 128)),
      f"{name}_shape": ("I64", (2,)),
    }

  write_quantised(directory, align, said, parts)


def write_quantised(
  directory: pathlib.Path, align: int, said: dict, parts: Callable[[str, tuple[int, ...]], dict]
) -> None:
  """The dense model with quantised projections, in one file. `parts` are the tensors of one."""
  random = np.random.default_rng(0)
  shard: dict[str, tuple[str, tuple[int, ...]]] = {}
  stated = {}
  for name, shape in shapes(DENSE).items():
    is_plain = len(shape) == 1 or "embed" in name
    shard |= {name: ("BF16", shape)} if is_plain else parts(name, shape)
    stated[f"{name}_shape"] = shape
  of_shape = iter([stated[name] for name, (kind, _) in shard.items() if kind == "I64"])

  def values(shape: tuple[int, ...], kind: str = "BF16") -> np.ndarray:
    match kind:
      case "F8_E4M3":
        return random.integers(0, 0x7F, shape, np.uint8) | random.integers(0, 2, shape, np.uint8) << 7
      case "I32":
        return random.integers(-(2**31), 2**31, shape, np.int32)
      case "I64":
        return np.array(next(of_shape), np.int64)
      case _:
        return bfloat16(random.uniform(0.5, 1, shape).astype(np.float32) * np.float32(0.001))

  config = DENSE | {"quantization_config": said}
  write_shards(directory, config, align, [shard], values)


def write_tree(directory: pathlib.Path, align: int) -> None:
  """The dense model as an Orbax tree, as MaxText writes one."""
  from models_automodel.convert import convert

  with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
    write_dense(pathlib.Path(temporary), align)
    convert(temporary, directory, to="maxtext", progress=False)


def write_gguf(directory: pathlib.Path, align: int) -> None:
  """The dense model's shapes as GGUF: random blocks of Q8_0."""
  import gguf

  directory.mkdir(parents=True)
  writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
  writer.add_block_count(DENSE["num_hidden_layers"])
  writer.add_context_length(DENSE["max_position_embeddings"])
  writer.add_embedding_length(DENSE["hidden_size"])
  writer.add_feed_forward_length(DENSE["intermediate_size"])
  writer.add_head_count(DENSE["num_attention_heads"])
  writer.add_head_count_kv(DENSE["num_key_value_heads"])
  writer.add_rope_dimension_count(DENSE["head_dim"])
  writer.add_layer_norm_rms_eps(DENSE["rms_norm_eps"])
  writer.add_rope_freq_base(DENSE["rope_theta"])
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, DENSE["num_hidden_layers"])
  random = np.random.default_rng(0)
  for name, shape in shapes(DENSE).items():
    found = names.get_name(name, (".weight",))
    if len(shape) == 1:
      writer.add_tensor(found, np.ones(shape, np.float32))
      continue
    blocks = random.integers(0, 256, (math.prod(shape) // 32, 34), np.uint8)
    blocks[:, :2] = np.full((len(blocks), 1), 0.01, np.float16).view(np.uint8)
    writer.add_tensor(found, blocks.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


PEERS = {
  "models-automodel": models_automodel,
  "google-tunix": google_tunix,
  "safetensors": safetensors_jax,
  "transformers": transformers_torch,
}
# Of each row of a table: who writes the checkpoint, the folder that keeps it, the dtype asked for, who loads it.
CHECKPOINTS = {
  "dense": (write_dense, "dense", None, list(PEERS)),
  "moe": (write_moe, "moe", None, list(PEERS)),
  "cast": (write_dense, "dense", "float32", list(PEERS)),
  "orbax": (write_tree, "orbax", None, ["models-automodel"]),
  "gguf": (write_gguf, "gguf", "bfloat16", ["models-automodel"]),
  "fp8": (write_fp8, "fp8", None, ["models-automodel", "transformers"]),
  "w4a16": (write_w4a16, "w4a16", None, ["models-automodel"]),
}
# Libraries that load onto one device alone.
ONE_DEVICE = ("safetensors", "transformers")


# --- One measurement, in a process of its own ------------------------------------------------------------------


class PeakMemory(threading.Thread):
  """Samples this process's anonymous memory (RssAnon); `more` is the most that it grew by, in bytes."""

  def __init__(self, interval: float = 0.002):
    super().__init__(daemon=True)
    self.interval, self.done = interval, threading.Event()
    self.before = self.most = self.now()

  @staticmethod
  def now() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

  def run(self) -> None:
    while not self.done.wait(self.interval):
      self.most = max(self.most, self.now())

  @property
  def more(self) -> int:
    self.done.set()
    self.join()
    return max(self.most, self.now()) - self.before


def touch(size: int) -> None:
  """Has the machine hand out this much memory in huge pages, and gives it back.

  What ran before leaves small pages, which the system joins at the first request for huge ones.
  """
  memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  with contextlib.suppress(AttributeError, OSError):
    memory.madvise(mmap.MADV_HUGEPAGE)
  pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
  pages[:] = 1
  del pages
  memory.close()


def settle(directory: pathlib.Path, cold: bool) -> int:
  """Puts all files of a folder into the page cache, or out of it. Returns their bytes."""
  size = 0
  for file in directory.rglob("*"):
    if not file.is_file():
      continue
    size += file.stat().st_size
    with open(file, "rb", buffering=0) as f:
      if cold:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
      while not cold and f.read(MIB):
        pass
  return size


def measure(kind: str, variant: str, directory: pathlib.Path, devices: int, cold: bool) -> dict[str, float]:
  """Seconds to load, of the clock and of all cores; seconds to read the result once; page faults; peak of anonymous memory."""
  _, _, dtype, _ = CHECKPOINTS[kind]
  load = None if variant == "floor" else PEERS[variant](directory, devices, dtype)
  size = settle(directory, cold)
  touch(2 * size)  # so that the same pages are handed out again
  if cold:
    settle(directory, cold)
  if load is None:
    seconds = floor.read(directory)
    return {"load": seconds, "cpu": 0, "first read": 0, "peak": 1, "faults": 0, "bytes": size}
  # What imports leave is collected now: else it falls to whichever load makes enough objects.
  gc.collect()
  peak = PeakMemory()
  peak.start()
  faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  start, cpu = time.perf_counter(), time.process_time()
  arrays = load()
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
  more, nbytes = peak.more, sum(array.nbytes for array in arrays)
  start = time.perf_counter()
  values = combined(arrays)
  reading = time.perf_counter() - start
  # Blocks are decoded: no bits are those of the file.
  if kind in ("dense", "moe", "cast") and values != combined(array for _, array in tensors(directory)):
    sys.exit(f"{variant}: the loaded values are not the file's")
  return {
    "load": seconds,
    "cpu": cpu,
    "first read": reading,
    "peak": more / nbytes,
    "faults": faults / nbytes * 1e9,
    "bytes": size,
  }


def combined(arrays) -> int:
  """All values as bfloat16, combined by exclusive or."""
  found = 0
  for array in arrays:
    bits = flat(np.asarray(array))
    bits = bits.view(np.uint32) >> 16 if bits.itemsize == 4 else bits.view(np.uint16)
    found ^= int(np.bitwise_xor.reduce(bits))
  return found


def flat(array: np.ndarray) -> np.ndarray:
  """All values in the order in which they lie in memory."""
  return (array if array.flags.c_contiguous else array.T).reshape(-1)


# --- The comparison --------------------------------------------------------------------------------------------


def run(kind: str, variant: str, directory: pathlib.Path, devices: int, cold: bool) -> dict[str, float]:
  """One measurement in a fresh process."""
  command = [sys.executable, __file__, "--directory", str(directory), "--measure", kind, variant]
  command += ["--devices", str(devices), *(["--cold"] if cold else [])]
  env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | env)
  if done.returncode:
    sys.exit(f"{kind}, {variant}: failed with exit code {done.returncode}")
  return json.loads(done.stdout.splitlines()[-1])


TITLES = (
  "GB", "median s", "min s", "/ floor", "x slower than ours", "min cpu s", "min + first read s", "peak", "faults / GB"
)  # fmt: skip


def report(results: dict[tuple[str, int], dict[str, list[dict[str, float]]]]) -> None:
  """A Markdown table, one line a variant; ratios are of medians of one run."""
  print("| checkpoint | devices | variant | " + " | ".join(TITLES) + " |")
  print("|---" * (len(TITLES) + 3) + "|")
  for (kind, devices), variants in results.items():
    median = {name: statistics.median(r["load"] for r in rows) for name, rows in variants.items()}
    ours = median.get("models-automodel")
    for name, rows in variants.items():
      cells = (
        f"{rows[0]['bytes'] / 1e9:.2f}",
        f"{median[name]:.3f}",
        f"{min(r['load'] for r in rows):.3f}",
        f"{median[name] / median['floor']:.2f}",
        f"{median[name] / ours:.1f}" if ours else "-",
        f"{min(r['cpu'] for r in rows):.3f}",
        f"{min(r['load'] + r['first read'] for r in rows):.3f}",
        f"{max(r['peak'] for r in rows):.2f}",
        f"{max(r['faults'] for r in rows):,.0f}",
      )
      print(f"| {kind} | {devices} | {name} | " + " | ".join(cells) + " |")


def installed(variant: str) -> bool:
  """Whether the libraries of a variant are installed."""
  module = {"google-tunix": "tunix", "transformers": "torch", "safetensors": "safetensors"}.get(variant)
  return module is None or importlib.util.find_spec(module) is not None


def main() -> None:
  """Makes the checkpoints where they are missing, measures in turns, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--directory", type=pathlib.Path, help="where the checkpoints are kept; else it is temporary"
  )
  parser.add_argument(
    "--align", type=int, default=8, help="bytes; 8 as the safetensors library writes, 64 to be mapped"
  )
  parser.add_argument("--checkpoints", nargs="+", default=list(CHECKPOINTS), choices=CHECKPOINTS)
  parser.add_argument("--devices", nargs="+", type=int, default=[1, 8], choices=[1, 8])
  parser.add_argument("--variants", nargs="+", default=list(PEERS), choices=PEERS)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
  parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(*args.measure, args.directory, args.devices[0], args.cold)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    root = args.directory or pathlib.Path(temporary)
    load = os.getloadavg()[0]
    print(
      f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, {'cold' if args.cold else 'warm'}\n"
    )
    results: dict[tuple[str, int], dict[str, list[dict[str, float]]]] = {}
    for kind in args.checkpoints:
      make, folder, _, variants = CHECKPOINTS[kind]
      if not (root / folder).exists():
        make(root / folder, args.align)
      for devices in args.devices:
        names = ["floor", *(name for name in variants if name in args.variants and installed(name))]
        names = [name for name in names if devices == 1 or name not in ONE_DEVICE]
        rows = results.setdefault((kind, devices), {name: [] for name in names})
        for _ in range(args.rounds):
          for name in names:
            rows[name].append(run(kind, name, root / folder, devices, args.cold))
            print(f"{kind}, {devices}, {name}: {rows[name][-1]['load']:.3f} s", file=sys.stderr)
    report(results)


if __name__ == "__main__":
  main()
