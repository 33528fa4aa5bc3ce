"""The least that a load into memory of its own must do: two threads read the files into fresh huge pages.

    python benchmarks/floor.py DIRECTORY

Prints the seconds. It is a program of its own, without NumPy or JAX, so that nothing but reads and page faults counts.
"""

import concurrent.futures
import contextlib
import mmap
import os
import pathlib
import sys
import time

HUGE_PAGE = 2 << 20
TASK = 16 << 20


def read(directory: pathlib.Path) -> float:
  """Seconds to read all weights of a directory."""
  paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "config.json")
  sizes = [path.stat().st_size for path in paths]
  start = time.perf_counter()
  memory = mmap.mmap(-1, sum(-(-size // HUGE_PAGE) * HUGE_PAGE for size in sizes) or 1, mmap.MAP_PRIVATE)
  with contextlib.suppress(AttributeError, OSError):
    memory.madvise(mmap.MADV_HUGEPAGE)
  view, at, tasks, descriptors = memoryview(memory), 0, [], []
  for path, size in zip(paths, sizes, strict=True):
    descriptors.append(os.open(path, os.O_RDONLY))
    for offset in range(0, size, TASK):
      stop = min(offset + TASK, size)
      tasks.append((descriptors[-1], view[at + offset : at + stop], offset))
    at += -(-size // HUGE_PAGE) * HUGE_PAGE

  def fill(task: tuple[int, memoryview, int]) -> None:
    descriptor, target, offset = task
    done = 0
    while done < len(target):
      done += os.preadv(descriptor, [target[done:]], offset + done)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    list(pool.map(fill, tasks))
  seconds = time.perf_counter() - start
  for descriptor in descriptors:
    os.close(descriptor)
  return seconds


if __name__ == "__main__":
  print(read(pathlib.Path(sys.argv[1])))
