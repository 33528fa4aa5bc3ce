"""Where a checkpoint lies, as one value."""

import pathlib

import pytest

from models_automodel import AutoModel, ModelSource, Where
from models_automodel.convert import convert


def test_the_arguments_of_from_pretrained_make_it():
  assert Where.of("org/model", model_source=ModelSource.KAGGLE, revision="2") == Where(
    "org/model", "kaggle", revision="2"
  )
  assert Where.of(pathlib.Path("here")) == Where("here", path="here")
  assert Where.of(pathlib.Path("here"), model_path="there") == Where("here", path="there")


def test_a_token_is_not_shown():
  assert "secret" not in repr(Where("org/model", token="secret"))


def test_it_stands_for_the_arguments(checkpoint, tmp_path):
  where = Where("a name of mine", ModelSource.LOCAL.value, path=str(checkpoint[0]), progress=False)
  _, path = AutoModel.from_pretrained(where)
  assert path == str(checkpoint[0])
  convert(where, tmp_path / "out")
  assert (tmp_path / "out" / "model.safetensors").exists()


def test_arguments_beside_it_are_refused(checkpoint):
  with pytest.raises(TypeError, match="revision, progress: these are fields of the Where already"):
    AutoModel.plan(Where(str(checkpoint[0])), revision="main", progress=False)
