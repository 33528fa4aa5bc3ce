"""What the benchmarks found: a page, and plots as SVG, from the files that benchmarks/record.py writes."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
# Colours that are told apart with any eyes, on white and on dark grey; those of what occurs in several plots first.
COLOURS = {
  "models-automodel": "#1F7FC1",
  "models-llama": "#1F7FC1",
  "models-qwen": "#1F7FC1",
  "google-tunix": "#E69F00",
  "transformers": "#D55E00",
  "safetensors": "#56B4E9",
  "floor": "#999999",
  "weights read once": "#999999",
}
OTHERS = ("#1F7FC1", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = "osD^v"
STYLE: dict[Any, Any] = {
  "svg.hashsalt": "benchmarks",
  "svg.fonttype": "none",
  "font.size": 10,
  "font.sans-serif": ["DejaVu Sans", "Verdana"],
  "axes.spines.top": False,
  "axes.spines.right": False,
  **{f"{part}.color": "#888888" for part in ("text", "xtick", "ytick", "grid")},
  **{f"axes.{part}": "#888888" for part in ("edgecolor", "labelcolor", "titlecolor")},
}
# Inches.
WIDTH, BAR, LINES = 8.0, 0.21, 4.2
NONE = (
  "There are no results: `python benchmarks/record.py load` runs a [benchmark](benchmarks.md), and writes what it finds"
  " into `benchmarks/results`, where this page takes it from."
)
INTRODUCTION = (
  "[Benchmarks](benchmarks.md) says what each script measures, and what the columns of its table mean. Only ratios"
  " within one table carry over to other machines."
)
_HEADING = re.compile(r"^## (.+): `(\w+)\.py`$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Point(NamedTuple):
  """A number of a table, with the group and the series to which it belongs."""

  group: str
  series: str
  value: float


@dataclasses.dataclass(frozen=True)
class Plot:
  """Which columns of a result go where.

  `group` and `series` name a point: templates of columns, of what `parts` takes out of a column's cells, and of
  `value`, the label of the column of numbers. The groups of lines are numbers.
  """

  name: str
  result: str
  title: str
  unit: str
  values: Mapping[str, str]
  group: str
  series: str
  draw: Callable[[Plot, Sequence[Point]], Figure]
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  across: str = ""
  logarithmic: bool = False


# --- From a file to points -----------------------------------------------------------------------------------------


def split(text: str) -> tuple[str, str]:
  """The header of a result, and what the benchmark printed."""
  header, _, printed = text.partition("\n\n")
  return header, printed


def table(text: str) -> list[dict[str, str]]:
  """The rows of the first Markdown table of a text, each by the names of its columns; none where there is no table."""
  lines = [line.strip() for line in text.splitlines()]
  starts = [
    i for i in range(len(lines) - 1) if lines[i].startswith("|") and re.match(r"\|[-:| ]+$", lines[i + 1])
  ]
  if not starts:
    return []
  names, rows = _cells(lines[starts[0]]), []
  for line in lines[starts[0] + 2 :]:
    if not line.startswith("|"):
      break
    rows.append(dict(zip(names, _cells(line), strict=True)))
  return rows


def _cells(line: str) -> list[str]:
  """The cells of a line of a table."""
  return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


def points(plot: Plot, rows: Iterable[Mapping[str, str]], file: str) -> list[Point]:
  """What a plot shows of a table.

  Raises:
    ValueError: if the table lacks a column, or a cell has another form; the message names the file and the column.
  """
  found = []
  for row in rows:
    cells = dict(row)
    try:
      for column, pattern in plot.parts.items():
        cells |= _match(pattern, row[column], file, column).groupdict()
      for column, label in plot.values.items():
        names = cells | {"value": label}
        number = float(_match(_NUMBER, row[column].replace(",", ""), file, column)[0])
        found.append(Point(plot.group.format_map(names), plot.series.format_map(names), number))
    except KeyError as error:
      raise ValueError(f"{file}: the table has no column {error.args[0]!r}") from error
  if not found:
    raise ValueError(f"{file}: there is no table with the columns {', '.join(map(repr, plot.values))}")
  return found


def _match(pattern: str | re.Pattern[str], cell: str, file: str, column: str) -> re.Match[str]:
  """The match of a cell's beginning."""
  if match := re.match(pattern, cell):
    return match
  raise ValueError(f"{file}: column {column!r} has a cell {cell!r}, which is not understood")


