"""Products of activations and weights, as each backend takes them best: the numbers are those of one plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models_core.hlo import Program
from models_core.layers.linear import product


def plain(x, w):
  return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def gradients(function, x, w):
  weight = np.random.default_rng(2).normal(size=(*x.shape[:-1], w.shape[0])).astype(np.float32)
  loss = lambda x, w: jnp.sum(function(x, w).astype(jnp.float32) * weight)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)


def arrays(rows, out, dtype):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(*rows, 24)), dtype), jnp.asarray(rng.normal(size=(out, 24)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (1, 3), (4, 1), (2, 40)], ids=str)
@pytest.mark.parametrize("out", [8, 40])
def test_a_product_is_rounded_once_and_has_the_gradients_of_a_plain_one(dtype, rows, out):
  x, w = arrays(rows, out, dtype)
  y = jax.jit(lambda x, w: product(x, w, dtype))(x, w)
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
  assert y.dtype == dtype
  if dtype != "float32":
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert (error <= np.maximum(np.abs(exact), 1e-2) * float(jnp.finfo(dtype).eps) * 0.51).all()
  wide = [array.astype(jnp.float32) for array in (x, w)]
  _, expected = gradients(plain, *wide)
  _, actual = gradients(lambda x, w: product(x, w, jnp.float32), x, w)
  tolerance = 1e-5 if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)
  for ours, theirs in zip(actual, expected, strict=True):
    assert ours.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(ours, np.float32), theirs, atol=tolerance * float(np.abs(theirs).max())
    )


@pytest.mark.parametrize("rows", [1, 16, 128])
def test_no_weight_is_converted_in_either_pass(rows):
  x, w = jax.ShapeDtypeStruct((1, rows, 64), jnp.bfloat16), jax.ShapeDtypeStruct((256, 64), jnp.bfloat16)
  forward = lambda x, w: product(x, w, x.dtype)
  backward = lambda x, w: jax.grad(lambda x: forward(x, w).astype(jnp.float32).sum())(x)
  for function in (forward, backward):
    program = Program(jax.jit(function).lower(x, w).compile().as_text())
    assert not [use for use in program.copies if "w" in use.arguments]


@pytest.mark.parametrize("rows", [(1, 2), (8, 1), (2, 16), (8,)], ids=str)
def test_few_rows_are_the_second_factor(rows):
  x, w = jax.ShapeDtypeStruct((*rows, 64), jnp.float32), jax.ShapeDtypeStruct((256, 64), jnp.float32)
  compiled = jax.jit(lambda x, w: jax.nn.silu(product(x, w, x.dtype))).lower(x, w).compile()
  (line,) = [line for line in compiled.as_text().splitlines() if " dot(" in line]
  assert line.partition(" = f32[")[2].startswith("256")


def test_the_gradient_of_a_weight_transposes_the_smaller_factor():
  x, w = jax.ShapeDtypeStruct((4096, 32), jnp.float32), jax.ShapeDtypeStruct((1024, 32), jnp.float32)

  def temporaries(function):
    run = lambda x, w, dy: jax.vjp(lambda w: function(x, w), w)[1](dy)
    dy = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    return jax.jit(run).lower(x, w, dy).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(lambda x, w: product(x, w, jnp.float32)) <= 4 * (4096 * 32 + 1024 * 32) * 1.1


def test_few_rows_of_float32_can_be_differentiated_forwards():
  x, w = arrays((1, 5), 8, "float32")
  _, change = jax.jvp(lambda x: product(x, w, jnp.float32), (x,), (x,))
  expected = np.asarray(plain(x, w))
  np.testing.assert_allclose(change, expected, rtol=0, atol=1e-6 * float(np.abs(expected).max()))
