import numpy as np
import pytest

from models_core.shard_cache.checksum import checksum

SIZE = 3 * 4096 + 1000


@pytest.fixture
def memory(rng):
  return rng.integers(0, 256, SIZE, np.uint8)


def test_each_bit_counts(memory):
  sums = {checksum(memory)}
  for position in (0, 1, 4095, 4096, 8191, 3 * 4096 - 1, 3 * 4096, SIZE - 1):
    for bit in range(8):
      changed = memory.copy()
      changed[position] ^= 1 << bit
      sums.add(checksum(changed))
  assert len(sums) == 65


def test_the_same_bytes_in_other_places(memory):
  rows = memory[: 3 * 4096].reshape(3, 4096)
  changed = [rows[[1, 0, 2]].reshape(-1), np.roll(rows, 8, axis=1).reshape(-1), np.roll(rows.reshape(-1), 1)]
  words = memory[: 3 * 4096].view(np.uint64).copy()
  words[[5, 600]] = words[[600, 5]]
  changed.append(words.view(np.uint8))
  # A bit moves to another word of its row.
  words = np.zeros(1024, np.uint64)
  words[3] = 1
  other = np.roll(words, 1)
  sums = [checksum(x) for x in (*changed, rows.reshape(-1), words.view(np.uint8), other.view(np.uint8))]
  assert len(set(sums)) == len(sums)


def test_lengths_count():
  assert len({checksum(np.zeros(size, np.uint8)) for size in (0, 1, 8, 4096, 4097, 8192, 1 << 20)}) == 7
