"""One package and its dependencies, in an environment that holds nothing else. The session `isolation` makes it."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

PACKAGE = os.environ.get("ISOLATED_PACKAGE")

FAMILIES = {"models-gemma", "models-llama", "models-qwen"}
# The members that may come along with each member, and no others.
SIBLINGS = {
  "models-naming": set(),
  "models-core": set(),
  "models-sources": set(),
  "models-gemma": {"models-core"},
  "models-llama": {"models-core"},
  "models-qwen": {"models-core"},
  "models-automodel": {"models-naming", "models-core", "models-sources"},
}
# Clients of model hubs and object stores.
HUBS = {"huggingface-hub", "kagglehub", "obstore", "boto3", "google-cloud-storage", "gcsfs", "s3fs"}
# Another framework, or what a model needs and its names and files do not.
HEAVY = {"torch", "tensorflow", "transformers"}
ARRAYS = {"jax", "jaxlib", "flax", "numpy", "ml-dtypes"}
ABSENT = {
  "models-naming": HUBS | HEAVY | ARRAYS,
  "models-sources": HEAVY | ARRAYS,
  "models-core": HUBS | HEAVY,
  "models-gemma": HUBS | HEAVY,
  "models-llama": HUBS | HEAVY,
  "models-qwen": HUBS | HEAVY,
  "models-automodel": HEAVY,
}
# One published name a family, and the extra that brings it.
MISSING = {
  "google/gemma-2-2b-it": "gemma",
  "google/gemma-3-1b-it": "gemma",
  "meta-llama/Llama-3.2-1B": "llama",
  "Qwen/Qwen2.5-0.5B": "qwen",
  "Qwen/Qwen3-0.6B": "qwen",
}

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="runs in the session `isolation`")


def installed() -> set[str]:
  return {re.sub(r"[-_.]+", "-", d.name).lower() for d in importlib.metadata.distributions()}


def imported_by(statement: str) -> set[str]:
  """The top-level modules that a fresh interpreter holds after a statement."""
  program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
  done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
  return set(done.stdout.splitlines()[-1].split())


def test_table_knows_the_package():
  assert PACKAGE in SIBLINGS
  assert SIBLINGS.keys() == ABSENT.keys()


def test_brings_its_siblings_and_no_others():
  assert {name for name in installed() if name in SIBLINGS} == SIBLINGS[PACKAGE] | {PACKAGE}


def test_brings_nothing_unwanted():
  assert not installed() & ABSENT[PACKAGE]


def test_import_needs_what_is_declared():
  module = PACKAGE.replace("-", "_")
  # All names: facades import their modules when a name is used.
  modules = imported_by(f"from {module} import *")
  allowed = {name.replace("-", "_") for name in SIBLINGS[PACKAGE]} | {module}
  ours = {name.replace("-", "_") for name in SIBLINGS}
  assert module in modules
  assert modules & ours <= allowed
  if "jax" in ABSENT[PACKAGE]:
    assert not modules & {"jax", "flax", "numpy"}


def test_files_come_from_the_wheel():
  """Not from a working tree: an editable install would hide what the wheel lacks."""
  files = importlib.metadata.files(PACKAGE) or []
  assert any(f.name == "py.typed" for f in files)
  assert not any(f.suffix == ".pth" for f in files)


@pytest.mark.skipif(PACKAGE != "models-automodel", reason="only AutoModel looks for families")
class TestAutoModelWithoutFamilies:
  """A family that is known and not installed is named together with the extra that brings it."""

  @pytest.fixture
  def auto_model(self):
    models_automodel = pytest.importorskip("models_automodel")
    if not hasattr(models_automodel, "AutoModel"):
      pytest.skip("models_automodel holds no AutoModel yet")
    return models_automodel.AutoModel

  @pytest.mark.parametrize("model_id", MISSING)
  def test_names_the_extra(self, auto_model, model_id):
    import jax

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"))
    remedy = f"models-automodel[{MISSING[model_id]}]"
    with pytest.raises(ImportError, match=re.escape(remedy)) as error:
      auto_model.from_pretrained(model_id, mesh)
    assert model_id in str(error.value)

  def test_finds_no_family(self):
    assert not importlib.metadata.entry_points(group="models.families")
    assert not installed() & FAMILIES
