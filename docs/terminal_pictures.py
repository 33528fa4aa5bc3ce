"""Pictures of the command at a terminal: SVG, from what it prints there."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence

# Name of each picture, and the arguments of the command, which must not ask a source.
PICTURES = {
  "command-sharding": ["show", "llama-3.1-8b", "--mesh", "fsdp=2,tp=4", "--sharding"],
}
# Rows and columns of the terminal.
SIZE = (200, 110)


def pictures() -> Iterator[tuple[str, str]]:
  """Name and SVG of each picture."""
  for name, arguments in PICTURES.items():
    yield name, picture(arguments, printed(arguments))


def printed(arguments: Sequence[str], size: tuple[int, int] = SIZE) -> str:
  """What the command prints to a terminal of some rows and columns, with its codes for colours."""
  import fcntl
  import termios

  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TERM": "xterm-256color"}
  command = [sys.executable, "-m", "models_automodel", *arguments]
  with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
    os.close(theirs)
    read = b"".join(iter(lambda: _read(ours), b""))
  os.close(ours)
  if process.returncode:
    raise RuntimeError(f"automodel {' '.join(arguments)} failed:\n{read.decode()}")
  return read.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
  """The next bytes; none at the end, which Linux reports as an error."""
  try:
    return os.read(terminal, 1 << 16)
  except OSError:
    return b""


def picture(arguments: Sequence[str], text: str, columns: int = SIZE[1]) -> str:
  """A window that shows a command and what it printed, as SVG."""
  from rich.console import Console
  from rich.text import Text

  console = Console(record=True, width=columns, file=open(os.devnull, "w"), legacy_windows=False)  # noqa: SIM115
  console.print(Text(f"$ automodel {' '.join(arguments)}", "bold"))
  console.print(Text.from_ansi(text))
  # The page's own font, since rich's would be fetched from elsewhere.
  return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="automodel"), flags=re.DOTALL)
