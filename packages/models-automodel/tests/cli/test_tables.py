import io
import json
import os
import pty
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from rich.console import Console

from models_automodel.cli import main
from models_automodel.cli.memory import readable
from models_automodel.cli.sharding_table import Split, drawing, of_memory, star


def mesh(**axes):
  return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def split(mesh, *axes):
  return Split(tuple(mesh.shape.items()), tuple(axes))


def rendered(what, encoding="utf-8"):
  file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  Console(file=file, width=100).print(what)
  file.flush()
  return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
  "spec", [("tp", "fsdp"), ("fsdp", "tp"), (None, "fsdp"), (("tp", "fsdp"), None), (("fsdp", "tp"), None), ()]
)
def test_devices_hold_what_jax_gives_them(spec):
  """Against the boxes that a NamedSharding of real devices computes."""
  import jax

  real = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
  names = [(entry,) if isinstance(entry, str) else entry or () for entry in (*spec, None, None)][:2]
  found = split(mesh(fsdp=2, tp=2), *names)
  shape = (8, 8)
  boxes = NamedSharding(real, PartitionSpec(*spec)).devices_indices_map(shape)
  for number, device in enumerate(real.devices.flat):
    part = [
      (box.start or 0) * parts // n for box, parts, n in zip(boxes[device], found.parts(), shape, strict=True)
    ]
    assert number in list(found.holders(part))
    others = [list(found.holders([i, j])) for i in range(found.parts()[0]) for j in range(found.parts()[1])]
    assert sum(number in held for held in others) == 1


def test_a_drawing_has_a_cell_for_each_part():
  lines = rendered(drawing(split(mesh(fsdp=2, tp=4), ("fsdp",), ("tp",)))).split()
  assert [word for word in lines if word.isdigit()] == list("01234567")
  lines = rendered(drawing(split(mesh(fsdp=2, tp=4), (), ("tp",))))
  assert "0 4" in lines
  assert "3 7" in lines


def test_experts_are_drawn_along_their_first_axis():
  drawn = rendered(drawing(split(mesh(fsdp=2, tp=2), ("tp",), ("fsdp",), ())))
  assert [word for word in drawn.split() if word.isdigit()] == ["0", "2", "1", "3"]


def test_a_parameter_without_axes_is_whole():
  assert "0 1" in rendered(drawing(split(mesh(tp=2))))


def test_a_large_mesh_is_cut_short():
  drawn = rendered(drawing(split(mesh(fsdp=100_000), ("fsdp",))))
  assert "..." in drawn
  assert "99999" in drawn
  assert len(drawn.splitlines()) < 20
  assert rendered(drawing(split(mesh(fsdp=100_000), ()))).split()[1:7] == ["│", "0", "1", "2", "3", "..."]


def test_bars_are_as_long_as_their_bytes():
  found = rendered(of_memory({"layers.0.w": 300, "layers.1.w": 100, "norm.w": 200}, width=8)[0])
  assert "█" * 8 in next(line for line in found.splitlines() if "layers.*.w" in line)
  assert "█" * 4 + " " in next(line for line in found.splitlines() if "norm.w" in line)
  assert "400 B" in found


def test_an_ascii_terminal_gets_ascii():
  assert rendered(drawing(split(mesh(tp=2), ("tp",))), "ascii").isascii()


def test_star():
  assert star("layers.11.attn.q_proj.w") == "layers.*.attn.q_proj.w"


@pytest.mark.parametrize(
  ("nbytes", "text"), [(3, "3 B"), (2**10, "1.0 KiB"), (3 * 2**19, "1.5 MiB"), (2**30, "1.00 GiB")]
)
def test_readable_bytes(nbytes, text):
  assert readable(nbytes) == text


def test_plan_plots_and_show_draws_without_devices(directory, capsys):
  assert main(["plan", directory, "--mesh", "fsdp=1000,tp=4", "--plot"]) == 0
  out = capsys.readouterr().out
  assert "memory of one device" in out
  assert "P('tp', None): 4 x 1 parts" in out
  assert main(["show", "llama-3.1-8b", "--mesh", "fsdp=2,tp=4", "--sharding"]) == 0
  out = capsys.readouterr().out
  assert "8,030,261,248 in all" in out
  assert "P('tp', 'fsdp'): 4 x 2 parts" in out
  assert "│    32 │ layers.*.mlp.gate_proj.w │ [14336, 4096]  │ [3584, 2048]" in out


def test_json_names_the_mesh_axes(directory, capsys):
  assert main(["show", directory, "--mesh", "fsdp=2,tp=2", "--sharding", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)["sharding"]
  assert found["layers.0.attn.q_proj.w"] == [["tp"], ["fsdp"]]
  assert found["final_norm.w"] == [["tp"]]


def test_show_asks_which_mesh_is_drawn(capsys):
  assert main(["show", "llama-3.1-8b", "--sharding"]) == 1
  assert "--sharding: which devices? add their mesh" in capsys.readouterr().err


def on_terminal(*arguments, **environment):
  """What the command prints to a terminal."""
  ours, theirs = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, "-m", "models_automodel", *arguments],
    stdout=theirs,
    stderr=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "TERM": "xterm", "COLUMNS": "120", **environment},
  )
  os.close(theirs)
  out = b""
  # Reading fails when the other end is closed.
  while True:
    try:
      read = os.read(ours, 65536)
    except OSError:
      break
    if not read:
      break
    out += read
  os.close(ours)
  assert process.wait() == 0, process.stderr.read()
  process.stderr.close()
  return out.decode()


def test_a_terminal_shows_tables(directory):
  shown = on_terminal("show", directory)
  assert "╭" in shown
  assert "5,968" in shown
  assert "\033" not in on_terminal("list", TERM="dumb")
  assert on_terminal("list", "--json").startswith("{")
  listed = on_terminal("list")
  assert "\033[1mllama3p1\033[0m (llama3)" in listed
  assert "meta-llama/Llama-3.1-8B  " in listed