# --- From points to a picture --------------------------------------------------------------------------------------


def bars(plot: Plot, found: Sequence[Point]) -> Figure:
  """Horizontal bars, group by group, a colour for each series."""
  groups = list(dict.fromkeys(point.group for point in found))
  colours = colours_of(point.series for point in found)
  figure, axes = empty(plot, 1.2 + BAR * (len(found) + 0.7 * len(groups)))
  top, middles = 0.0, []
  for group in groups:
    members = [point for point in found if point.group == group]
    for place, point in enumerate(members):
      bar = axes.barh(top + place, point.value, 0.86, color=colours[point.series], label=point.series)
      axes.bar_label(bar, [short(point.value)], padding=3)
    middles.append(top + (len(members) - 1) / 2)
    top += len(members) + 0.7
  axes.set_yticks(middles, groups)
  axes.tick_params(axis="y", length=0)
  axes.set_ylim(top - 0.7, -0.7)
  axes.margins(x=0.1)
  axes.set_xlabel(plot.unit)
  legend(figure, axes)
  return figure


def lines(plot: Plot, found: Sequence[Point]) -> Figure:
  """A line for each series, over the numbers that name the groups."""
  colours = colours_of(point.series for point in found)
  figure, axes = empty(plot, LINES)
  if plot.logarithmic:
    axes.set(xscale="log", yscale="log")
  for marker, series in zip(itertools.cycle(MARKERS), colours, strict=False):
    members = sorted((float(point.group), point.value) for point in found if point.series == series)
    axes.plot(*zip(*members, strict=True), marker=marker, color=colours[series], label=series)
  places = sorted({float(point.group) for point in found})
  axes.set_xticks(places, [short(place) for place in places])
  axes.yaxis.set_major_formatter(lambda value, _: short(value))
  axes.minorticks_off()
  if not plot.logarithmic:
    axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  axes.set(xlabel=plot.across, ylabel=plot.unit)
  legend(figure, axes)
  return figure


def empty(plot: Plot, height: float) -> tuple[Figure, Axes]:
  """A figure with its title."""
  from matplotlib.figure import Figure

  figure = Figure((WIDTH, height), layout="constrained")
  axes = figure.subplots()
  axes.set_title(plot.title, loc="left", fontweight="bold")
  return figure, axes


def legend(figure: Figure, axes: Axes) -> None:
  """Names the series above the plot, where there are several."""
  handles, names = axes.get_legend_handles_labels()
  named = dict(zip(names, handles, strict=True))
  if len(named) > 1:
    figure.legend(
      named.values(), named.keys(), loc="outside upper left", ncols=min(5, len(named)), frameon=False
    )


def colours_of(names: Iterable[str]) -> dict[str, str]:
  """A colour for each name, in the order of the names."""
  names = list(dict.fromkeys(names))
  known = {name: COLOURS[name] for name in names if name in COLOURS}
  others = itertools.cycle(colour for colour in OTHERS if colour not in known.values())
  return {name: known.get(name) or next(others) for name in names}


def short(value: float) -> str:
  """A number with three digits or more, without an exponent."""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def svg(plot: Plot, found: Sequence[Point]) -> str:
  """A plot as SVG, the same for the same points."""
  import matplotlib as mpl

  file = io.StringIO()
  with mpl.rc_context(STYLE):
    metadata = {"Title": plot.title, "Date": None, "Creator": None}
    plot.draw(plot, found).savefig(file, format="svg", transparent=True, metadata=metadata)
  return file.getvalue()


# --- Pictures and the page -----------------------------------------------------------------------------------------

