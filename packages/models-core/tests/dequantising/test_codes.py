import ml_dtypes
import numpy as np
import pytest

from models_core.dequantising.codes import E4M3, decode


@pytest.mark.parametrize("lines", [0, 1, 5, 8192, 8193, 20_000])
def test_any_number_of_lines_is_decoded(rng, lines):
  codes = rng.integers(0, 127, (lines, 128), np.uint8)
  scale, zero = rng.uniform(0.5, 2, (lines, 1)).astype(np.float32), np.full((1, 1), 3, np.float32)
  found = decode(E4M3, np.dtype(np.float32), codes, scale, zero)
  np.testing.assert_array_equal(
    found, (codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) - zero) * scale
  )
