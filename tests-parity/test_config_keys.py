"""The table of other architectures' keys, compared with the installed transformers."""

import importlib.util
import pathlib

import pytest

from models_core.config.harmless import other_architectures, transformers_keys

SCRIPT = pathlib.Path(__file__).parent / "make_config_keys.py"


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("make_config_keys", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_table_is_what_the_script_makes(script):
  held = transformers_keys().get(script.VERSION)
  assert held is not None, f"run {SCRIPT.name} with transformers {script.VERSION}"
  assert held == script.keys()


def test_the_table_stays_small(script):
  assert script.FILE.stat().st_size < 300_000
  assert len(other_architectures()) > 2000