# The label of the column of numbers, as the name of a group or series.
VALUE = "{value}"
PLOTS = (
  Plot(
    "load",
    "load",
    "Loading a checkpoint",
    "seconds, median",
    {"median s": "seconds"},
    group="{checkpoint}, devices: {devices}",
    series="{variant}",
    draw=bars,
  ),
  Plot(
    "processes",
    "processes",
    "Loading with four processes",
    "seconds, median",
    {"median s": "seconds"},
    group="{mesh}",
    series="",
    draw=bars,
  ),
  Plot(
    "processes-memory",
    "processes",
    "The memory of each of four processes",
    "MB",
    {"shards of a process, MB": "its shards", "memory beside them, MB": "memory beside them"},
    group="{mesh}",
    series=VALUE,
    draw=bars,
  ),
  Plot(
    "cache",
    "cache",
    "Loading without the shard cache, for the first time, and again",
    "seconds, median",
    {"median s": "seconds"},
    group="{load}, devices: {devices}",
    series="{variant}",
    draw=bars,
  ),
  Plot(
    "generation-decode",
    "generation",
    "Tokens after the first",
    "tokens per second",
    {"decode, tokens/s": "decode"},
    group="batch {batch}, prompt {prompt}",
    series="{library}",
    draw=bars,
  ),
  Plot(
    "generation-all",
    "generation",
    "All tokens, with the time of the prompt",
    "tokens per second",
    {"all, tokens/s": "all"},
    group="batch {batch}, prompt {prompt}",
    series="{library}",
    draw=bars,
  ),
  Plot(
    "first-token",
    "first_token",
    "From the start to the first token",
    "seconds, median",
    {
      "load, s": "load",
      "programs from the cache, s": "programs from the cache",
      "step, s": "step",
      "together, s": "all, together",
      "apart, s": "all, one after the other",
    },
    group=VALUE,
    series="",
    draw=bars,
  ),
  Plot(
    "save",
    "save",
    "Saving a checkpoint",
    "seconds, median",
    {"median s": "seconds"},
    group="{variant}",
    series="",
    draw=bars,
  ),
  Plot(
    "steps",
    "steps",
    "A prefill and a decoded token",
    "milliseconds",
    {"decode ms": "decode", "prefill ms": "prefill"},
    group=VALUE,
    series="{variant}",
    draw=bars,
  ),
  Plot(
    "attention",
    "attention",
    "Attention block by block and all at once",
    "milliseconds",
    {"dense ms": "dense", "blockwise ms": "blockwise"},
    group="{T}",
    series="{value}, {pass}",
    draw=lines,
    across="tokens",
    logarithmic=True,
  ),
  Plot(
    "compile",
    "compile",
    "Compiling a prefill",
    "seconds, least",
    {"min s": "seconds"},
    group="{depth}",
    series="{form}",
    draw=lines,
    parts={"variant": r"(?P<depth>\d+) layers, (?P<form>.+)"},
    across="layers",
  ),
)


def results(folder: pathlib.Path = RESULTS) -> dict[str, str]:
  """The text of each result that is there, in the order of the benchmarks' README."""
  files = {name: folder / f"{name}.md" for name in titles()}
  return {name: file.read_text() for name, file in files.items() if file.exists()}


def titles() -> dict[str, str]:
  """Script and title of each section of the benchmarks' README."""
  return {script: title for title, script in _HEADING.findall((BENCHMARKS / "README.md").read_text())}


def pictures(folder: pathlib.Path = RESULTS) -> Iterator[tuple[str, str]]:
  """Name and SVG of each plot whose result is there."""
  texts = results(folder)
  for plot in PLOTS:
    if plot.result in texts:
      rows = table(split(texts[plot.result])[1])
      yield f"benchmark-{plot.name}", svg(plot, points(plot, rows, str(folder / f"{plot.result}.md")))


def page(folder: pathlib.Path = RESULTS) -> str:
  """The page of all results: for each the command and the machine, the plots, and what was printed."""
  named = titles()
  sections = [section(named[name], name, text) for name, text in results(folder).items()]
  parts = ["# What the benchmarks found", *([INTRODUCTION, *sections] if sections else [NONE])]
  return "\n\n".join(parts) + "\n"


def section(title: str, name: str, text: str) -> str:
  """The section of a result."""
  header, printed = split(text)
  plots = [f"![{plot.title}](pictures/benchmark-{plot.name}.svg)" for plot in PLOTS if plot.result == name]
  return "\n\n".join([f"## {title}", header, *plots, printed.strip()])
