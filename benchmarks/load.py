"""Loads one checkpoint three ways, in turns: a plain read of its bytes, models_automodel, and google-tunix's own loader.

Each measurement is a fresh process that first touches more memory than it will need (a page that a machine touches
for the first time can cost ten times a warm one), reads the files once into the page cache, and imports what it uses.
Then the clock runs from the call to the last array that is ready. A second clock reads every byte of the result once,
so that a loader that only maps its files pays for it in sight. Values are compared with the file's each time.
"""

import argparse
import json
import math
import mmap
import os
import pathlib
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

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
  n, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
  layer = {
    "input_layernorm": (d,),
    "self_attn.q_proj": (n, d),
    "self_attn.k_proj": (k, d),
    "self_attn.v_proj": (k, d),
    "self_attn.o_proj": (d, n),
    "post_attention_layernorm": (d,),
    "mlp.gate_proj": (f, d),
    "mlp.up_proj": (f, d),
    "mlp.down_proj": (d, f),
  }
  table = {"model.embed_tokens.weight": (config["vocab_size"], d)}
  for i in range(config["num_hidden_layers"]):
    table |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
  return table | {"model.norm.weight": (d,)}


def write(directory: pathlib.Path, config: dict, align: int, shard_bytes: int = 400 * 10**6) -> None:
  """Writes config.json, bf16 shards of random weights and their index. Data starts at an odd multiple of `align` bytes."""
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  for name, shape in shapes(config).items():
    if shards[-1] and sum(map(math.prod, [*shards[-1].values(), shape])) * 2 > shard_bytes:
      shards.append({})
    shards[-1][name] = shape
  directory.mkdir(parents=True, exist_ok=True)
  random = np.random.default_rng(0)
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shard.items():
      size = math.prod(shape) * 2
      header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
      end += size
      weight_map[name] = file
    total += end
    text = json.dumps(header).encode()
    # An odd multiple, so that the data is never better aligned than it is said to be.
    text += b" " * ((align - 8 - len(text)) % (2 * align))
    with open(directory / file, "wb") as f:
      f.write(struct.pack("<Q", len(text)) + text)
      for shape in shard.values():
        values = random.standard_normal(math.prod(shape), np.float32)
        values *= config["initializer_range"]
        f.write((values.view(np.uint32) >> 16).astype(np.uint16))  # bf16 is a float32's upper half
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  (directory / "config.json").write_text(
    json.dumps(config, indent=2)
  )  # last: it says that the rest is complete


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
# Each function imports what it needs and returns the call to be timed; the result of that call maps
# a checkpoint's name and array to the loaded array, in the shape of the checkpoint's.


