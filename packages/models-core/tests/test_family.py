"""What factories make for a family looks like its own."""

import inspect
import typing

import pytest
from flax import nnx

from models_core.adapters.lora import lora_saver
from models_core.family import Family
from models_core.safetensors_loader import safe_tensors_creator


class Config:
  pass


class Model(nnx.Module):
  pass


def read_config(raw):
  return Config()


FAMILY = Family(
  name="toy",
  model_types=(),
  model_class=Model,
  config_class=Config,
  read_config=read_config,
  write_config=lambda config: {},
  weights={},
)

CASES = {
  "create_model_from_safe_tensors": (safe_tensors_creator, ["file_dir", "config", "mesh", "dtype"], Model),
  "save_lora_merged_model_as_safetensors": (
    lora_saver,
    ["local_model_path", "output_dir", "lora_model", "rank", "alpha"],
    type(None),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_help_shows_it_in_the_familys_module(name):
  factory, parameters, result = CASES[name]
  made = factory(FAMILY)
  assert (made.__module__, made.__qualname__) == (__name__, name)
  assert "Args:" in inspect.getdoc(made)
  assert "Raises:" in inspect.getdoc(made)
  assert list(inspect.signature(made).parameters) == parameters
  hints = typing.get_type_hints(made)
  assert hints["return"] is result
  assert hints.get("config", Config) is Config
