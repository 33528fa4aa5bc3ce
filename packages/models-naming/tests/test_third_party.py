"""Families that installed packages announce, with real distributions in a folder of their own."""

import itertools

import pytest

from models_naming import (
  ModelNaming,
  NamingConflictError,
  NamingError,
  UnknownModelError,
  UnsupportedModelError,
  split,
  third_party,
)
from models_naming.third_party import third_party_families

_numbers = itertools.count()  # a module name is imported once a process


def forget():
  """Entries are read once in a process."""
  third_party._entries.cache_clear()
  third_party_families.cache_clear()


@pytest.fixture
def announce(tmp_path, monkeypatch):
  """Installs a distribution whose entry point resolves to the value of an expression."""
  monkeypatch.syspath_prepend(tmp_path)

  def install(expression: str) -> str:
    module = f"announced_{next(_numbers)}"
    (tmp_path / f"{module}.py").write_text(f"from models_naming import FamilyInfo\nNAMES = {expression}\n")
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[models.names]\n{module} = {module}:NAMES\n")
    return module

  forget()
  yield install
  forget()


def test_a_family_of_another_package(announce):
  announce(
    "{'falcon3-': FamilyInfo('falcon3', 'falcon'), 'falcon3-mamba-': FamilyInfo('falcon_mamba', 'mamba')}"
  )
  naming = ModelNaming("tiiuae/Falcon3-7B-Base")
  assert (naming.model_family, naming.model_version) == ("falcon3", "7b_base")
  assert (naming.model_config_category, naming.model_config_id) == ("falcon", "falcon3_7b_base")
  assert naming.model_id == "tiiuae/Falcon3-7B-Base"
  assert split("falcon3-mamba-7b") == ("falcon3-mamba-", "7b")
  again = ModelNaming(model_config_id="falcon3_7b_base")
  assert (again.model_name, again.model_config_category) == (naming.model_name, "falcon")


def test_a_family_whose_name_begins_with_another_s(announce):
  announce(
    "{'falcon-': FamilyInfo('falcon', 'falcon'), 'falconmamba-': FamilyInfo('falcon_mamba', 'falcon_mamba')}"
  )
  naming = ModelNaming(model_config_id="falcon_mamba_7b")
  assert (naming.model_name, naming.model_family) == ("falconmamba-7b", "falcon_mamba")
  assert naming.model_config_category == "falcon_mamba"
  assert ModelNaming(model_config_id="falcon_7b").model_config_category == "falcon"


def test_a_prefix_without_a_dash(announce):
  announce("{'falcon': FamilyInfo('falcon', 'falcon')}")
  assert ModelNaming("falcon-7b").model_config_id == "falcon_7b"
  assert ModelNaming("falcon_7b").model_name == "falcon-7b"


def test_an_architecture_that_is_refused_here_may_be_theirs(announce):
  with pytest.raises(UnsupportedModelError):
    split("qwen3-vl-8b")
  forget()
  announce("{'qwen3-vl-': FamilyInfo('qwen3_vl', 'qwen3_vl'), 'gemma-5-': FamilyInfo('gemma5', 'gemma5')}")
  assert ModelNaming("Qwen/Qwen3-VL-8B").model_config_category == "qwen3_vl"
  assert ModelNaming("google/gemma-5-2b").model_config_id == "gemma5_2b"


@pytest.mark.parametrize("prefix", ["qwen3-", "qwen", "qwen3-8b", "q"])
def test_a_prefix_never_takes_an_own_family_s_names(announce, prefix):
  announce(f"{{{prefix!r}: FamilyInfo('theirs', 'theirs')}}")
  assert ModelNaming("Qwen/Qwen3-8B-Base").model_config_category == "qwen3"
  assert ModelNaming("qwen3_8b_base").model_config_category == "qwen3"
  with pytest.raises(UnsupportedModelError):
    split("qwen3-vl-8b")
  with pytest.raises(UnknownModelError):
    split("qwen3-tiny")


def test_a_family_name_never_takes_an_own_family_s_config_id(announce):
  announce("{'theirs-': FamilyInfo('qwen3', 'theirs')}")
  assert ModelNaming("qwen3_8b_tuned").model_config_category == "qwen3"


def test_entries_are_read_once(announce):
  module = announce("{'falcon-': FamilyInfo('falcon', 'falcon')}")
  assert third_party_families() is third_party_families()
  assert third_party_families()["falcon-"].family == "falcon", module


@pytest.mark.parametrize(
  ("expression", "message"),
  [
    ("1 / 0", "cannot be imported"),
    ("['falcon-']", "not a mapping"),
    ("{'Falcon-': FamilyInfo('falcon', 'falcon')}", "lower-case"),
    ("{'': FamilyInfo('falcon', 'falcon')}", "lower-case"),
    ("{'falcon-': ('falcon', 'falcon')}", "not a FamilyInfo"),
    ("{'falcon-': FamilyInfo('falcon-2', 'falcon')}", "two identifiers"),
  ],
)
def test_a_broken_entry_is_named(announce, expression, message):
  module = announce(expression)
  with pytest.raises(NamingError, match=message) as error:
    split("falcon-7b")
  assert f"{module} = {module}:NAMES" in str(error.value)


def test_a_broken_entry_stops_no_other(announce):
  announce("1 / 0")
  announce("{'falcon-': FamilyInfo('falcon', 'falcon')}")
  assert split("falcon-7b") == ("falcon-", "7b")


def test_two_meanings_of_one_prefix(announce):
  announce("{'falcon-': FamilyInfo('falcon', 'falcon')}")
  announce("{'falcon-': FamilyInfo('falcon', 'other')}")
  with pytest.raises(NamingConflictError, match="'falcon-'"):
    split("falcon-7b")