def plain_read(directory: pathlib.Path) -> Callable:
  """The bytes of all files into anonymous memory, by readinto: what any loader must at least do."""

  def load() -> Callable:
    arena = mmap.mmap(-1, size_of(directory), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view, start, starts = memoryview(arena), 0, {}
    for file in files(directory):
      starts[file.name] = start
      with open(file, "rb", buffering=0) as f:
        while count := f.readinto(view[start:]):
          start += count
    assert start == size_of(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]

    def get(name: str, shape: tuple[int, ...]) -> np.ndarray:
      start = starts[index[name]]
      (length,) = struct.unpack("<Q", view[start : start + 8])
      offsets = json.loads(bytes(view[start + 8 : start + 8 + length]))[name]["data_offsets"]
      begin, end = (start + 8 + length + offset for offset in offsets)
      return np.frombuffer(view[begin:end], np.uint16).reshape(shape)

    return get

  return load


def one_device_mesh():
  """A mesh of the first device, with the axis names of both libraries' defaults."""
  import jax

  return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def ready(model) -> None:
  """Waits for every array of a model."""
  import jax
  from flax import nnx

  jax.block_until_ready(nnx.state(model))


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


def models_automodel(directory: pathlib.Path) -> Callable:
  """This workspace's AutoModel."""
  import models_llama.llama3  # noqa: F401  (AutoModel imports a family when it is asked for)
  from models_automodel import AutoModel

  mesh = one_device_mesh()

  def load() -> Callable:
    model, _ = AutoModel.from_pretrained(str(directory), mesh)
    ready(model)
    # In memory as in the file: at most one axis is seen as two.
    return lambda name, shape: parameter(model, path_of(name, 0)).reshape(shape)

  return load


def google_tunix(directory: pathlib.Path) -> Callable:
  """google-tunix's loader, as its AutoModel calls it."""
  from tunix.models.llama3 import model as model_lib
  from tunix.models.llama3 import params

  config = json.loads((directory / "config.json").read_text())
  mesh = one_device_mesh()

  def load() -> Callable:
    model = params.create_model_from_safe_tensors(
      str(directory),
      model_lib.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=int(config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
      ),
      mesh,
    )
    ready(model)

    def get(name: str, shape: tuple[int, ...]) -> np.ndarray:
      values = parameter(model, path_of(name, 1))
      # Every projection is turned; the embedding and the norms are not.
      return values if name.removesuffix(".weight") in TOP_NAMES else values.reshape(shape[::-1]).T

    return get

  return load


VARIANTS = {
  "plain read": plain_read,
  "models-automodel": models_automodel,
  "google-tunix": google_tunix,
}


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
  """Has the machine hand out this much memory, and gives it back."""
  memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
  pages[:] = 1
  del pages
  memory.close()


def measure(variant: str, directory: pathlib.Path) -> dict[str, float]:
  """Seconds to load, of the clock and of all cores; seconds to read the result once; peak of anonymous memory over the files' size."""
  size = size_of(directory)
  load = VARIANTS[variant](directory)
  for file in files(directory):
    with open(file, "rb", buffering=0) as f:
      while f.read(MIB):
        pass
  touch(2 * size)  # last, so that the same pages are handed out again
  peak = PeakMemory()
  peak.start()
  start, cpu = time.perf_counter(), time.process_time()
  get = load()
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  more = peak.more
  table = shapes(json.loads((directory / "config.json").read_text()))
  start = time.perf_counter()
  for name, shape in table.items():
    np.bitwise_xor.reduce(flat(get(name, shape)))
  reading = time.perf_counter() - start
  check(get, directory, table)
  return {"load": seconds, "cpu": cpu, "first read": reading, "peak": more / size}


def flat(array: np.ndarray) -> np.ndarray:
  """All values in the order in which they lie in memory."""
  return (array if array.flags.c_contiguous else array.T).reshape(-1)


def check(get: Callable, directory: pathlib.Path, table: dict[str, tuple[int, ...]]) -> None:
  """Compares every tensor with the file's: each 61st row, and the last."""
  seen = set()
  for name, wanted in tensors(directory):
    got = get(name, wanted.shape)
    if (
      got.shape != table[name]
      or not np.array_equal(got[::61], wanted[::61])
      or not np.array_equal(got[-1], wanted[-1])
    ):
      sys.exit(f"{name}: the loaded values are not the file's")
    seen.add(name)
  if seen != table.keys():
    sys.exit(f"the files lack {sorted(table.keys() - seen)}")


# --- The comparison --------------------------------------------------------------------------------------------


def run(variant: str, directory: pathlib.Path) -> dict[str, float]:
  """One measurement in a fresh process."""
  command = [sys.executable, __file__, "--directory", str(directory), "--measure", variant]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  if done.returncode:
    sys.exit(f"{variant} failed with exit code {done.returncode}")
  return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, list[dict[str, float]]]) -> None:
  """One line a variant: medians and minima, and the ratio of minima to the plain read's."""
  fastest = {variant: min(r["load"] for r in rows) for variant, rows in results.items()}
  base = fastest.get("plain read")
  titles = ("median s", "min s", "/ plain", "min cpu s", "min + first read s", "peak / file")
  print(f"{'':18}" + "".join(f"{title:>{len(title) + 2}}" for title in titles))
  for variant, rows in results.items():
    cells = (
      f"{statistics.median(r['load'] for r in rows):.3f}",
      f"{fastest[variant]:.3f}",
      f"{fastest[variant] / base:.2f}" if base else "-",
      f"{min(r['cpu'] for r in rows):.3f}",
      f"{min(r['load'] + r['first read'] for r in rows):.3f}",
      f"{max(r['peak'] for r in rows):.2f}",
    )
    print(f"{variant:18}" + "".join(f"{c:>{len(t) + 2}}" for c, t in zip(cells, titles, strict=True)))


def main() -> None:
  """Makes the checkpoint where it is missing, measures in turns, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--directory", type=pathlib.Path, help="where the checkpoint is kept; else it is temporary"
  )
  parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
  parser.add_argument(
    "--align", type=int, default=8, help="bytes; 8 as the safetensors library writes, 64 to be mapped"
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
  parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.measure, args.directory)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    directory = args.directory or pathlib.Path(temporary)
    if not (directory / "config.json").exists():
      write(directory, CONFIG | {"num_hidden_layers": args.layers}, args.align)
    count, size = len(files(directory)), size_of(directory) / 10**9
    cores = os.cpu_count()
    print(
      f"{size:.3f} GB in {count} files; {platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}"
    )
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in args.variants}
    for number in range(args.rounds):
      for variant in args.variants:
        results[variant].append(run(variant, directory))
        seconds = results[variant][-1]["load"]
        print(f"round {number + 1}, {variant}: {seconds:.3f} s", file=sys.stderr)
    report(results)


if __name__ == "__main__":
  main()
