import contextlib
import dataclasses
import random
import struct
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from models_core import extras
from models_core.config.gguf import gguf_config
from models_core.errors import CheckpointError, ModelsError
from models_core.formats.files import LocalFiles
from models_core.formats.gguf import _PLAIN, _QUANTISED, GGUF, read_gguf
from models_core.formats.registry import formats_in
from models_core.formats.selection import show


@dataclasses.dataclass
class MemoryFiles:
  """Files in memory, that notes how far they were read."""

  contents: dict[str, bytes]
  path: str = "memory"
  most: int = 0

  def names(self):
    return list(self.contents)

  def size(self, name):
    return len(self.contents[name])

  def read(self, name, start, stop):
    self.most = max(self.most, stop)
    return self.contents[name][start:stop]

  def fetch(self, names):
    raise AssertionError("only headers are read")


LLAMA = {
  "context_length": 512,
  "embedding_length": 64,
  "block_count": 2,
  "feed_forward_length": 128,
  "attention.head_count": 4,
  "attention.head_count_kv": 2,
  "attention.layer_norm_rms_epsilon": 1e-5,
  "rope.freq_base": 10000.0,
}
QUANTISED = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q6_K)


def add(writer, key, value):
  match value:
    case bool():
      writer.add_bool(key, value)
    case str():
      writer.add_string(key, value)
    case float():
      writer.add_float32(key, value)
    case int():
      writer.add_uint32(key, value)
    case list():
      writer.add_array(key, value)


def write(path, architecture="llama", keys=LLAMA, tensors=None, extra=None, alignment=None, **options):
  """A GGUF file by the reference writer. Tensors: name -> array, or (raw bytes, kind)."""
  writer = gguf.GGUFWriter(path, architecture, **options)
  if alignment:
    writer.add_custom_alignment(alignment)
  for key, value in keys.items():
    add(writer, f"{architecture}.{key}", value)
  for key, value in (extra or {}).items():
    add(writer, key, value)
  if tensors is None:
    tensors = {"token_embd.weight": np.zeros((32, 64), np.float32)}
  for name, value in tensors.items():
    if isinstance(value, tuple):
      writer.add_tensor(name, value[0], raw_dtype=value[1])
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def encoded(rng, shape, kind):
  if kind is not Kind.Q6_K:
    return gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
  # The package doesn't encode this one: any bytes with finite scales are blocks.
  blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, 210), np.uint8)
  blocks[..., 208:] = np.full((*blocks.shape[:-1], 1), 0.01, np.float16).view(np.uint8)
  return blocks.reshape(*shape[:-1], -1)


def some_tensors(rng):
  tensors = {
    "token_embd.weight": rng.standard_normal((32, 64)).astype(np.float32),
    "half": rng.standard_normal((3, 5, 7)).astype(np.float16),
    "brain": (rng.standard_normal((4, 6)).astype(ml_dtypes.bfloat16).view(np.uint8), Kind.BF16),
    "int8": np.arange(11, dtype=np.int8),
    "int64": np.arange(3, dtype=np.int64),
    "double": rng.standard_normal(4),
  }
  return tensors | {kind.name: (encoded(rng, (3, 512), kind), kind) for kind in QUANTISED}


def raw(checkpoint, info):
  return np.frombuffer(checkpoint.files.read(info.file, info.start, info.stop), np.uint8)


def assert_equals_reference(checkpoint, paths):
  reference = [tensor for path in paths for tensor in gguf.GGUFReader(path).tensors]
  assert [t.name for t in reference] == list(checkpoint.tensors)
  for expected in reference:
    info = checkpoint.tensors[expected.name]
    assert info.shape == tuple(expected.shape[::-1].tolist())
    data = raw(checkpoint, info)
    assert data.tobytes() == expected.data.tobytes()
    if info.codec is None:
      assert info.dtype.itemsize * np.prod(info.shape) == data.size
    else:
      assert info.codec.name == expected.tensor_type.name
      assert info.dtype == np.float32
      decoded = info.codec.decode(data)
      assert decoded.dtype == np.float32
      expected_values = gguf.quants.dequantize(expected.data, expected.tensor_type)
      np.testing.assert_array_equal(decoded.reshape(info.shape), expected_values)


