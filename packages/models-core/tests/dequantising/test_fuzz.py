"""Mutated quantised checkpoints: each is read, or refused by an error of the library, whatever lies in it."""

import dataclasses
import json
import os
import random

import ml_dtypes
import numpy as np
import pytest

from models_core.dequantising import dequantised
from models_core.errors import ModelsError
from models_core.formats import DTYPES, file_layout, read_safetensors

from . import written

MUTANTS = max(3, int(os.environ.get("FUZZ_MUTANTS", "1000")) // 100)
SHAPE = (24, 64)
JUNK = [
  None,
  -1,
  0,
  1,
  3,
  2**40,
  "x",
  "",
  [],
  [1],
  [0, -4],
  {},
  {"a": 1},
  True,
  1.5,
  float("nan"),
  ["re:("],
  "re:[",
  "*",
]
WRITERS = [
  written.fp8_blocks,
  written.fp8_tensor,
  lambda rng, shape: written.int8(rng, shape, zeros=True),
  lambda rng, shape: written.packed(rng, shape, zeros=True, order=True),
  lambda rng, shape: written.packed(rng, shape, bits=3, group=None),
  written.nvfp4,
  lambda rng, shape: written.nvfp4(rng, shape, modelopt=True),
  written.mxfp4,
  written.awq,
  written.gptq,
  lambda rng, shape: written.gptq(rng, shape, bits=3, order=True),
  lambda rng, shape: written.gptq(
    rng, shape, checkpoint_format="gptq", desc_act=True, dynamic={"+:m": {"bits": 4}}
  ),
  lambda rng, shape: written.awq(
    rng,
    shape,
    quant_method="auto-round",
    packing_format="auto_round:auto_awq",
    extra_config={"m": {"bits": 4}},
  ),
  written.bnb4,
  written.bnb8,
  written.mlx,
  lambda rng, shape: written.mlx_floats(rng, shape, "nvfp4"),
  lambda rng, shape: written.torchao(rng, shape, np.int8),
]


@dataclasses.dataclass
class Memory:
  """Files in memory that are read in place."""

  contents: dict[str, bytes]
  path: str = "memory"

  def names(self):
    return list(self.contents)

  def size(self, name):
    return len(self.contents[name])

  def read(self, name, start, stop):
    return self.contents[name][start:stop]

  def read_into(self, name, start, buffer):
    buffer[:] = self.contents[name][start : start + len(buffer)]

  def fetch(self, names):
    raise AssertionError(names)


def mutate_tensors(rnd, tensors):
  """Drops, reshapes, retypes, cuts or overwrites one tensor."""
  name = rnd.choice(list(tensors))
  tensor = tensors[name]
  match rnd.randrange(6):
    case 0:
      del tensors[name]
    case 1:
      tensors[name] = tensor.reshape(
        rnd.choice([(-1,), (1, *tensor.shape), tensor.shape[::-1], (*tensor.shape, 1)])
      )
    case 2:
      same = [kind for kind in DTYPES.values() if kind.itemsize == tensor.dtype.itemsize]
      tensors[name] = np.frombuffer(tensor.tobytes(), rnd.choice(same)).reshape(tensor.shape)
    case 3 if tensor.ndim:
      tensors[name] = tensor[: rnd.randrange(len(tensor))]
    case _:
      data = bytearray(tensor.tobytes())
      for _ in range(rnd.choice([1, 8, len(data)]) if data else 0):
        data[rnd.randrange(len(data))] = rnd.choice([0, 0x7F, 0x80, 0xFF, rnd.randrange(256)])
      tensors[name] = np.frombuffer(bytes(data), tensor.dtype).reshape(tensor.shape)


def mutate_config(rnd, said):
  """Replaces or drops one value, at any depth."""
  key = rnd.choice(list(said))
  if isinstance(said[key], dict) and said[key] and rnd.random() < 0.7:
    mutate_config(rnd, said[key])
  elif rnd.random() < 0.2:
    del said[key]
  else:
    said[key] = rnd.choice(JUNK)


def encode(tensors):
  kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
  beginning, starts = file_layout(kinds)
  content = bytearray(max([len(beginning), *(starts[name] + tensors[name].nbytes for name in tensors)]))
  content[: len(beginning)] = beginning
  for name, tensor in tensors.items():
    content[starts[name] : starts[name] + tensor.nbytes] = tensor.tobytes()
  return bytes(content)


def read_all(files):
  checkpoint = dequantised(read_safetensors(files))
  if checkpoint.problems:
    return False
  reader = checkpoint.open(files.names())
  try:
    for info in checkpoint.tensors.values():
      if info.packing is not None and 0 not in info.shape:
        box = reader.read_box(info, info.everything)
        assert box.shape == info.shape
        assert box.dtype == ml_dtypes.bfloat16
  finally:
    reader.close()
  return not getattr(checkpoint, "contradictions", ())


@pytest.mark.parametrize("number", range(len(WRITERS)))
def test_mutants_are_read_or_refused(number):
  rnd, accepted = random.Random(number), 0
  for _ in range(MUTANTS):
    one = WRITERS[number](np.random.default_rng(0), SHAPE)
    tensors, config = one.named("m"), json.loads(json.dumps(one.config))
    before = json.dumps(config), str(tensors)
    for _ in range(rnd.choice([1, 1, 2])):
      if tensors and rnd.random() < 0.7:
        mutate_tensors(rnd, tensors)
      elif config.get(one.key):
        mutate_config(rnd, config)
    files = Memory({"model.safetensors": encode(tensors), "config.json": json.dumps(config).encode()})
    try:
      accepted += read_all(files)
    except ModelsError:
      pass
    except Exception as error:
      raise AssertionError(f"{type(error).__name__}: {error}: {config}, {before}") from error
  assert accepted < MUTANTS
