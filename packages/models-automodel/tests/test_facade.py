import subprocess
import sys

import pytest

import models_automodel

HEAVY = "sorted({name.partition('.')[0] for name in sys.modules} & {'jax', 'flax', 'numpy', 'tokenizers', 'rich', 'shtab'})"


def heavy_after(code):
  """What of the heavy packages a fresh process holds after some code."""
  code = f"import sys\n{code}\nprint({HEAVY}, file=sys.stderr)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  return done.stderr.strip()


@pytest.mark.parametrize(
  "code",
  [
    "import models_automodel",
    "from models_automodel import ModelsError, MissingFamilyError",
    "import models_automodel.text",
    "from models_automodel.cli import main; assert main(['list']) == 0",
    "from models_automodel.cli import main; assert main(['list', '--installed']) == 0",
  ],
)
def test_what_needs_no_jax_imports_none(code):
  assert heavy_after(code) == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["generate", "--help"]])
def test_help_and_version_import_no_jax(arguments):
  code = f"""
from models_automodel.cli import main
try:
  main({arguments})
except SystemExit as end:
  assert end.code == 0
"""
  assert heavy_after(code) == "[]"


def test_a_model_does_import_jax():
  assert heavy_after("from models_automodel import AutoModel").startswith("['flax', 'jax'")


def test_every_name_is_there():
  assert dir(models_automodel) == sorted(models_automodel.__all__)
  for name in models_automodel.__all__:
    assert getattr(models_automodel, name).__name__ == name
  with pytest.raises(AttributeError, match="nonsense"):
    _ = models_automodel.nonsense


def test_digest_is_the_function_whoever_imports_its_module():
  code = (
    "import models_automodel.digest; from models_automodel import digest; assert digest.__name__ == 'digest'"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
