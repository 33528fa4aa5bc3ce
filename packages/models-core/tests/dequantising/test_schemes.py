"""The table of schemes: one for the code, the messages and the README."""

import pathlib

import pytest

from models_core.config.quantisation import SCHEMES
from models_core.dequantising.naming import is_skipped
from models_core.dequantising.schemes import READ, table

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_readme_has_the_table():
  lines = README.read_text("utf-8").splitlines()
  start = lines.index("| scheme | `quant_method` | what is read |")
  assert lines[start + 2 : lines.index("", start)] == table()


def test_what_is_read_is_known():
  assert set(READ) <= {scheme.name for scheme in SCHEMES}


@pytest.mark.parametrize(
  ("entry", "module", "skipped"),
  [
    ("lm_head", "lm_head", True),
    ("lm_head", "model.lm_head", True),
    ("mlp.gate", "model.layers.0.mlp.gate", True),
    ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
    ("model.layers.1", "model.layers.1.mlp.up_proj", True),
    ("model.layers.1", "model.layers.11.mlp.up_proj", False),
    ("re:.*up_proj$", "model.layers.1.mlp.up_proj", True),
    ("re:up_proj", "model.layers.1.mlp.up_proj", False),
    ("model.visual*", "model.visual.blocks.0", True),
    ("*.up", "model.layers.1.mlp.up_proj", False),
  ],
)
def test_which_modules_an_entry_means(entry, module, skipped):
  assert is_skipped(module, entry) is skipped
