"""The Python examples of the READMEs as files, for type checkers: `python -m workspace.examples FOLDER`."""

import pathlib
import re
import sys

from workspace import members

READMES = ["README.md", *(f"packages/{name}/README.md" for name in members.PROJECTS)]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def blocks(readme: str) -> dict[int, str]:
  """The Python blocks of a README, by the line that they begin at."""
  return {readme[: block.start()].count("\n") + 2: block[1] for block in _BLOCK.finditer(readme)}


if __name__ == "__main__":
  folder = pathlib.Path(sys.argv[1])
  for name in READMES:
    stem = re.sub(r"\W+", "_", name.removesuffix(".md")).lower()
    for line, block in blocks((members.ROOT / name).read_text()).items():
      (folder / f"{stem}_line_{line}.py").write_text(block)
