"""Runs benchmarks, and keeps what each prints in results/NAME.md, under the command, date, machine and versions.

  python benchmarks/record.py attention compile
  python benchmarks/record.py load -- --checkpoints dense --rounds 9

What follows `--` goes to each of the benchmarks. A benchmark that fails ends the run, and its file stays as it was.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
# Name of a result -> the script, and options that it always gets.
BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
  "load": ("load.py", ()),
  "processes": ("processes.py", ()),
  "cache": ("cache.py", ()),
  "generation": ("generation.py", ()),
  "first_token": ("first_token.py", ()),
  "attention": ("attention.py", ()),
  "steps": ("steps.py", ()),
  "compile": ("compile.py", ()),
  "save": ("save.py", ()),
}
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "google-tunix")


def record(name: str, options: Sequence[str] = (), folder: pathlib.Path = RESULTS) -> int:
  """Runs a benchmark, prints its output as it comes, writes it into a file; returns the exit status."""
  script, defaults = BENCHMARKS[name]
  arguments = [*defaults, *options]
  # Else Python keeps lines back while its output is no terminal.
  command = [sys.executable, "-u", str(HERE / script), *arguments]
  lines = []
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    for line in process.stdout:
      print(line, end="", flush=True)
      lines.append(line)
  if process.returncode:
    return process.returncode
  folder.mkdir(exist_ok=True)
  replace(folder / f"{name}.md", f"{header(f'benchmarks/{script}', arguments)}\n{''.join(lines)}")
  return 0


def header(script: str, arguments: Sequence[str]) -> str:
  """A Markdown list: the command, the date, the machine, and the versions of what is measured."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  facts = {
    "command": f"`{shlex.join(['python', script, *arguments])}`",
    "date": datetime.date.today().isoformat(),
    "machine": f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory",
    "versions": ", ".join(versions()),
  }
  return "".join(f"- {name}: {fact}\n" for name, fact in facts.items())


def processor(file: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
  """The model of the CPU; its architecture where the system does not name the model."""
  lines = file.read_text().splitlines() if file.exists() else []
  models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return models[0] if models else platform.machine()


def versions() -> Iterator[str]:
  """Name and version of Python, and of each package that is installed."""
  yield f"Python {platform.python_version()}"
  for package in PACKAGES:
    try:
      yield f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
      continue


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file at once: a reader finds the old text or the whole text."""
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
  try:
    with os.fdopen(descriptor, "w") as file:
      file.write(text)
    # A temporary file is readable to its owner only.
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def main(arguments: Sequence[str]) -> None:
  """Runs one benchmark after the other."""
  at = arguments.index("--") if "--" in arguments else len(arguments)
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="record.py NAME [NAME ...] [-- OPTION ...]",
  )
  parser.add_argument("names", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
  for name in parser.parse_args(arguments[:at]).names:
    if status := record(name, arguments[at + 1 :]):
      # The status of a process that a signal ends is negative; shells add 128.
      sys.exit(status if status > 0 else 128 - status)


if __name__ == "__main__":
  main(sys.argv[1:])