@pytest.mark.parametrize("alignment", [None, 64])
def test_tensors_are_those_of_the_reference_reader(tmp_path, alignment):
  path = write(tmp_path / "m.gguf", tensors=some_tensors(np.random.default_rng(0)), alignment=alignment)
  checkpoint = read_gguf(LocalFiles(str(tmp_path)))
  assert checkpoint.format.naming == "gguf"
  assert_equals_reference(checkpoint, [path])
  assert all(info.start % (alignment or 32) == 0 for info in checkpoint.tensors.values())
  dtypes = {name: info.dtype for name, info in checkpoint.tensors.items() if info.codec is None}
  assert dtypes == {
    "token_embd.weight": np.dtype(np.float32),
    "half": np.dtype(np.float16),
    "brain": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "int64": np.dtype(np.int64),
    "double": np.dtype(np.float64),
  }


def test_large_tensors_decode_as_one(tmp_path):
  rng = np.random.default_rng(1)
  write(tmp_path / "m.gguf", tensors={"w": (encoded(rng, (700, 1024), Kind.Q4_1), Kind.Q4_1)})
  assert_equals_reference(read_gguf(LocalFiles(str(tmp_path))), [tmp_path / "m.gguf"])


def test_type_tables_are_the_packages():
  for kind, (name, block_size, block_bytes) in _QUANTISED.items():
    assert gguf.GGML_QUANT_SIZES[Kind(kind)] == (block_size, block_bytes)
    assert Kind(kind).name == name
  for kind, dtype in _PLAIN.items():
    assert gguf.GGML_QUANT_SIZES[Kind(kind)] == (1, dtype.itemsize)


def test_metadata(tmp_path):
  tokens = [f"<{i}>é" for i in range(300)]
  extra = {
    "text": "größe",
    "flag": True,
    "tokens": tokens,
    "scores": [0.5, -1.0],
    "ids": [1, 2],
    "flags": [True, False],
  }
  write(tmp_path / "m.gguf", extra=extra)
  metadata = read_gguf(LocalFiles(str(tmp_path / "m.gguf"))).metadata
  assert metadata["text"] == "größe"
  assert metadata["flag"] is True
  assert metadata["tokens"] == tuple(tokens)
  np.testing.assert_array_equal(metadata["scores"], np.float32([0.5, -1.0]))
  np.testing.assert_array_equal(metadata["ids"], [1, 2])
  np.testing.assert_array_equal(metadata["flags"], [True, False])
  assert metadata["llama.block_count"] == 2


def test_version_2(tmp_path):
  data = bytearray(write(tmp_path / "m.gguf").read_bytes())
  data[4:8] = struct.pack("<I", 2)
  assert read_gguf(MemoryFiles({"m.gguf": bytes(data)})).tensors.keys() == {"token_embd.weight"}


def test_the_data_is_not_read(tmp_path):
  write(tmp_path / "m.gguf", tensors={"w": np.zeros((1024, 1024), np.float32)})
  files = MemoryFiles({"m.gguf": (tmp_path / "m.gguf").read_bytes()})
  read_gguf(files)
  assert files.most <= 256 * 1024


def test_headers_longer_than_the_first_read(tmp_path):
  tokens = [f"token {i}" for i in range(60_000)]
  write(tmp_path / "m.gguf", extra={"tokens": tokens, "numbers": list(range(100_000))})
  metadata = read_gguf(LocalFiles(str(tmp_path))).metadata
  assert metadata["tokens"] == tuple(tokens)
  np.testing.assert_array_equal(metadata["numbers"], np.arange(100_000))


@pytest.fixture
def split(tmp_path):
  tensors = {f"w{i}": np.full((4, 8), i, np.float32) for i in range(5)}
  write(tmp_path / "m.gguf", tensors=tensors, split_max_tensors=2)
  return tmp_path


