"""Names of stacked layers: `layers.0:24:6.attn.q_proj.w` holds the parameter of layers 0, 6, 12 and 18 in one array.

A part of a name that is a slice stands for the layers that `layers[0:24:6]` would be, in that order. The array has an
axis of layers in front of the axes that the parameter has in one layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

# A part of a name such as "0:24:6" or "0:16".
_SLICE = re.compile(r"(?<![^.])(\d+):(\d+)(?::(\d+))?(?![^.])")


def stack_name(layers: range) -> str:
  """The part of a name that stands for some layers: `range(0, 24, 6)` is "0:24:6", and `range(16)` is "0:16"."""
  return f"{layers.start}:{layers.stop}" + (f":{layers.step}" if layers.step > 1 else "")


def layers_of(name: str) -> range | None:
  """The layers whose parameters an array of this name holds; None if it is no stack."""
  found = _SLICE.search(name)
  return range(int(found[1]), int(found[2]), int(found[3] or 1)) if found else None


def name_in(name: str, layer: int | str) -> str:
  """The name of a stack's parameter in one layer: of "layers.0:16.attn.q_proj.w" in layer 3, "layers.3.attn.q_proj.w"."""
  return _SLICE.sub(str(layer), name, count=1)


def layer_names(name: str) -> list[str]:
  """The name of a parameter in each layer that it holds; the name itself if it is no stack."""
  layers = layers_of(name)
  return [name] if layers is None else [name_in(name, layer) for layer in layers]


def in_order(names: Iterable[str]) -> list[str]:
  """Names of parameters in the order that a model without stacks has."""
  return sorted(names, key=lambda name: [_rank(part) for part in name.split(".")])


def _rank(part: str) -> tuple[int, Any]:
  return (0, int(part)) if part.isdigit() else (1, part)


def without_stacks(config: Any) -> Any:
  """The configuration of the same model whose layers are not stacked: the one that files and adapters know."""
  return dataclasses.replace(config, scan_layers=False) if getattr(config, "scan_layers", False) else config


def find_stacks(kinds: Sequence[Any]) -> list[range]:
  """Which layers are stacked, such that layers of a stack are of one kind and units of several layers repeat.

  From the first layer on, the unit is taken whose repetitions cover most layers. A layer that no unit repeats is a
  stack of its own. Example: kinds "SSGSSGS" give the layers 0:6:3, 1:6:3, 2:6:3 and 6:7.

  Args:
    kinds: of each layer; layers of one kind have the same structure, and are called alike.
  """
  stacks: list[range] = []
  start = 0
  while start < len(kinds):
    left = kinds[start:]
    counts = {size: _repetitions(left, size) for size in range(1, len(left) // 2 + 1)}
    # The longest run, and the smallest unit of those.
    size = max((size for size in counts if counts[size] > 1), key=lambda size: size * counts[size], default=1)
    length = size * counts.get(size, 1)
    stacks += [range(start + at, start + length, size) for at in range(size)]
    start += length
  return stacks


def _repetitions(kinds: Sequence[Any], size: int) -> int:
  """How often the first `size` kinds occur one after another."""
  count = 1
  while list(kinds[count * size : (count + 1) * size]) == list(kinds[:size]):
    count += 1
  return count
