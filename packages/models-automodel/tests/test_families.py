"""Families that no package of this project announces: registered in the process, or installed by others."""

import dataclasses
import json
import shutil

import pytest
from flax import nnx

import models_automodel
from models_automodel import AutoModel, MissingFamilyError, ModelNameError, families
from models_automodel.cli import main
from models_core.family import FAMILY_API_VERSION
from models_llama.llama3 import FAMILY


@pytest.fixture
def theirs(checkpoint, tmp_path):
  """A checkpoint of an architecture that nobody here knows: its config.json says so."""
  directory = tmp_path / "checkpoint"
  shutil.copytree(checkpoint[0], directory)
  raw = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(raw | {"model_type": "olmo2"}))
  return directory


@dataclasses.dataclass(frozen=True)
class OlmoConfig(FAMILY.config_class):
  """A configuration of its own."""


class Olmo(FAMILY.model_class):
  """A model of its own."""


OLMO = dataclasses.replace(
  FAMILY,
  name="olmo2",
  model_types=("olmo2",),
  model_class=Olmo,
  config_class=OlmoConfig,
  read_config=lambda raw: OlmoConfig(**vars(FAMILY.read_config({**raw, "model_type": "llama"}))),
)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
  monkeypatch.setattr(families, "_registered", {})
  families.installed.cache_clear()
  yield
  families.installed.cache_clear()


@pytest.fixture
def announce(tmp_path, monkeypatch):
  """Installs distributions that announce a family each."""
  monkeypatch.syspath_prepend(tmp_path)

  def install(name, source):
    module = f"their_{name}"
    (tmp_path / f"{module}.py").write_text(source)
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[models.families]\n{name} = {module}\n")
    families.installed.cache_clear()

  return install


# `FAMILY` of this test module, whose name differs with how tests are imported.
GOOD = f"import sys\nFAMILY = sys.modules[{__name__!r}].OLMO\n"


class TestRegister:
  def test_a_registered_family_loads_and_saves(self, theirs, tmp_path):
    with pytest.raises(ModelNameError, match="no installed family reads model_type 'olmo2'"):
      AutoModel.from_pretrained(theirs)
    AutoModel.register(OLMO)
    AutoModel.register(OLMO)  # the cell of a notebook, run again
    model, path = AutoModel.from_pretrained(theirs, progress=False)
    assert type(model) is Olmo
    assert type(model.config) is OlmoConfig
    AutoModel.save_pretrained(model, tmp_path / "saved", base=path, progress=False)
    again, _ = AutoModel.from_pretrained(tmp_path / "saved", config=model.config, progress=False)
    assert type(again) is Olmo
    assert (nnx.state(again)["lm_head"]["w"][...] == nnx.state(model)["lm_head"]["w"][...]).all()

  @pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
      ({"name": "llama3"}, ModelNameError, "llama3 is the name of an installed family"),
      ({"model_types": ("olmo2", "llama")}, ModelNameError, "'llama', which is that of the family llama3"),
      (
        {"api_version": FAMILY_API_VERSION + 1},
        MissingFamilyError,
        f"the family olmo2 is written for version {FAMILY_API_VERSION + 1} of the family contract, models-core has",
      ),
    ],
  )
  def test_what_is_refused(self, changes, error, message):
    with pytest.raises(error, match=message):
      AutoModel.register(dataclasses.replace(OLMO, **changes))
    assert "olmo2" not in families.known()


class TestThirdParties:
  def test_a_broken_package_stops_no_other(self, announce, theirs):
    announce("aaa_broken", "import no_such_module\n")
    announce("olmo2", GOOD)
    announce("zzz_empty", "")
    model, _ = AutoModel.from_pretrained(theirs, progress=False)
    assert type(model) is Olmo

  def test_a_broken_package_does_not_hide_that_a_type_is_unknown(self, announce, theirs, caplog):
    announce("broken", "1 / 0\n")
    announce("empty", "")
    with pytest.raises(ModelNameError, match=r"no installed family reads model_type 'olmo2'.*broken"):
      AutoModel.from_pretrained(theirs)
    problem = (
      "the family broken = their_broken of the package their_broken cannot be imported (division by zero)"
    )
    assert f"not tried: {problem}: repair or uninstall it" in caplog.text
    assert (
      "not tried: the family empty = their_empty of the package their_empty has no attribute FAMILY"
      in caplog.text
    )
    with pytest.raises(
      MissingFamilyError, match=r"cannot be imported \(division by zero\): repair or uninstall it"
    ):
      families.load_family("broken", "x")

  def test_a_family_of_this_project_is_its_own_package_s(self, announce, checkpoint, caplog):
    announce("llama3", "1 / 0\n")
    model, _ = AutoModel.from_pretrained(checkpoint[0], progress=False)
    assert type(model) is FAMILY.model_class
    # Whoever looks at all families is told.
    assert "llama3" in families.known()
    assert "their_llama3 announces a family llama3, which is of models-llama: it is not used" in caplog.text

  def test_list_shows_them(self, announce, capsys):
    announce("olmo2", GOOD)
    for arguments in (["list"], ["list", "--installed"]):
      assert main(arguments) == 0
      assert "olmo2 (installed by their_olmo2 1.0)\n" in capsys.readouterr().out


def test_version():
  from importlib.metadata import version

  assert models_automodel.__version__ == version("models-automodel")
