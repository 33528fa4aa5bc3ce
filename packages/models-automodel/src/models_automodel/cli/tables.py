"""Tables for a terminal, made with rich. What is not a terminal gets plain lines instead, from the commands themselves.

rich takes 0.1 s to import, so that this module is imported where a table is printed.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models_automodel.cli.memory import readable

if TYPE_CHECKING:
  from rich.console import RenderableType
  from rich.table import Table

  from models_core.loading import LoadPlan


# Columns of what is piped or written to a file, which must not depend on how wide some terminal is.
_WIDTH = 140


def is_terminal() -> bool:
  """Whether standard output is a terminal that can show tables."""
  return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def print_renderables(found: Iterable[RenderableType]) -> None:
  """Prints what rich renders: in colours to a terminal, as plain text elsewhere."""
  from rich.console import Console

  console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
  for renderable in found:
    console.print(renderable)


def columns(names: Sequence[str]) -> list[str]:
  """Names side by side, as `ls` prints them; without rich, for `list` starts in 0.2 s."""
  width = max(map(len, names)) + 2
  count = max(1, (shutil.get_terminal_size().columns - 2) // width)
  lines = -(-len(names) // count)
  return ["  " + "".join(name.ljust(width) for name in names[i::lines]).rstrip() for i in range(lines)]


def table(title: str, *headings: str, numbers: Sequence[str] = ()) -> Table:
  """An empty table. The columns `numbers` are aligned at the right."""
  from rich import box
  from rich.table import Table

  made = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, header_style="bold")
  for heading in headings:
    made.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
  return made


def of_show(shown: Mapping[str, Any], shapes: Mapping[str, Sequence[Sequence[int]]]) -> list[RenderableType]:
  """Tables of a configuration, of the parameters and of the memory.

  Args:
    shown: what `automodel show --json` prints.
    shapes: of the parameters of each name, with `*` for the numbers of layers.
  """
  from rich.columns import Columns
  from rich.text import Text

  config = table(f"{shown['family']}: configuration", "field", "value")
  for name, value in shown["config"].items():
    config.add_row(name, Text(str(value)))
  parameters = table("parameters", "count", "name", "shape", "elements", numbers=("count", "elements"))
  for name, same in shapes.items():
    elements = sum(math.prod(shape) for shape in same)
    parameters.add_row(str(len(same)), Text(name), Text(_shapes(same)), f"{elements:,}")
  parameters.add_section()
  total = shown["num_parameters"]
  parameters.add_row("", "all", "", f"[bold]{total:,}[/bold]")
  memory = table("memory", "what", "bytes", numbers=("bytes",))
  memory.add_row("weights in bfloat16", readable(2 * total))
  memory.add_row("weights in float32", readable(4 * total))
  if "num_devices" in shown:
    devices, part = shown["num_devices"], shown["num_parameters_per_device"]
    where = f"on each of {devices} device{'s' * (devices != 1)}"
    memory.add_row(f"weights in bfloat16, {where}", readable(2 * part))
    memory.add_row(f"weights in float32, {where}", readable(4 * part))
  whole, ring = shown["kv_cache_bytes"], shown["kv_cache_bytes_with_rings"]
  memory.add_row(f"KV cache of {shown['context']:,} tokens in bfloat16", readable(whole))
  if ring < whole:
    memory.add_row("the same, with sliding windows in rings", readable(ring))
  return [Columns([config]), parameters, memory]


def _shapes(same: Sequence[Sequence[int]]) -> str:
  return " or ".join(str(list(shape)) for shape in dict.fromkeys(map(tuple, same)))


def of_plan(plan: LoadPlan) -> list[RenderableType]:
  """Tables of what loading will do, and its notes."""
  from rich.text import Text

  made = table("plan", "what", "value")
  made.add_row("checkpoint", Text(plan.checkpoint.files.path))
  made.add_row("parameters", f"{plan.num_parameters:,}")
  made.add_row(
    "to read", f"{readable(plan.stored_nbytes)} from {len(plan.files)} file{'s' * (len(plan.files) != 1)}"
  )
  for nbytes, count in plan.shares().items():
    made.add_row("on each device", f"{readable(nbytes)} x {count} device{'s' * (count != 1)}")
  for (stored, loaded), count in plan.casts().items():
    made.add_row("cast", Text(f"{stored} -> {loaded}: {count} tensor{'s' * (count != 1)}"))
  for tie in plan.ties:
    made.add_row("tied", Text(f"{tie.tensor} must equal {tie.twin}"))
  return [made, *(Text(f"note: {note}", "yellow") for note in plan.notes())]


def of_environment(found: Mapping[str, Any]) -> list[RenderableType]:
  """A table for each part of what `automodel env` found."""
  from rich.text import Text

  made = table("environment", "what", "value")
  for name, value in found.items():
    if not isinstance(value, dict):
      made.add_row(name, Text(str(value)))
  parts = [made]
  for name, value in found.items():
    if isinstance(value, dict) and value:
      part = table(name, "name", "value")
      for key, inner in value.items():
        part.add_row(key, Text(str(inner)))
      parts.append(part)
  return list(parts)