def test_split(split):
  paths = sorted(split.glob("*.gguf"))
  assert [p.name for p in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
  checkpoint = read_gguf(LocalFiles(str(split)))
  assert_equals_reference(checkpoint, paths)
  assert checkpoint.metadata["llama.block_count"] == 2


def test_split_with_a_missing_part(split):
  (split / "m-00002-of-00003.gguf").unlink()
  with pytest.raises(CheckpointError, match=r"2 of 3 parts are here, but m-00002-of-00003.gguf is missing"):
    read_gguf(LocalFiles(str(split)))


def test_a_part_that_is_not_one_of_the_count(split):
  last = split / "m-00003-of-00003.gguf"
  (split / "m-00004-of-00003.gguf").write_bytes(last.read_bytes())
  with pytest.raises(CheckpointError, match=r"m-00004-of-00003.gguf is not one of 3 parts: remove it"):
    read_gguf(LocalFiles(str(split)))
  last.unlink()
  with pytest.raises(CheckpointError, match=r"2 of 3 parts are here, but m-00003-of-00003.gguf is missing"):
    read_gguf(LocalFiles(str(split)))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_stands_for_all(split, number):
  write(split / "other.gguf")
  expected = read_gguf(show(LocalFiles(str(split)), [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]))
  read = read_gguf(LocalFiles(str(split / f"m-0000{number}-of-00003.gguf")))
  assert read.tensors == expected.tensors
  assert read.files.path == str(split / f"m-0000{number}-of-00003.gguf")
  with contextlib.closing(read.open([info.file for info in read.tensors.values()])) as reader:
    assert reader.tensors == read.tensors


def test_one_part_alone(split, tmp_path):
  alone = tmp_path / "alone"
  alone.mkdir()
  (split / "m-00001-of-00003.gguf").rename(alone / "m-00001-of-00003.gguf")
  with pytest.raises(CheckpointError, match=r"1 of 3 parts are here, but m-00002-of-00003.gguf is missing"):
    read_gguf(LocalFiles(str(alone / "m-00001-of-00003.gguf")))


def test_an_absurd_number_of_parts(tmp_path):
  (tmp_path / "m-00000-of-99999.gguf").write_bytes(b"")
  with pytest.raises(CheckpointError, match=r"m-00001-of-99999.gguf is missing"):
    read_gguf(LocalFiles(str(tmp_path)))


def test_exchanged_parts(split):
  a, b, c = sorted(split.glob("*.gguf"))
  a_data, b_data = a.read_bytes(), b.read_bytes()
  a.write_bytes(b_data), b.write_bytes(a_data)
  with pytest.raises(CheckpointError, match=r"split.no is 1, but the file name says 0"):
    read_gguf(LocalFiles(str(split)))
  a.write_bytes(a_data), b.write_bytes(c.read_bytes())
  with pytest.raises(CheckpointError, match=r"w4 is also in m-00002-of-00003.gguf"):
    read_gguf(LocalFiles(str(split)))


def test_a_renamed_part(split):
  data = (split / "m-00001-of-00003.gguf").read_bytes()
  with pytest.raises(CheckpointError, match=r"split.count is 3, but the file names give 1"):
    read_gguf(MemoryFiles({"m.gguf": data}))


def test_unrelated_files(tmp_path):
  write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf")
  with pytest.raises(
    CheckpointError, match=r"\(a.gguf, b.gguf\): choose one with file=, or pass the path of one file"
  ):
    read_gguf(LocalFiles(str(tmp_path)))
  assert read_gguf(LocalFiles(str(tmp_path / "b.gguf"))).tensors["token_embd.weight"].file == "b.gguf"


@pytest.mark.parametrize(
  ("name", "kind"), [("mmproj-f16.gguf", "mmproj"), ("vision.gguf", "mmproj"), ("imatrix.gguf", "imatrix")]
)
def test_files_beside_the_language_model_are_left_out(tmp_path, name, kind):
  write(tmp_path / "m.gguf")
  write(tmp_path / name, "clip", {}, extra={"general.type": kind})
  read = read_gguf(LocalFiles(str(tmp_path)))
  assert {info.file for info in read.tensors.values()} == {"m.gguf"}
  assert kind == "imatrix" or any(note.startswith(f"{name} is not loaded") for note in read.notes)


@pytest.mark.parametrize(
  ("kind", "what"), [("mmproj", "the projector of a vision tower"), ("adapter", "a LoRA adapter")]
)
def test_a_file_without_a_language_model_says_what_it_is(tmp_path, kind, what):
  write(tmp_path / "m.gguf", "clip", {}, extra={"general.type": kind})
  with pytest.raises(CheckpointError, match=f"m.gguf is {what}, not a language model"):
    read_gguf(LocalFiles(str(tmp_path)))


@pytest.mark.parametrize("name", ["sha256-4d7a2146", "model.bin", "m.safetensors"])
def test_the_first_bytes_tell_the_kind(tmp_path, name):
  """Ollama keeps files without a suffix; older converters wrote `.bin`."""
  write(tmp_path / name)
  (tmp_path / "README.md").write_text("beside") if name != "m.safetensors" else None
  for place in (tmp_path, tmp_path / name):
    (format,) = formats_in(LocalFiles(str(place)))
    assert format is GGUF
    assert list(format.read(LocalFiles(str(place))).tensors) == ["token_embd.weight"]


def test_no_file(tmp_path):
  with pytest.raises(CheckpointError, match=r"no \.gguf file"):
    read_gguf(LocalFiles(str(tmp_path)))


# Malformed headers, written by hand.


def text(value):
  data = value if isinstance(value, bytes) else value.encode()
  return struct.pack("<Q", len(data)) + data


def key(name, kind, payload):
  return text(name) + struct.pack("<I", kind) + payload


def tensor(name="w", shape=(8,), kind=0, offset=0):
  return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def blob(keys=(), tensors=(), data=64, magic=b"GGUF", version=3, counts=None):
  tensor_count, key_count = counts or (len(tensors), len(keys))
  header = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
  return header + bytes(-len(header) % 32) + bytes(data)


HUGE = 2**64 - 1
MALFORMED = {
  "empty": (b"", "truncated or malformed: the magic number at byte 0 needs 4 bytes"),
  "magic": (blob(magic=b"GGML"), "not a GGUF file"),
  "version 1": (blob(version=1), "GGUF version 1"),
  "version 4": (blob(version=4), "GGUF version 4"),
  "version 0": (blob(version=0), "GGUF version 0"),
  "big-endian": (blob(version=3 << 24), "big-endian"),
  "tensor count": (blob(counts=(HUGE, 0)), "tensors, more than"),
  "key count": (blob(counts=(0, HUGE)), "keys, more than"),
  "truncated in keys": (
    blob([key("a", 4, b"1234")])[:40],
    "truncated or malformed: a at byte 37 needs 4 bytes",
  ),
  "long key": (blob([struct.pack("<Q", HUGE)], data=99), "bytes of a key, more than the file's"),
  "key not UTF-8": (blob([key(b"\xff", 4, b"1234")]), "not UTF-8"),
  "value not UTF-8": (blob([key("a", 8, text(b"\xff"))]), "not UTF-8"),
  "element not UTF-8": (
    blob([key("a", 9, struct.pack("<IQ", 8, 1) + text(b"\xff"))]),
    "string 0 of a is not UTF-8",
  ),
  "duplicate key": (blob([key("a", 0, b"1"), key("a", 0, b"2")]), "the key a occurs twice"),
  "type of value": (blob([key("a", 13, b"1234")]), "unknown type 13"),
  "type of elements": (blob([key("a", 9, struct.pack("<IQ", 99, 1))]), "unknown type 99"),
  "nested array": (blob([key("a", 9, struct.pack("<IQIQ", 9, 1, 0, 1) + b"1")]), "unknown type 9"),
  "long array": (blob([key("a", 9, struct.pack("<IQ", 12, HUGE))]), "elements of a, more than"),
  "many strings": (blob([key("a", 9, struct.pack("<IQ", 8, HUGE))]), "strings of a, more than"),
  "long element": (blob([key("a", 9, struct.pack("<IQQ", 8, 1, HUGE))]), "truncated or malformed: a at byte"),
  "truth value": (blob([key("a", 7, b"\2")]), "neither true nor false"),
  "truth values": (blob([key("a", 9, struct.pack("<IQ", 7, 2) + b"\0\3")]), "neither true nor false"),
  "alignment": (blob([key("general.alignment", 4, struct.pack("<I", 48))]), "expected a power of two"),
  "alignment 0": (blob([key("general.alignment", 4, struct.pack("<I", 0))]), "expected a power of two"),
  "alignment true": (blob([key("general.alignment", 7, b"\1")]), "expected a power of two"),
  "text alignment": (blob([key("general.alignment", 8, text("32"))]), "expected a power of two"),
  "type": (blob(tensors=[tensor(kind=4)]), "w has the unknown type 4"),
  "rank": (blob(tensors=[tensor(shape=(1,) * 5)]), "has 5 axes"),
  "huge rank": (
    blob(tensors=[text("w") + struct.pack("<IQQ", 2**32 - 1, 0, 0)]),
    "axes, but GGUF allows at most 4",
  ),
  "empty tensor": (blob(tensors=[tensor(shape=(0, 4))]), "is empty"),
  "half a block": (
    blob(tensors=[tensor(shape=(48,), kind=8)]),
    "Q8_0 stores the last axis in blocks of 32 elements",
  ),
  "scalar block": (
    blob(tensors=[tensor(shape=(), kind=8)]),
    "Q8_0 stores the last axis in blocks of 32 elements",
  ),
  "past the end": (blob(tensors=[tensor(shape=(17,))]), "ends at byte"),
  "huge offset": (blob(tensors=[tensor(offset=2**64 - 32)]), "ends at byte"),
  "huge shape": (blob(tensors=[tensor(shape=(HUGE,) * 4)]), "ends at byte"),
  "misaligned": (blob(tensors=[tensor(offset=4)]), "is misaligned"),
  "duplicate tensor": (blob(tensors=[tensor(), tensor(offset=32)]), "the tensor w occurs twice"),
  "overlap": (blob(tensors=[tensor("a", (16,)), tensor("b", offset=32)]), r"a \(bytes .* and b \(.* overlap"),
  "tensor total": (blob([key("split.tensors.count", 5, struct.pack("<i", 7))]), "split.tensors.count is 7"),
}


@pytest.mark.parametrize(("data", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(data, message):
  with pytest.raises(CheckpointError, match=message) as caught:
    read_gguf(MemoryFiles({"model.gguf": data}))
  assert "model.gguf" in str(caught.value)


def test_a_file_that_is_shorter_than_its_size():
  class Shrinking(MemoryFiles):
    def size(self, name):
      return 1000

  with pytest.raises(CheckpointError, match="reading ends at byte 30"):
    read_gguf(Shrinking({"m.gguf": blob(keys=[key("a", 0, b"1")])[:30]}))


def test_each_truncation_is_an_error(tmp_path):
  data = write(
    tmp_path / "m.gguf", tensors={"w": np.ones(8, np.float32)}, extra={"t": ["a", "b"]}
  ).read_bytes()
  for stop in range(len(data)):
    with pytest.raises(CheckpointError):
      read_gguf(MemoryFiles({"m.gguf": data[:stop]}))


def test_mutations_raise_nothing_else(tmp_path):
  tensors = {"token_embd.weight": np.zeros((2, 64), np.float32), "rope_freqs.weight": np.ones(8, np.float32)}
  keys = LLAMA | {"rope.dimension_count": 16, "rope.scaling.type": "none"}
  path = write(
    tmp_path / "m.gguf", keys=keys, tensors=tensors, extra={"t": ["a", "b"], "n": [1, 2], "f": True}
  )
  data = path.read_bytes()
  header = len(data) - 512
  rng = random.Random(0)
  values = [0, 1, 0x7F, 0x80, 0xFF, *range(14)]
  survivors = 0
  for _ in range(4000):
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
      place = rng.randrange(header)
      match rng.randrange(4):
        case 0:
          mutant[place] = rng.choice(values)
        case 1:
          mutant[place] ^= 1 << rng.randrange(8)
        case 2:
          mutant[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32, 2**63, HUGE)))
        case 3:
          del mutant[place : place + rng.randrange(1, 9)]
    try:
      gguf_config(read_gguf(MemoryFiles({"m.gguf": bytes(mutant)})))
      survivors += 1
    except CheckpointError:
      pass
  assert 0 < survivors < 3000


def test_decoding_without_the_package(tmp_path, monkeypatch):
  write(
    tmp_path / "m.gguf", tensors={"w": (encoded(np.random.default_rng(0), (1, 32), Kind.Q8_0), Kind.Q8_0)}
  )
  monkeypatch.setitem(sys.modules, "gguf", None)
  monkeypatch.delitem(sys.modules, "gguf.quants")
  checkpoint = read_gguf(LocalFiles(str(tmp_path)))
  info = checkpoint.tensors["w"]
  with pytest.raises(
    ImportError, match=r"Q8_0 tensors needs the package gguf: (uv )?pip install .*\[gguf\]"
  ) as caught:
    info.codec.decode(raw(checkpoint, info))
  assert isinstance(caught.value, ModelsError)


def test_an_import_error_within_a_package_is_not_hidden(tmp_path, monkeypatch):
  (tmp_path / "broken_extra.py").write_text("import a_module_that_is_not_there")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
    extras.require("broken_extra", "x", "this")


# Configurations.


def config_of(tmp_path, architecture, keys, rows=32, extra_tensors=None):
  tensors = {"token_embd.weight": np.zeros((rows, 64), np.float32), **(extra_tensors or {})}
  write(tmp_path / "m.gguf", architecture, keys, tensors)
  return gguf_config(read_gguf(LocalFiles(str(tmp_path))))


def test_llama(tmp_path):
  assert config_of(tmp_path, "llama", LLAMA | {"vocab_size": 30, "rope.dimension_count": 16}) == {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
  }


def test_an_output_layer_is_not_tied(tmp_path):
  head = {"output.weight": np.zeros((32, 64), np.float32)}
  assert config_of(tmp_path, "llama", LLAMA, extra_tensors=head)["tie_word_embeddings"] is False


def test_biases_of_llama_are_told_by_their_tensors(tmp_path):
  tensors = {"blk.0.attn_q.bias": np.zeros(64, np.float32), "blk.0.ffn_gate.bias": np.zeros(128, np.float32)}
  config = config_of(tmp_path, "llama", LLAMA, extra_tensors=tensors)
  assert (config["attention_bias"], config["mlp_bias"]) == (True, True)


def test_heads_without_kv_heads(tmp_path):
  keys = {k: v for k, v in LLAMA.items() if k != "attention.head_count_kv"}
  assert config_of(tmp_path, "llama", keys)["num_key_value_heads"] == 4


HEAD = {"attention.key_length": 32, "attention.value_length": 32}
NO_THETA = {k: v for k, v in LLAMA.items() if k != "rope.freq_base"}
GEMMA2 = NO_THETA | HEAD | {"attention.sliding_window": 7}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = LLAMA | HEAD | {"attention.sliding_window": 7}
EXPERTS = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 96}
CONFIGS = {
  "qwen2": ("qwen2", LLAMA, {"model_type": "qwen2", "hidden_act": "silu", "head_dim": 16}),
  "qwen2 window": ("qwen2", LLAMA | {"attention.sliding_window": 4096}, {"use_sliding_window": False}),
  "qwen3": ("qwen3", LLAMA | HEAD, {"model_type": "qwen3", "head_dim": 32}),
  "qwen3moe": (
    "qwen3moe",
    LLAMA | HEAD | EXPERTS,
    {
      "model_type": "qwen3_moe",
      "num_experts": 8,
      "num_experts_per_tok": 2,
      "moe_intermediate_size": 96,
      "norm_topk_prob": True,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [],
    },
  ),
  "gemma": ("gemma", NO_THETA | HEAD, {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0}),
  "gemma2": (
    "gemma2",
    GEMMA2 | CAPS,
    {
      "model_type": "gemma2",
      "hidden_activation": "gelu_pytorch_tanh",
      "rope_theta": 10000.0,
      "query_pre_attn_scalar": 32,
      "sliding_window": 7,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
  ),
  "gemma2 27b": ("gemma2", GEMMA2 | CAPS | {"block_count": 46}, {"query_pre_attn_scalar": 16}),
  "gemma3": (
    "gemma3",
    GEMMA3,
    {
      "model_type": "gemma3_text",
      "hidden_activation": "gelu_pytorch_tanh",
      "rope_local_base_freq": 10000.0,
      "sliding_window": 7,
      "sliding_window_pattern": 6,
      "query_pre_attn_scalar": 32,
    },
  ),
  "gemma3 27b": ("gemma3", GEMMA3 | {"block_count": 62}, {"query_pre_attn_scalar": 16}),
  "gemma3 local base": ("gemma3", GEMMA3 | {"rope.freq_base_swa": 5000.0}, {"rope_local_base_freq": 5000.0}),
  "gemma3 pattern": (
    "gemma3",
    GEMMA3 | {"attention.sliding_window_pattern": 3},
    {"sliding_window_pattern": 3},
  ),
  "gemma3 layers": (
    "gemma3",
    GEMMA3 | {"attention.sliding_window_pattern": [True, False]},
    {"layer_types": ["sliding_attention", "full_attention"]},
  ),
  "linear": (
    "gemma3",
    GEMMA3 | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
  ),
  "factor alone": (
    "llama",
    LLAMA | {"rope.scaling.factor": 2.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
  ),
  "yarn": (
    "qwen3",
    LLAMA
    | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
  ),
}


@pytest.mark.parametrize(("architecture", "keys", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_config(tmp_path, architecture, keys, expected):
  config = config_of(tmp_path, architecture, keys)
  assert {key: config.get(key) for key in expected} == expected


def test_yarn_attention_factor_is_the_whole_factor(tmp_path):
  keys = LLAMA | {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
    "rope.scaling.yarn_attn_factor": 0.8782488562869419,
  }
  scaling = config_of(tmp_path, "qwen3", keys)["rope_scaling"]
  assert scaling["attention_factor"] == pytest.approx(1.0, abs=1e-6)


def test_frequency_factors(tmp_path):
  factors = np.linspace(1, 32, 8, dtype=np.float32)
  config = config_of(tmp_path, "llama", LLAMA, extra_tensors={"rope_freqs.weight": factors})
  assert config["rope_scaling"] == {"rope_type": "frequency_factors", "factors": factors.tolist()}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequency_factors_of_published_models_are_named(tmp_path, factor):
  # As llama.cpp computes them, from wavelengths.
  wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
  smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
  factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
  keys = LLAMA | {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
  keys["rope.freq_base"] = 500000.0
  config = config_of(tmp_path, "llama", keys, extra_tensors={"rope_freqs.weight": factors})
  assert config["rope_scaling"] == {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  config = config_of(tmp_path, "llama", keys, extra_tensors={"rope_freqs.weight": factors * 1.01})
  assert config["rope_scaling"]["rope_type"] == "frequency_factors"


@pytest.mark.parametrize("value", [1e-5, 1e-6, 1e-12, 0.1])
def test_numbers_are_the_shortest_decimals(tmp_path, value):
  keys = LLAMA | {"attention.layer_norm_rms_epsilon": value}
  assert config_of(tmp_path, "llama", keys)["rms_norm_eps"] == value


def without(name):
  return {k: v for k, v in LLAMA.items() if k != name}


WRONG = {
  "architecture": (
    "mamba",
    {},
    None,
    r"general.architecture is 'mamba', which is not implemented; implemented are llama",
  ),
  "text": (
    "llama",
    LLAMA | {"block_count": "2"},
    None,
    r"llama.block_count is '2': expected a positive whole number",
  ),
  "list": ("llama", LLAMA | {"feed_forward_length": [1, 2]}, None, "llama.feed_forward_length is array"),
  "zero": ("llama", LLAMA | {"block_count": 0}, None, "llama.block_count is 0"),
  "nan": ("llama", LLAMA | {"rope.freq_base": float("nan")}, None, "llama.rope.freq_base is nan"),
  "heads": (
    "llama",
    LLAMA | {"attention.head_count": 5},
    None,
    "embedding_length 64 is not a multiple of attention.head_count 5",
  ),
  "partial": ("llama", LLAMA | {"rope.dimension_count": 8}, None, "rope.dimension_count is 8; only 16 is"),
  "list of dimensions": (
    "llama",
    LLAMA | {"rope.dimension_count": [8, 8]},
    None,
    "rope.dimension_count is array",
  ),
  "values": ("llama", LLAMA | {"attention.value_length": 8}, None, "attention.value_length is 8"),
  "mixtral": (
    "llama",
    LLAMA | {"expert_count": 8},
    None,
    "llama.expert_count is 8, which is not implemented",
  ),
  "unknown key": (
    "llama",
    LLAMA | {"logit_scale": 8.0},
    None,
    "llama.logit_scale is 8.0, which is not implemented",
  ),
  "scaled positions": (
    "llama",
    LLAMA | {"rope.scale_linear": 2.0},
    None,
    "llama.rope.scale_linear is 2.0, which is not implemented",
  ),
  "acausal": ("llama", LLAMA | {"attention.causal": False}, None, "llama.attention.causal is False"),
  "shared": ("qwen3moe", LLAMA | EXPERTS | {"expert_shared_count": 1}, None, "expert_shared_count is 1"),
  "longrope": ("llama", LLAMA | {"rope.scaling.type": "longrope"}, None, "rope.scaling.type is 'longrope'"),
  "no factor": ("llama", LLAMA | {"rope.scaling.type": "yarn"}, None, "llama.rope.scaling.factor is missing"),
  "pattern": (
    "gemma2",
    GEMMA2 | CAPS | {"attention.sliding_window_pattern": 3},
    None,
    "pattern is 3; only 2",
  ),
  "short pattern": (
    "gemma3",
    GEMMA3 | {"attention.sliding_window_pattern": [True]},
    None,
    "expected 2 booleans, one for each layer",
  ),
  "caps": ("gemma2", GEMMA2, None, "gemma2.attn_logit_softcapping is missing"),
  "two scalings": (
    "llama",
    LLAMA | {"rope.scaling.factor": 2.0},
    np.ones(8, np.float32),
    "RoPE is scaled twice",
  ),
  "factors": ("llama", LLAMA, np.zeros(8, np.float32), "must hold finite positive numbers alone"),
  "shape of factors": ("llama", LLAMA, np.ones(4, np.float32), r"expected float32 of shape \(8,\)"),
} | {
  f"no {name}": ("llama", without(name), None, f"the key llama.{name} is missing")
  for name in LLAMA
  if "kv" not in name
}


@pytest.mark.parametrize(("architecture", "keys", "factors", "message"), WRONG.values(), ids=WRONG)
def test_wrong_configs(tmp_path, architecture, keys, factors, message):
  with pytest.raises(CheckpointError, match=message):
    config_of(
      tmp_path, architecture, keys, extra_tensors=None if factors is None else {"rope_freqs.weight": factors}
    )


def test_no_embedding(tmp_path):
  write(tmp_path / "m.gguf", tensors={"w": np.zeros(4, np.float32)})
  with pytest.raises(
    CheckpointError, match=r"token_embd.weight of shape \[vocab_size, hidden_size\] is missing"
  ):
    gguf_config(read_gguf(LocalFiles(str(tmp_path))))


def test_all_problems_at_once(tmp_path):
  keys = without("block_count") | {"logit_scale": 2.0, "context_length": "many"}
  with pytest.raises(CheckpointError) as caught:
    config_of(tmp_path, "llama", keys)
  assert len(caught.value.problems) == 3


def test_a_truncated_file_is_one_problem(tmp_path):
  whole = blob(
    tensors=[tensor(name=name, offset=offset) for name, offset in (("a", 0), ("b", 64), ("c", 128))]
  )
  (tmp_path / "m.gguf").write_bytes(whole[:-1])
  with pytest.raises(CheckpointError) as caught:
    read_gguf(LocalFiles(str(tmp_path)))
  assert len(caught.value.problems) == 1
