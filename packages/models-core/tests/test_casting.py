import itertools

import ml_dtypes
import numpy as np
import pytest

from models_core import casting
from models_core.casting import cast_into

KINDS = {
  np.dtype(kind).name: np.dtype(kind)
  for kind in (
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2fnuz,
    ml_dtypes.float8_e8m0fnu,
  )
}
PAIRS = list(itertools.product(KINDS, KINDS))
F32, BF16, F16 = KINDS["float32"], KINDS["bfloat16"], KINDS["float16"]
E4M3 = KINDS["float8_e4m3fn"]


def bits(array):
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def every(dtype):
  """All numbers of a type of up to 16 bits; of wider ones, random patterns and those around the limits of others."""
  if dtype.itemsize <= 2:
    return np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
  rng = np.random.default_rng(0)
  limits = [float(ml_dtypes.finfo(kind).max) for kind in KINDS.values()]
  with np.errstate(over="ignore"):
    edges = np.array([*limits, 464.0, 65520.0, np.inf, 0.0, 1e-45], dtype)
    edges = np.concatenate(
      [np.nextafter(edges, dtype.type(0)), edges, np.nextafter(edges, dtype.type(np.inf))]
    )
  random = rng.integers(0, 256, (4096, dtype.itemsize), np.uint8).view(dtype).reshape(-1)
  return np.concatenate([edges, -edges, random])


@pytest.fixture(autouse=True)
def _signalling_nans_are_no_news():
  with np.errstate(all="ignore"):
    yield


def cast_of(numbers, dtype):
  """The reference. Any type of 8 bits goes by float32, which holds it: not all of them have casts to the others."""
  return numbers.astype(F32).astype(dtype) if numbers.dtype.itemsize == 1 else numbers.astype(dtype)


def cast(numbers, dtype):
  target = np.empty(numbers.shape, dtype)
  cast_into(target, numbers)
  return target


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_fits_is_rounded_as_ml_dtypes_rounds_it(source, target):
  numbers = every(KINDS[source])
  expected = cast_of(numbers, KINDS[target])
  kept = np.isfinite(expected) | ~np.isfinite(numbers)
  found = cast(numbers[kept], KINDS[target])
  assert found.dtype == KINDS[target]
  nan = np.isnan(expected[kept])
  np.testing.assert_array_equal(np.isnan(found), nan)
  np.testing.assert_array_equal(bits(found[~nan]), bits(expected[kept][~nan]))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_does_not_fit_is_an_error_that_shows_it(source, target):
  numbers = every(KINDS[source])
  lost = numbers[np.isfinite(numbers) & ~np.isfinite(cast_of(numbers, KINDS[target]))]
  for number in lost[:: max(1, len(lost) // 50)]:
    with pytest.raises(OverflowError) as error:
      cast(np.array([1, number, 2], KINDS[source]), KINDS[target])
    shown, _, rest = str(error.value).partition(" ")
    assert KINDS[source].type(float(shown)) == number
    assert rest == f"does not fit into {target}"


@pytest.mark.parametrize(
  ("number", "source", "target", "fits"),
  [
    (65519.996, F32, F16, True),
    (65520.0, F32, F16, False),
    (-65520.0, F32, F16, False),
    (3.3961774e38, F32, BF16, True),
    (3.3961776e38, F32, BF16, False),
    (3.4e38, F32, BF16, False),
    (65280.0, BF16, F16, True),
    (65536.0, BF16, F16, False),
    (464.0, F32, E4M3, True),
    (465.0, F32, E4M3, False),
    (-449.0, F32, E4M3, True),
    (1e39, KINDS["float64"], F32, False),
    (-3e38, BF16, F16, False),
  ],
)
def test_the_number_from_which_on_nothing_fits(number, source, target, fits):
  numbers = np.array([number], source)
  if fits:
    assert np.isfinite(cast(numbers, target)).all()
  else:
    with pytest.raises(OverflowError, match="does not fit"):
      cast(numbers, target)


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float8_e5m2"])
def test_infinities_and_nans_of_the_source_are_kept(target):
  found = cast(np.array([np.inf, -np.inf, np.nan, 1], F32), KINDS[target])
  np.testing.assert_array_equal(found.astype(F32), [np.inf, -np.inf, np.nan, 1])


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_infinities_are_nans_in_a_type_that_has_none(kind):
  found = cast(np.array([np.inf, -np.inf, 1], F32), KINDS[kind])
  np.testing.assert_array_equal(found.astype(F32), [np.nan, np.nan, 1])


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(casting, "_BLOCK", 64)


VIEWS = {
  "as it is": lambda array: array,
  "turned": lambda array: array.transpose(2, 0, 1),
  "columns": lambda array: array[:, :, 3:17],
  "every other": lambda array: array[::2, ::3, ::2],
  "backwards": lambda array: array[::-1, :, ::-1],
}


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(VIEWS, VIEWS)))
def test_every_block_of_every_view_is_cast_and_checked(ours, theirs, small_blocks):
  rng = np.random.default_rng(0)
  source = VIEWS[theirs](rng.normal(size=(6, 6, 20)).astype(F32))
  memory = np.zeros((24, 24, 40), F16)
  target = VIEWS[ours](memory)[tuple(slice(size) for size in source.shape)]
  source = source[tuple(slice(size) for size in target.shape)]
  cast_into(target, source)
  np.testing.assert_array_equal(target, source.astype(F16))
  assert np.count_nonzero(memory) == source.size
  for place in itertools.product(*((0, size // 2, size - 1) for size in source.shape)):
    former, source[place] = source[place], 7e4
    with pytest.raises(OverflowError, match=r"^70000\.0 does not fit into float16$"):
      cast_into(target, source)
    source[place] = former


@pytest.mark.parametrize("shape", [(1,), (1000,), (3, 40), (40, 3), (2, 3, 4, 5), (1, 1, 64)])
def test_blocks_are_small_and_hold_every_element_once(shape, small_blocks):
  target = np.zeros(shape, F32)
  blocks = [part for part, _ in casting._blocks(target, target)]
  assert all(part.nbytes <= 64 for part in blocks)
  for part in blocks:
    part += 1
  assert (target == 1).all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (1, 1, 1)])
def test_shapes_without_many_elements(shape):
  assert cast(np.full(shape, 2.5, F32), F16).tolist() == np.full(shape, 2.5).tolist()
  if 0 not in shape:
    with pytest.raises(OverflowError):
      cast(np.full(shape, 1e30, F32), F16)


def test_whole_numbers_fit_or_are_an_error():
  assert cast(np.array([-(2**31), 2**31 - 1]), np.dtype(np.int32)).tolist() == [-(2**31), 2**31 - 1]
  assert cast(np.array([-3, 65504], np.int32), F16).tolist() == [-3, 65504]
  for number, source, target in (
    (2**31, np.int64, np.int32),
    (-1, np.int64, np.uint32),
    (2**20, np.int32, F16),
  ):
    with pytest.raises(OverflowError, match=f"^{number} does not fit into {np.dtype(target)}$"):
      cast(np.array([0, number], source), np.dtype(target))
