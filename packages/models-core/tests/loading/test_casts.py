"""A cast is one of numbers, and none that does not fit is loaded, on whatever way a tensor reaches its shards."""

import itertools
import json

import gguf
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import PartitionSpec as P

from models_core import casting
from models_core.errors import CheckpointError
from models_core.formats import byte_reader, orbax
from models_core.formats.files import LocalFiles
from models_core.formats.gguf import read_gguf
from models_core.formats.orbax import read_orbax
from models_core.formats.safetensors import DTYPES, read_safetensors
from models_core.loading import fill
from models_core.loading.abstract import abstract_model
from models_core.loading.loader import load_arrays
from models_core.loading.plan import plan_load
from models_core.weights.table import Conversion, WeightTable

F32, F16, BF16 = DTYPES["F32"], DTYPES["F16"], DTYPES["BF16"]
FLOATS = [kind for kind in DTYPES if kind.startswith(("F", "BF"))]
TARGETS = [kind for kind in FLOATS if kind != "F64"]
SHAPE = (8, 32)
# Numbers that every float type holds, and some that all but F8_E8M0 hold.
POWERS = np.resize(2.0 ** np.arange(-2, 4), SHAPE)
NUMBERS = np.resize([0.5, -0.5, 1.5, -3.0, 4.0, -6.0, 0.0, 1.0, 0.25], SHAPE)

AS_STORED = Conversion(np.array, np.array)
# way -> (names of the tensors, layout, the parameter's spec, further fields of the row, numbers -> tensors).
WAYS = {
  "whole": ("{way}", "v d", P(), (), lambda x: [x]),
  "rows": ("{way}", "v d", P("fsdp"), (), lambda x: [x]),
  "columns": ("{way}", "v d", P(None, "tp"), (), lambda x: [x]),
  "turned": ("{way}", "d v -> v d", P("fsdp", "tp"), (), lambda x: [x.T]),
  "fused": ("{way}", "(1/2 f) d -> f d", P("fsdp"), (), lambda x: [np.concatenate([x, x])]),
  "stacked": ("{way}.{e}", "d -> e d", P("tp"), (), list),
  "values": ("{way}", "v d", P("fsdp"), (AS_STORED,), lambda x: [x]),
}


def numbers(*kinds):
  return POWERS if "F8_E8M0" in kinds else NUMBERS


def rows_of(*ways):
  found = []
  for way in ways:
    names, layout, _, more, _ = WAYS[way]
    found.append((way, names.replace("{way}", way), layout, *more))
  return WeightTable(*found)


def tensors_of(x, *ways):
  """The tensors of some ways, contiguous."""
  found = {}
  for way in ways:
    names, _, _, _, make = WAYS[way]
    for e, tensor in enumerate(make(x)):
      found[names.replace("{way}", way).replace("{e}", str(e))] = np.ascontiguousarray(tensor)
  return found


@pytest.fixture
def mesh(meshes):
  return meshes("explicit", (2, 2), ("fsdp", "tp"))


@pytest.fixture
def load(toy, mesh):
  """Loads the parameter of each way from a checkpoint."""

  def read(checkpoint, *ways, dtype=None):
    parameters = {way: (SHAPE, WAYS[way][2]) for way in ways}
    model = abstract_model(toy, parameters, mesh)
    return load_arrays(plan_load(checkpoint, model, rows_of(*ways), dtype=dtype))

  return read


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
  """Tensors are one task, chunk and block each, or several."""
  if request.param == "many blocks":
    monkeypatch.setattr(byte_reader.LocalReader, "chunk", 128)
    monkeypatch.setattr(fill, "_TASK", 256)
    monkeypatch.setattr(casting, "_BLOCK", 64)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, TARGETS)))
def test_every_float_becomes_every_other_with_its_value(source, target, save, load, blocks):
  x = numbers(source, target)
  # Aligned, so that what is wanted as it is stored is mapped.
  directory = save(tensors_of(x.astype(np.float32).astype(DTYPES[source]), *WAYS), data_start=0)
  arrays = load(read_safetensors(LocalFiles(str(directory))), *WAYS, dtype=DTYPES[target])
  for array in arrays.values():
    assert array.dtype == DTYPES[target]
    np.testing.assert_array_equal(np.asarray(array).astype(np.float64), x)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FLOATS, 2)))
@pytest.mark.parametrize("dtype", [None, F16])
def test_tensors_of_two_floats_keep_their_values_in_one_parameter(one, other, dtype, save, load):
  x = numbers(one, other)
  tensors = tensors_of(x, "stacked")
  kinds = itertools.cycle([DTYPES[one], DTYPES[other]])
  stored = {name: row.astype(np.float32).astype(next(kinds)) for name, row in tensors.items()}
  array = load(read_safetensors(LocalFiles(str(save(stored)))), "stacked", dtype=dtype)["stacked"]
  assert dtype is None or array.dtype == dtype
  np.testing.assert_array_equal(np.asarray(array).astype(np.float64), x)


