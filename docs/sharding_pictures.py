"""Pictures of how a mesh of eight devices shards weights: SVG, from the default ShardingConfig."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from models_core.sharding import ShardingConfig, axis_names

MESH = {"fsdp": 2, "tp": 4}
# One colour for each device, readable under dark text.
COLOURS = ("#8ecae6", "#ffd166", "#95d5b2", "#f4978e", "#cdb4db", "#ffb703", "#a3b18a", "#e0aaff")
# Title, field of the ShardingConfig, axes of the parameter as [rows, columns].
WEIGHTS = (
  ("embedding [V, D]", "emb_vd", "v d"),
  ("q_proj.w [N * H, D]", "q_weight_dnh", "(n h) d"),
  ("o_proj.w [D, N * H]", "o_weight_nhd", "d (n h)"),
  ("gate_proj.w [F, D]", "ffw_weight_df", "f d"),
  ("down_proj.w [D, F]", "ffw_weight_fd", "d f"),
)
SIZE, GAP, TOP = 128, 24, 28


def pictures() -> Iterator[tuple[str, str]]:
  """Name and SVG of each picture: the default sharding for training, and the one for sampling."""
  for name, sampling in (("sharding-training", False), ("sharding-sampling", True)):
    yield name, picture(ShardingConfig.get_default_sharding(is_sampling=sampling))


def picture(sharding: ShardingConfig) -> str:
  """All weights side by side, each a square whose parts show the numbers of the devices that hold them."""
  width, height = len(WEIGHTS) * (SIZE + GAP) - GAP, SIZE + TOP
  body = [
    weight(title, sharding.spec(field, axes), i * (SIZE + GAP))
    for i, (title, field, axes) in enumerate(WEIGHTS)
  ]
  style = 'font-family="sans-serif" font-size="11" text-anchor="middle"'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 0 {width + 2} {height + 1}" role="img" {style}>'
    f"<title>Which device holds which part of each weight</title>{''.join(body)}</svg>\n"
  )


def weight(title: str, spec: Sequence[object], left: int) -> str:
  """One weight: its title above a grid of parts."""
  rows, columns = (axis_names(spec[i]) if i < len(spec) else () for i in range(2))
  parts = [f'<text x="{left + SIZE / 2}" y="16" fill="currentColor">{title}</text>']
  for row in range(size(rows)):
    for column in range(size(columns)):
      held = [d for d in range(8) if place(d, rows) == row and place(d, columns) == column]
      parts.append(part(left, row, size(rows), column, size(columns), held))
  return "".join(parts)


def part(left: int, row: int, rows: int, column: int, columns: int, devices: Sequence[int]) -> str:
  """One part of a weight: a rectangle with the devices that hold it."""
  width, height = SIZE / columns, SIZE / rows
  x, y = left + column * width, TOP + row * height
  label = " ".join(map(str, devices)) if len(devices) < 8 else "all"
  return (
    f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{COLOURS[devices[0]]}" stroke="#333"/>'
    f'<text x="{x + width / 2:g}" y="{y + height / 2 + 4:g}" fill="#111">{label}</text>'
  )


def size(names: Sequence[str]) -> int:
  """The number of parts into which mesh axes divide an axis."""
  parts = 1
  for name in names:
    parts *= MESH[name]
  return parts


def place(device: int, names: Sequence[str]) -> int:
  """Which part along these mesh axes a device holds. Device numbers count along tp first."""
  where = {"fsdp": device // MESH["tp"], "tp": device % MESH["tp"]}
  index = 0
  for name in names:
    index = index * MESH[name] + where[name]
  return index
