"""The all-to-all of expert parallelism: rows go to the devices of their experts, and results come back.

Each device sends each other one as many rows as the router chose, which only the running program knows. The buffers are
as long as the worst case, all rows of all devices to one of them, so that no routing drops a row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models_core.layers.grouped import Names, varying


class Route(NamedTuple):
  """Which rows a device sends to each of X devices, itself included, and which it receives: int32 [X] each.

  Attributes:
    starts: first row of those sent to a device.
    sizes: number of rows sent to a device.
    places: where the rows sent to a device begin among those that it receives.
    arriving: number of rows received from a device.
  """

  starts: jax.Array
  sizes: jax.Array
  places: jax.Array
  arriving: jax.Array


def routes(counts: jax.Array, axes: Names) -> tuple[Route, Route, jax.Array]:
  """Plans an exchange along mesh axes: inside shard_map.

  Args:
    counts: int32 [X, E], number of this device's rows for each of E experts of each of X devices. Rows lie in the order
      of devices, and for each device in that of its experts.
    axes: the mesh axes, X devices in all.

  Returns:
    The route there, the route back, and int32 [X, E]: the number of rows that arrive from each device for each of this
    device's experts. They lie in that order.
  """
  device = lax.axis_index(axes)
  everyones = lax.all_gather(counts, axes)  # [X from, X to, E]: numbers alone
  sizes = jnp.sum(everyones, axis=2)
  starts, places = (jnp.cumsum(sizes, axis=axis) - sizes for axis in (1, 0))
  there = Route(starts[device], sizes[device], places[device], sizes[:, device])
  back = Route(places[:, device], sizes[:, device], starts[:, device], sizes[device])
  return there, back, everyones[:, device]


def exchange(
  rows: jax.Array, there: Route, back: Route, length: int, axes: Names, mesh_axes: Names
) -> jax.Array:
  """Sends rows along a route, and their gradients along the route back.

  Args:
    rows: [M, D].
    there: the route.
    back: the same from the receivers' side.
    length: L, number of rows of the result: at least as many as can arrive.
    axes: the mesh axes along which rows are sent.
    mesh_axes: all mesh axes along which arrays differ, inside shard_map.

  Returns:
    [L, D]: rows that arrive, each at the place that its route says; all others are 0.
  """
  return _exchange(rows, there, back, (rows.shape[0], length), axes, mesh_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchange(
  rows: jax.Array, there: Route, back: Route, lengths: tuple[int, int], axes: Names, mesh_axes: Names
) -> jax.Array:
  return _move(rows, there, lengths[1], axes, mesh_axes)


def _forward(
  rows: jax.Array, there: Route, back: Route, lengths: tuple[int, int], axes: Names, mesh_axes: Names
) -> tuple[jax.Array, Route]:
  return _move(rows, there, lengths[1], axes, mesh_axes), back


def _backward(
  lengths: tuple[int, int], axes: Names, mesh_axes: Names, back: Route, dy: jax.Array
) -> tuple[jax.Array, None, None]:
  return _move(dy, back, lengths[0], axes, mesh_axes), None, None


_exchange.defvjp(_forward, _backward)


def _move(rows: jax.Array, route: Route, length: int, axes: Names, mesh_axes: Names) -> jax.Array:
  out = varying(jnp.zeros((length, rows.shape[1]), rows.dtype), mesh_axes)
  return lax.platform_dependent(
    rows,
    out,
    *route,
    # XLA's CPU backend has no ragged all-to-all.
    cpu=functools.partial(_equal_all_to_all, axes=axes),
    default=functools.partial(lax.ragged_all_to_all, axis_name=axes),
  )


def _equal_all_to_all(
  rows: jax.Array,
  out: jax.Array,
  starts: jax.Array,
  sizes: jax.Array,
  places: jax.Array,
  arriving: jax.Array,
  axes: Names,
) -> jax.Array:
  """The result of `lax.ragged_all_to_all`, by an all-to-all of blocks that hold as many rows as one device can send."""
  block = jnp.arange(min(rows.shape[0], out.shape[0]), dtype=jnp.int32)
  sent = jnp.where(block < sizes[:, None], starts[:, None] + block, rows.shape[0])
  blocks = lax.all_to_all(rows.at[sent].get(mode="fill", fill_value=0), axes, 0, 0)
  places = lax.all_to_all(places, axes, 0, 0, tiled=True)
  targets = jnp.where(block < arriving[:, None], places[:, None] + block, out.shape[0])
  return out.at[targets].set(blocks, mode="drop")
