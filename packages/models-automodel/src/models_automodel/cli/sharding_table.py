"""Which device holds which part of each parameter, as a drawing. No device is needed."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models_automodel.cli.memory import readable
from models_automodel.cli.tables import table

if TYPE_CHECKING:
  from rich.console import RenderableType
  from rich.table import Table

  from models_core.loading import AbstractParameter

# Rows and columns of a drawing, at most; of more, the first ones and the last are drawn.
_MOST = 8
# Numbers of devices in a part, at most.
_FEW = 4
# Of parts, in turn; readable under black text.
_COLOURS = ("cyan", "yellow", "green", "red", "magenta", "blue", "bright_cyan", "bright_yellow")


@dataclasses.dataclass(frozen=True)
class Split:
  """How parameters are split over a mesh. Parameters of equal splits have the same drawing.

  Attributes:
    mesh: size of each mesh axis, by name.
    axes: for each axis of the parameter, the mesh axes that shard it.
  """

  mesh: tuple[tuple[str, int], ...]
  axes: tuple[tuple[str, ...], ...]

  @classmethod
  def of(cls, parameter: AbstractParameter) -> Split:
    """How a parameter is split. Without a mesh, one device holds it."""
    from jax.sharding import NamedSharding

    from models_core.sharding import axis_names

    sharding = parameter.sharding
    if not isinstance(sharding, NamedSharding):
      return cls((), ((),) * len(parameter.shape))
    spec = [axis_names(entry) for entry in sharding.spec]
    spec += [()] * (len(parameter.shape) - len(spec))
    return cls(tuple(sharding.mesh.shape.items()), tuple(spec))

  def parts(self) -> tuple[int, ...]:
    """Number of parts along each axis of the parameter."""
    sizes = dict(self.mesh)
    return tuple(math.prod(sizes[name] for name in names) for names in self.axes)

  def holders(self, part: Sequence[int]) -> Iterator[int]:
    """Numbers of the devices, in the order of the mesh, that hold a part: its index along each axis."""
    sizes = dict(self.mesh)
    fixed: dict[str, int] = {}
    for index, names in zip(part, self.axes, strict=True):
      for name in reversed(names):
        index, fixed[name] = divmod(index, sizes[name])
    choices = [[fixed[name]] if name in fixed else range(size) for name, size in self.mesh]
    for place in itertools.product(*choices):
      number = 0
      for index, (_, size) in zip(place, self.mesh, strict=True):
        number = number * size + index
      yield number

  def __str__(self) -> str:
    entries = ["None" if not names else repr(names[0] if len(names) == 1 else names) for names in self.axes]
    return f"P({', '.join(entries)})"


def splits(parameters: Iterable[AbstractParameter]) -> dict[Split, list[AbstractParameter]]:
  """Parameters by how they are split, those of many parts first."""
  found: dict[Split, list[AbstractParameter]] = collections.defaultdict(list)
  for parameter in parameters:
    found[Split.of(parameter)].append(parameter)
  return dict(sorted(found.items(), key=lambda item: -math.prod(item[0].parts())))


def of_sharding(parameters: Iterable[AbstractParameter]) -> list[RenderableType]:
  """A drawing for each way in which parameters are split, beside the parameters that are split so."""
  from rich.table import Table
  from rich.text import Text

  made: list[RenderableType] = [Text("Numbers are those of devices, along the mesh.")]
  for split, same in splits(parameters).items():
    parts = " x ".join(map(str, split.parts()))
    cut = "whole on each device" if math.prod(split.parts()) == 1 else f"{parts} parts"
    beside = Table.grid(padding=(0, 3))
    beside.add_row(drawing(split), _listed(split, same))
    made += [Text(f"\n{split}: {cut}", "bold"), beside]
  return made


def _listed(split: Split, same: Sequence[AbstractParameter]) -> Table:
  from rich.text import Text

  made = table("", "count", "name", "shape", "on each device", numbers=("count",))
  names = collections.Counter((star(parameter.name), tuple(parameter.shape)) for parameter in same)
  for (name, shape), count in names.items():
    part = [size // parts for size, parts in zip(shape, split.parts(), strict=True)]
    made.add_row(str(count), name, Text(str(list(shape))), Text(str(part)))
  return made


def star(name: str) -> str:
  """The name of a parameter with `*` in place of the numbers of layers."""
  return ".".join("*" if part.isdigit() else part for part in name.split("."))


def drawing(split: Split) -> Table:
  """A grid of the parts, each with the devices that hold it.

  Rows are the parts along the first axis that is split, columns those along all others.
  """
  from rich import box
  from rich.table import Table
  from rich.text import Text

  # A parameter without axes is one part, too.
  parts = split.parts() or (1,)
  first = next((axis for axis, count in enumerate(parts) if count > 1), 0)
  lines = list(itertools.product(*((None,) if axis == first else range(n) for axis, n in enumerate(parts))))
  cells = [[_label(split, lines, row, column) for column in _some(len(lines))] for row in _some(parts[first])]
  width = max(len(label) for row in cells for label in row)
  colours = itertools.cycle(_COLOURS)
  grid = Table(box=box.SQUARE, show_header=False, show_lines=True, padding=0)
  for row in cells:
    grid.add_row(*(Text(f" {label:{width}} ", f"#000000 on {next(colours)}") for label in row))
  return grid


def _label(split: Split, lines: Sequence[Sequence[int | None]], row: int | None, column: int | None) -> str:
  """Numbers of the devices of a part: "0 4", or "0 1 2 3 ..." of many; "..." for parts that are left out."""
  if row is None or column is None:
    return "..."
  place = [row if index is None else index for index in lines[column]]
  held = split.holders(place[: len(split.axes)])
  few = list(itertools.islice(held, _FEW + 1))
  return " ".join(map(str, few[:_FEW])) + (" ..." if len(few) > _FEW else "")


def _some(count: int) -> list[int | None]:
  """Indices up to a count; of many, the first ones, None, and the last."""
  return list(range(count)) if count <= _MOST else [*range(_MOST - 2), None, count - 1]


def of_memory(parameters: Mapping[str, Any], width: int = 40) -> list[RenderableType]:
  """Bars of the memory of one device, by name of the parameters.

  Args:
    parameters: bytes on a device of each parameter, by name.
    width: characters of the longest bar.
  """
  found: dict[str, int] = collections.Counter()
  for name, nbytes in parameters.items():
    found[star(name)] += nbytes
  most = max(found.values())
  made = table("memory of one device", "parameters", "bytes", "", numbers=("bytes",))
  for name, nbytes in sorted(found.items(), key=lambda item: -item[1]):
    made.add_row(name, readable(nbytes), f"[cyan]{'█' * max(1, round(width * nbytes / most))}[/cyan]")
  return [made]
