"""Mutated headers and indexes: each is read, or refused as a checkpoint error, in no time and no memory."""

import dataclasses
import json
import os
import random
import resource
import struct
import time

import numpy as np
import pytest

from models_core.config.gguf import gguf_config
from models_core.errors import CheckpointError
from models_core.formats.files import LocalFiles
from models_core.formats.gguf import read_gguf
from models_core.formats.safetensors import INDEX, read_safetensors

# A run over many more is the session `fuzz`.
MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "1000"))
SECONDS, KIB = 2.0, 500 * 1024
HUGE = 2**64 - 1
# What a header may hold of JSON, and what it may not.
SPLICES = [b"0", b"9" * 30, b"-", b"e9", b"1.5", b"NaN", b"null", b"true", b",", b'"', b"[", b"]}", b'{"a":', b"\\ud800",
           b"\xff", b"\0", b"../", b"[" * 2000, b'"dtype":"F4"', b'"shape":[0]', b'"data_offsets":[8,0]']  # fmt: skip


@dataclasses.dataclass
class Memory:
  """Files in memory."""

  contents: dict[str, bytes]
  path: str = "memory"

  def names(self):
    return list(self.contents)

  def size(self, name):
    return len(self.contents[name])

  def read(self, name, start, stop):
    return self.contents[name][start:stop]


def mutate(data, limit, rnd, other):
  """One to five changes of the first `limit` bytes: flips, numbers, deletions, insertions, pieces of another file."""
  mutant = bytearray(data)
  for _ in range(rnd.choice([1, 1, 2, 5])):
    at = rnd.randrange(min(limit, len(mutant)) or 1)
    match rnd.randrange(7):
      case 0:
        mutant[at] ^= 1 << rnd.randrange(8)
      case 1:
        mutant[at] = rnd.randrange(256)
      case 2:
        mutant[at : at + 8] = struct.pack("<Q", rnd.choice((0, 1, 2**31, 2**32, 2**63, HUGE, len(mutant))))
      case 3:
        del mutant[at : at + rnd.randrange(1, 9)]
      case 4:
        mutant[at:at] = rnd.choice(SPLICES)
      case 5:
        start = rnd.randrange(len(other))
        mutant[at : at + rnd.choice([0, 30])] = other[start : start + rnd.randrange(60)]
      case 6 if rnd.random() < 0.2:
        del mutant[at:]
    if not mutant:
      break
  return bytes(mutant)


def header_of(content):
  return 8 + struct.unpack("<Q", content[:8])[0]


def safetensors_mutants(save, rnd):
  tensors = {f"model.layers.{i}.w": np.ones((2, 3), kind) for i, kind in enumerate(["f4", "i1", "u2"])}
  good = (save(tensors, metadata={"format": "pt"}) / "model.safetensors").read_bytes()
  other = (save({"b": np.zeros((), bool)}, "other.safetensors") / "other.safetensors").read_bytes()
  limit, data = header_of(good), len(good) - header_of(good)
  for _ in range(MUTANTS):
    mutant = mutate(good, limit, rnd, other)
    if rnd.random() < 0.7:  # Else the stated length is wrong, and nothing else is looked at.
      mutant = struct.pack("<Q", max(0, len(mutant) - 8 - data)) + mutant[8:]
    yield {"model.safetensors": mutant}


def index_mutants(save, rnd):
  shards = {f"m-{i}.safetensors": {f"layers.{i}.w": np.ones(2, np.float32)} for i in range(3)}
  contents = {name: (save(tensors, name) / name).read_bytes() for name, tensors in shards.items()}
  names = {tensor: name for name, tensors in shards.items() for tensor in tensors}
  good = json.dumps({"metadata": {"total_size": 24}, "weight_map": names}).encode()
  for _ in range(MUTANTS):
    yield contents | {INDEX: mutate(good, len(good), rnd, good)}


def gguf_mutants(save, rnd):
  def text(value):
    return struct.pack("<Q", len(value)) + value

  keys = [(b"general.architecture", 8, text(b"llama")), (b"general.alignment", 4, struct.pack("<I", 32))]
  keys += [(b"tokens", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"b")), (b"yes", 7, b"\1")]
  keys += [(b"llama." + name, 4, struct.pack("<I", 4)) for name in (b"block_count", b"embedding_length")]
  header = b"GGUF" + struct.pack("<IQQ", 3, 2, len(keys))
  header += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
  for i, (name, kind) in enumerate([(b"token_embd.weight", 0), (b"output.weight", 8)]):
    header += text(name) + struct.pack("<IQQIQ", 2, 32, 2, kind, 256 * i)
  good = header + bytes(-len(header) % 32) + bytes(512)
  for _ in range(MUTANTS):
    yield {"model.gguf": mutate(good, len(header), rnd, good[: len(header)])}


def read_any_gguf(files):
  checkpoint = read_gguf(files)
  gguf_config(checkpoint)
  return checkpoint


def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
  ("mutants", "read", "fine"),
  [
    (safetensors_mutants, read_safetensors, lambda checkpoint: not checkpoint.problems),
    (index_mutants, read_safetensors, lambda checkpoint: not checkpoint.problems),
    (gguf_mutants, read_gguf, lambda checkpoint: True),
    (gguf_mutants, read_any_gguf, lambda checkpoint: True),
  ],
  ids=["safetensors", "index", "gguf", "gguf config"],
)
def test_mutants_are_read_or_refused(save, mutants, read, fine):
  accepted = refused = 0
  before = peak()
  for contents in mutants(save, random.Random(1)):
    start = time.process_time()
    try:
      checkpoint = read(Memory(contents))
    except CheckpointError as error:
      refused += "memory" in str(error)
      continue
    except Exception as error:
      raise AssertionError(f"{type(error).__name__}: {error}: {contents}") from error
    finally:
      assert time.process_time() - start < SECONDS, contents
    for info in checkpoint.tensors.values():
      assert 0 <= info.start <= info.stop <= len(contents[info.file]), contents
    accepted += fine(checkpoint)
    refused += not fine(checkpoint)
  assert accepted + refused == MUTANTS
  assert refused > MUTANTS / 4
  assert peak() - before < KIB


def problems(directory):
  try:
    return read_safetensors(LocalFiles(str(directory))).problems
  except CheckpointError as error:
    return error.problems


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_loop_of_links_is_told(tmp_path, name):
  (tmp_path / name).symlink_to(tmp_path / "b")
  (tmp_path / "b").symlink_to(tmp_path / name)
  (problem,) = problems(tmp_path)
  assert problem.startswith(f"{name} is a link that leads back to itself")


def test_a_shard_that_is_a_loop_of_links_is_told(save_sharded):
  directory = save_sharded(
    {"m-1.safetensors": {"a": np.zeros(2, np.float32)}, "m-2.safetensors": {"b": np.zeros(2)}}
  )
  (directory / "m-2.safetensors").unlink()
  (directory / "m-2.safetensors").symlink_to("m-2.safetensors")
  (problem,) = problems(directory)
  assert problem == "m-2.safetensors is a link that leads back to itself: download it again"


def test_many_entries_take_no_quadratic_time(tmp_path):
  entry = b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
  text = b"{" + b",".join(entry % (i, i, i + 1) for i in range(100_000)) + b"}"
  (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(100_000))
  start = time.process_time()
  assert problems(tmp_path) == ()
  assert time.process_time() - start < 20
