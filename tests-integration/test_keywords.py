"""The types of keyword arguments know what the call itself takes."""

import dataclasses
import inspect

from models_automodel import AutoModel
from models_automodel.families import installed, load_family
from models_automodel.keywords import ConfigFields, Keywords


def test_fields_of_all_configurations():
  """A new field of a configuration needs a line in `models_automodel/keywords.py`."""
  found = {f.name for name in installed() for f in dataclasses.fields(load_family(name, name).config_class)}
  assert set(ConfigFields.__annotations__) == found


def test_arguments_of_the_plan():
  named = inspect.signature(AutoModel.from_pretrained).parameters
  others = set(inspect.signature(AutoModel.plan).parameters) - set(named) - {"fields"}
  aliases = {"use_flash_attention"}
  assert set(Keywords.__annotations__) == others | set(ConfigFields.__annotations__) | aliases
