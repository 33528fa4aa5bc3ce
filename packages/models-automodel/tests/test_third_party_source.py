"""Sources that other packages announce, with a real distribution in a folder of its own."""

import os

import pytest
from flax import nnx

import models_sources
from models_automodel import AutoModel, ModelSource, SourceFilesError

# As the README of models-sources shows it for ModelScope, with a folder in the place of its client.
MODULE = """
import os
from models_sources import FilesNotFoundError, get_source

def open_files(identifier, *, revision=None, token=None, download_path=None, progress=True):
  directory = os.path.join({shelf!r}, identifier, revision or "master")
  if not os.path.isdir(directory):
    raise FilesNotFoundError(f"the shelf has no {{identifier}}")
  return get_source("local").open_files(directory)
"""


@pytest.fixture
def announce(tmp_path, monkeypatch, checkpoint):
  """Installs a distribution that announces a source of that name, whose one model is `team/model`."""
  (tmp_path / "shelf" / "team" / "model").mkdir(parents=True)
  os.symlink(checkpoint[0], tmp_path / "shelf" / "team" / "model" / "master")
  monkeypatch.syspath_prepend(tmp_path)

  def install(name):
    module = f"shelf_as_{name}"
    (tmp_path / f"{module}.py").write_text(MODULE.format(shelf=str(tmp_path / "shelf")))
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[models.sources]\n{name} = {module}\n")
    models_sources._entry_points.cache_clear()

  yield install
  monkeypatch.undo()
  models_sources._entry_points.cache_clear()


@pytest.mark.parametrize(
  ("name", "source"), [("internal", ModelSource.INTERNAL), ("modelscope", "modelscope")]
)
def test_a_source_of_another_package(announce, checkpoint, name, source):
  with pytest.raises(
    SourceFilesError, match=f"there is no source '{name}'.*another package can announce one"
  ):
    AutoModel.from_pretrained("team/model", model_source=source)
  announce(name)
  model, path = AutoModel.from_pretrained("team/model", model_source=source, progress=False)
  assert os.path.samefile(path, checkpoint[0])
  assert (nnx.state(model)["lm_head"]["w"].get_value() == checkpoint[1]["lm_head.weight"]).all()
  with pytest.raises(SourceFilesError, match="the shelf has no team/other"):
    AutoModel.from_pretrained("team/other", model_source=source)
