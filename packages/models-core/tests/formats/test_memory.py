import concurrent.futures
import gc
import mmap
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

from models_core.formats import ALIGNMENT, aligned_empty

BYTES = np.dtype(np.uint8)
MIB = 1 << 20
# From shared pages of the allocator, in shared chunks, with mappings of their own.
SIZES = [0, 3, 64 << 10, MIB, 3 * MIB - 64, 64 * MIB, 200 * MIB + 3, 300 * MIB]


def anonymous():
  """Bytes of this process's memory that are no file's."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def has_huge_pages():
  enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  return enabled.exists() and "[never]" not in enabled.read_text()


@pytest.fixture
def small_pages(monkeypatch):
  """A system whose `mmap` knows no huge pages."""
  monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("pages", ["huge", "small"])
def test_memory_of_any_size_is_aligned(nbytes, pages, request):
  if pages == "small":
    request.getfixturevalue("small_pages")
  memory = aligned_empty((nbytes,), BYTES)
  assert (memory.shape, memory.dtype) == ((nbytes,), BYTES)
  assert memory.flags.c_contiguous
  assert memory.flags.writeable
  assert memory.ctypes.data % ALIGNMENT == 0 or not nbytes
  if nbytes:
    memory[0], memory[-1] = 1, 2


@pytest.mark.parametrize("nbytes", [2 * MIB, 64 * MIB])
def test_whole_huge_pages_start_at_one(nbytes):
  assert aligned_empty((nbytes,), BYTES).ctypes.data % (2 * MIB) == 0


@pytest.mark.parametrize("nbytes", SIZES[1:5])
def test_a_cpu_device_takes_it_without_a_copy(nbytes):
  memory = aligned_empty((nbytes,), BYTES)
  memory[:] = 7
  pointer = memory.ctypes.data
  array = jax.device_put(memory, jax.devices()[0])
  assert array.unsafe_buffer_pointer() == pointer
  del memory
  gc.collect()
  assert np.all(np.asarray(array) == 7)


@pytest.mark.parametrize("nbytes", [MIB, 2 * MIB, 3 * MIB - 64])
def test_each_array_returns_its_own_memory(nbytes):
  before = anonymous()
  arrays = [aligned_empty((nbytes,), BYTES) for _ in range(64 * MIB // nbytes)]
  for number, array in enumerate(arrays):
    array[:] = number
  size = sum(array.nbytes for array in arrays)
  assert anonymous() - before < 1.03 * size + 4 * MIB
  # A view keeps the memory, whatever became of the array that it is a view of.
  views = [array.reshape(-1, 16)[:, 1:] for array in arrays[1::2]]
  del arrays, array
  gc.collect()
  assert anonymous() - before < 0.5 * size + 4 * MIB
  assert all(np.all(view == 2 * number + 1) for number, view in enumerate(views))


@pytest.mark.skipif(not has_huge_pages(), reason="the system has no huge pages")
@pytest.mark.parametrize("nbytes", [MIB + 64, 3 * MIB, 128 * MIB])
def test_fresh_memory_costs_few_page_faults(nbytes):
  before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
  arrays = [aligned_empty((nbytes,), BYTES) for _ in range(128 * MIB // nbytes)]
  for array in arrays:
    array[:] = 1
  faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
  assert faults < 20_000 * sum(array.nbytes for array in arrays) / 1e9


def test_threads_get_memory_that_no_other_has():
  def fill(number):
    arrays = [aligned_empty((size,), BYTES) for size in (70_001, 64 << 10, MIB + 1, 2 * MIB)]
    for array in arrays:
      array[:] = number
    return arrays

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    filled = list(pool.map(fill, range(32)))
  assert all(np.all(array == number) for number, arrays in enumerate(filled) for array in arrays)


def test_memory_that_is_in_use_at_the_end_of_a_process_keeps_its_values():
  code = (
    "import atexit, sys\n"
    "import numpy as np\n"
    "memory = None\n"
    "atexit.register(lambda: sys.exit() if not (memory == 5).all() else print('kept'))\n"
    "from models_core.formats import aligned_empty\n"
    "memory = aligned_empty((300_000,), np.dtype(np.uint8))\n"
    "memory[:] = 5\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.stdout == "kept\n", done.stderr
