"""Assembles the sources of the site in a folder, for Zensical: `python docs/site.py FOLDER`.

The site has five kinds of pages: those of docs/pages; files of the repository, such as the READMEs of the packages;
one page for each architecture, made from its presets; the API reference, made from the names that each room lists; and
what the benchmarks found, made from benchmarks/results.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import pathlib
import re
import shutil
from collections.abc import Iterator

import benchmark_plots
import sharding_pictures
import terminal_pictures
from architectures import architecture_page

DOCS = pathlib.Path(__file__).parent.resolve()
ROOT = DOCS.parent

# File of the repository -> page. A link to a package's folder is one to its README.
FILES = {
  "ARCHITECTURE.md": "architecture.md",
  "COMPATIBILITY.md": "compatibility.md",
  "CONTRIBUTING.md": "contributing.md",
  "LICENSE": "license.md",
  "SECURITY.md": "security.md",
  "benchmarks/README.md": "benchmarks.md",
  "examples/models-olmo2/README.md": "example.md",
  **{f"packages/models-{name}/README.md": f"packages/{name}.md" for name in (
    "automodel", "core", "gemma", "llama", "naming", "qwen", "sources",
  )},
}  # fmt: skip
# Module whose `__init__.pyi` or `__all__` lists public names -> title of its page.
REFERENCE = {
  "models_automodel": "AutoModel",
  "models_core.layers": "Layers",
  "models_core.loading": "Loading",
  "models_core.saving": "Saving",
  "models_core.adapters": "Adapters",
  "models_core.shard_cache": "Shard cache",
  "models_core.generation": "Generation",
  "models_core.rollout": "Rollout",
  "models_core.formats": "Formats",
  "models_core.dequantising": "Quantised formats",
  "models_core.config": "Configuration",
  "models_core.family": "The contract of a family",
  "models_core.sharding": "Sharding",
  "models_core.errors": "Errors",
  "models_sources": "Sources",
  "models_naming": "Names",
}
_LINK = re.compile(r"(?<=\]\()([^)#\s]*)(#[^)\s]*)?(?=\))")


def assemble(folder: pathlib.Path) -> None:
  """Writes all pages and Zensical's configuration into an empty folder."""
  pages = folder / "pages"
  shutil.copytree(DOCS / "pages", pages)
  for file, page in FILES.items():
    text = (ROOT / file).read_text()
    markdown = text if file.endswith(".md") else f"# {file.capitalize()}\n\n```text\n{text}```\n"
    write(pages / page, with_site_links(markdown, file, page))
  for name, text in architectures():
    write(pages / "architectures" / f"{name}.md", text)
  for module, title in REFERENCE.items():
    write(pages / "reference" / f"{module}.md", reference_page(module, title))
  write(pages / "results.md", benchmark_plots.page())
  for source in (sharding_pictures, terminal_pictures, benchmark_plots):
    for name, picture in source.pictures():
      write(pages / "pictures" / f"{name}.svg", picture)
  settings = (DOCS / "zensical.toml").read_text()
  write(folder / "zensical.toml", settings.replace("SOURCES", str(ROOT / "packages")))


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file, and the folders that lead to it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def with_site_links(text: str, file: str, page: str) -> str:
  """Turns links between files of the repository into links between pages.

  Raises:
    KeyError: if a link leads to a file that has no page.
  """

  def link(match: re.Match[str]) -> str:
    target, anchor = match[1], match[2] or ""
    if not target or "://" in target or target.startswith("mailto:"):
      return match[0]
    path = (ROOT / file).parent.joinpath(target).resolve()
    path = path / "README.md" if path.is_dir() else path
    there = FILES[path.relative_to(ROOT).as_posix()]
    return "../" * page.count("/") + there + anchor

  return _LINK.sub(link, text)


def architectures() -> Iterator[tuple[str, str]]:
  """Name and page of each architecture that is installed."""
  for entry in sorted(importlib.metadata.entry_points(group="models.families")):
    yield entry.name, architecture_page(entry.name, entry.load().FAMILY)


def reference_page(module: str, title: str) -> str:
  """The page of a module's public names, in the order of its list."""
  names = "\n".join(f"      - {name}" for name in public_names(module))
  options = f"    options:\n      heading_level: 2\n      members:\n{names}\n"
  return f"# {title}\n\n::: {module}\n{options}"


def public_names(module: str) -> list[str]:
  """The names that a module lists in `__all__`, in its stub where it has one; else its functions and classes."""
  package, _, rest = module.partition(".")
  place = ROOT / "packages" / package.replace("_", "-") / "src" / package / rest.replace(".", "/")
  files = [place / "__init__.pyi", place / "__init__.py", place.with_suffix(".py")]
  tree = ast.parse(next(file for file in files if file.exists()).read_text())
  listed = [
    ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
  ]
  defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
  return listed[0] if listed else [name for name in defined if not name.startswith("_")]


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path)
  assemble(parser.parse_args().folder)