# (stored, loaded) -> a number that the one holds and the other does not.
TOO_LARGE = {
  ("F64", "F32"): 1e39,
  ("F32", "BF16"): 3.4e38,
  ("F32", "F16"): -7e4,
  ("BF16", "F16"): 3e38,
  ("F16", "F8_E5M2"): 65504.0,
  ("F8_E5M2", "F8_E4M3"): -512.0,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("source", "target"), TOO_LARGE)
def test_a_number_that_does_not_fit_is_an_error_that_names_its_tensor(
  source, target, way, save, load, blocks
):
  x = NUMBERS.astype(DTYPES[source])
  for place in ((0, 0), (7, 31)):
    y = x.copy()
    y[place] = number = DTYPES[source].type(TOO_LARGE[source, target])
    name = f"stacked.{place[0]}" if way == "stacked" else way
    directory = save(tensors_of(y, way))
    with pytest.raises(CheckpointError) as error:
      load(read_safetensors(LocalFiles(str(directory))), way, dtype=DTYPES[target])
    (problem,) = error.value.problems
    assert problem == f"{name}: {number.item()} does not fit into {DTYPES[target]}: load it in another dtype"
    assert error.value.where == str(directory)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_file_holds_is_kept_be_it_finite_or_not(way, save, load, blocks):
  x = NUMBERS.astype(F32)
  x[0, 0], x[5, 9], x[7, 31] = np.inf, -np.inf, np.nan
  directory = save(tensors_of(x, way))
  array = load(read_safetensors(LocalFiles(str(directory))), way, dtype=F16)[way]
  np.testing.assert_array_equal(np.asarray(array), x.astype(F16))


GGML = {
  "F64": gguf.GGMLQuantizationType.F64,
  "F32": gguf.GGMLQuantizationType.F32,
  "F16": gguf.GGMLQuantizationType.F16,
  "BF16": gguf.GGMLQuantizationType.BF16,
}


def write_gguf(path, tensors, kind):
  writer = gguf.GGUFWriter(path, "llama")
  for name, tensor in tensors.items():
    writer.add_tensor(name, tensor, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return read_gguf(LocalFiles(str(path)))


@pytest.mark.parametrize(("source", "target"), list(itertools.product(GGML, TARGETS)))
def test_floats_of_gguf_files(source, target, load, tmp_path):
  x = numbers(target)
  tensors = tensors_of(x.astype(DTYPES[source]), "rows", "turned")
  if source == "BF16":
    tensors = {name: tensor.view(np.uint8) for name, tensor in tensors.items()}
  checkpoint = write_gguf(tmp_path / "m.gguf", tensors, GGML[source])
  for array in load(checkpoint, "rows", "turned", dtype=DTYPES[target]).values():
    np.testing.assert_array_equal(np.asarray(array).astype(np.float64), x)


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_a_decoded_number_that_does_not_fit_is_an_error(way, load, tmp_path):
  x = NUMBERS.astype(F32)
  x[5, 9] = 1.27e6
  kind = gguf.GGMLQuantizationType.Q8_0
  tensors = {name: gguf.quants.quantize(tensor, kind) for name, tensor in tensors_of(x, way).items()}
  checkpoint = write_gguf(tmp_path / "m.gguf", tensors, kind)
  with pytest.raises(CheckpointError, match=rf"{way}: 1270000\.0 does not fit into float16: load it in"):
    load(checkpoint, way, dtype=F16)


@pytest.fixture(params=["boxes", "streams"])
def tree(request, tmp_path, monkeypatch):
  """Writes an Orbax tree whose cells are read as boxes or as streams."""
  if request.param == "streams":
    monkeypatch.setattr(orbax, "_LARGE", 0)

  def write(x, *ways):
    for name, tensor in tensors_of(x, *ways).items():
      kind = np.dtype(tensor.dtype)
      metadata = {
        "chunks": [4, tensor.shape[1] if name == "whole" else 8],
        "dtype": kind.str if kind.isbuiltin == 1 else kind.name,
        "compressor": {"id": "zstd", "level": 1},
        "shape": list(tensor.shape),
      }
      spec = {"driver": "zarr", "kvstore": f"file://{tmp_path}/{name}/", "metadata": metadata}
      ts.open(spec, create=True).result().write(tensor).result()
    (tmp_path / "_METADATA").write_text(json.dumps({"tree_metadata": {}}))
    checkpoint = read_orbax(LocalFiles(str(tmp_path)))
    assert not checkpoint.problems
    return checkpoint

  return write


@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_floats_of_orbax_trees(source, tree, load):
  checkpoint = tree(NUMBERS.astype(DTYPES[source]), "whole", "rows", "turned")
  for target in TARGETS[:-1]:
    for array in load(checkpoint, "whole", "rows", "turned", dtype=DTYPES[target]).values():
      assert array.dtype == DTYPES[target]
      np.testing.assert_array_equal(np.asarray(array).astype(np.float64), NUMBERS)


@pytest.mark.parametrize("way", ["whole", "rows", "turned"])
def test_a_number_of_a_tree_that_does_not_fit_is_an_error(way, tree, load):
  x = NUMBERS.astype(F32)
  x[5, 9] = 7e4
  with pytest.raises(CheckpointError, match=rf"{way}: 70000\.0 does not fit into float16: load it in"):
    load(tree(x, way), way, dtype=F16)
