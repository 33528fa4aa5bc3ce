import _thread
import json
import pathlib
import signal
import struct
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

# Before anything asks for a device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The format's names of element types, written down again as a check on the package's own table.
KINDS = {
  np.dtype(bool): "BOOL",
  np.dtype(np.uint8): "U8",
  np.dtype(np.int8): "I8",
  np.dtype(np.uint16): "U16",
  np.dtype(np.int16): "I16",
  np.dtype(np.uint32): "U32",
  np.dtype(np.int32): "I32",
  np.dtype(np.uint64): "U64",
  np.dtype(np.int64): "I64",
  np.dtype(np.float16): "F16",
  np.dtype(ml_dtypes.bfloat16): "BF16",
  np.dtype(np.float32): "F32",
  np.dtype(np.float64): "F64",
  np.dtype(np.complex64): "C64",
  np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
  np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
  np.dtype(ml_dtypes.float8_e4m3fnuz): "F8_E4M3FNUZ",
  np.dtype(ml_dtypes.float8_e5m2fnuz): "F8_E5M2FNUZ",
  np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}


def encode(tensors, metadata=None, data_start=None):
  """A safetensors file with these tensors, whose data starts at a multiple of 64 bytes plus `data_start`."""
  header, data = {} if metadata is None else {"__metadata__": metadata}, b""
  for name, tensor in tensors.items():
    raw = tensor.tobytes()
    header[name] = {
      "dtype": KINDS[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [len(data), len(data) + len(raw)],
    }
    data += raw
  text = json.dumps(header).encode()
  if data_start is not None:
    text += b" " * ((data_start - 8 - len(text)) % 64)
  return struct.pack("<Q", len(text)) + text + data


class Toy(nnx.Module):
  """Parameters from a table: name -> (shape, spec) or (shape, spec, dtype). "layers.0.w" nests."""

  def __init__(self, table, *, rngs):
    layers = {}
    for name, (shape, spec, *dtype) in table.items():
      value = jnp.zeros(shape, *dtype)
      variable = nnx.Param(value, out_sharding=spec, eager_sharding=False)
      head, _, rest = name.partition(".")
      if head == "layers":
        index, leaf = rest.split(".")
        layers.setdefault(int(index), {})[leaf] = variable
      else:
        setattr(self, name, variable)
    if layers:
      self.layers = nnx.List([nnx.Dict(layers[i]) for i in range(len(layers))])


@pytest.fixture
def toy():
  return Toy


@pytest.fixture
def kinds():
  return KINDS


@pytest.fixture
def save(tmp_path):
  """Writes a safetensors file of any dtype into a directory of the test's own, and returns the directory."""

  def write(tensors, name="model.safetensors", metadata=None, folder="checkpoint", data_start=None):
    directory = tmp_path / folder
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(encode(tensors, metadata, data_start))
    return directory

  return write


@pytest.fixture
def save_sharded(save):
  """Writes one file for each group of tensors, and their index."""

  def write(groups, index=None):
    for name, tensors in groups.items():
      directory = save(tensors, name)
    weight_map = {tensor: name for name, tensors in groups.items() for tensor in tensors}
    text = json.dumps({"metadata": {}, "weight_map": weight_map if index is None else index})
    (pathlib.Path(directory) / "model.safetensors.index.json").write_text(text)
    return directory

  return write


def make_mesh(kind, shape, names):
  devices = jax.devices()[: int(np.prod(shape))]
  if kind == "explicit":
    return jax.make_mesh(shape, names, devices=devices)
  return Mesh(np.array(devices).reshape(shape), names)


@pytest.fixture(params=["explicit", "auto"])
def mesh(request):
  """Two by two devices, of either kind."""
  return make_mesh(request.param, (2, 2), ("fsdp", "tp"))


@pytest.fixture
def meshes():
  """Makes a mesh of a kind, a shape and names."""
  return make_mesh


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def replicated():
  return PartitionSpec()


@pytest.fixture
def interrupt():
  """`interrupt(count)` interrupts the main thread, once. A shell starts jobs in the background with interrupts ignored."""
  former = signal.signal(signal.SIGINT, signal.default_int_handler)
  done = threading.Event()

  def once(count):
    if not done.is_set():
      done.set()
      _thread.interrupt_main()

  yield once
  signal.signal(signal.SIGINT, former)
