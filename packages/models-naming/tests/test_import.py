import subprocess
import sys

HEAVY = ("jax", "flax", "numpy", "importlib.metadata", "difflib")


def loaded(code: str) -> set[str]:
  script = f"{code}\nimport sys\nprint(*(m for m in {HEAVY} if m in sys.modules))"
  # -S: what site-packages' .pth files import is not this package's doing
  paths = [p for p in sys.path if p]
  output = subprocess.run(
    [sys.executable, "-S", "-c", f"import sys\nsys.path[:] = {paths}\n{script}"],
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  return set(output.split())


def test_import_and_known_names_load_nothing_heavy():
  assert loaded("import models_naming\nmodels_naming.ModelNaming('Qwen/Qwen3-8B')") == set()


def test_the_heavy_modules_would_be_seen():
  unknown = (
    "import models_naming\ntry: models_naming.split('zzz')\nexcept models_naming.UnknownModelError: pass"
  )
  assert loaded(unknown) == {"importlib.metadata", "difflib"}
