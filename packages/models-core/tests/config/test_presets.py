"""Rows of a table as classmethods."""

import dataclasses
import pydoc

import pytest

from models_core.config import preset_rows

_toy = preset_rows("layers", "dim", eps=1e-5)


@dataclasses.dataclass(frozen=True)
class Config:
  layers: int
  dim: int
  eps: float

  toy_8b = _toy("Toy 8B.", 2, 3)
  other_8b = toy_8b


class Longer(Config):
  pass


def test_a_row_and_what_all_rows_share_make_a_configuration():
  assert Config.toy_8b() == Config.other_8b() == Config(layers=2, dim=3, eps=1e-5)
  assert type(Longer.toy_8b()) is Longer


def test_help_shows_it_as_a_classmethod_with_its_docstring():
  assert isinstance(vars(Config)["toy_8b"], classmethod)
  text = pydoc.render_doc(Config, renderer=pydoc.plaintext)
  methods = text[text.index("Class methods defined here:") :]
  assert "toy_8b" in methods
  assert "Toy 8B." in methods


def test_a_row_of_another_length_is_refused():
  with pytest.raises(ValueError, match="argument 2 is"):
    _toy("Toy 9B.", 2)
