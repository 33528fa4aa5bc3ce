"""Properties of every known repository id."""

import keyword

import pytest

from models_naming import (
  FAMILIES,
  ModelNaming,
  distribution_of,
  get_model_name_from_model_id,
  known_model_ids,
  split,
)

KNOWN = [(family, model_id) for family, ids in known_model_ids().items() for model_id in ids]
CASES = [str, str.lower, str.upper, str.swapcase]


def test_every_family_has_known_ids_and_none_is_listed_twice():
  assert set(known_model_ids()) == {info.family for info in FAMILIES.values()}
  ids = [model_id for _, model_id in KNOWN]
  assert len(set(ids)) == len(ids) > 100
  assert all(set(i).isdisjoint("{},") and i.count("/") == 1 for i in ids)


def test_config_ids_are_unique():
  config_ids = [ModelNaming(model_id).model_config_id for _, model_id in KNOWN]
  assert len(set(config_ids)) == len(config_ids)


def test_prefixes_are_lower_case_and_of_a_category_with_a_distribution():
  for prefix, info in FAMILIES.items():
    assert prefix == prefix.lower()
    assert prefix.endswith("-")
    assert info.family.isidentifier()
    assert distribution_of(info.category)


@pytest.mark.parametrize(("family", "model_id"), KNOWN)
def test_a_known_id_resolves_and_round_trips(family, model_id):
  naming = ModelNaming(model_id)
  assert naming.model_id == model_id
  assert naming.model_family == family
  assert naming.model_name == get_model_name_from_model_id(model_id)
  assert "".join(split(naming.model_name)) == naming.model_name
  assert naming.model_config_id == f"{naming.model_family}_{naming.model_version}"
  for name in (
    naming.model_config_id,
    naming.model_family,
    naming.model_config_category,
  ):
    assert name.isidentifier()
    assert not keyword.iskeyword(name)
  for case in CASES:
    assert ModelNaming(case(model_id)) == naming
    assert ModelNaming(case(naming.model_name)) == naming
    assert ModelNaming(model_name=case(naming.model_name)) == naming
    assert ModelNaming(case(naming.model_config_id)) == naming
    assert ModelNaming(model_config_id=case(naming.model_config_id)) == naming
    assert ModelNaming(model_family=case(family), model_version=case(naming.model_version)) == naming
  assert ModelNaming(**vars(naming)) == naming


@pytest.mark.parametrize("prefix", FAMILIES)
def test_both_spellings_of_a_family_name_the_same_model(prefix):
  family = FAMILIES[prefix].family
  for model_id in known_model_ids()[family]:
    naming = ModelNaming(model_id)
    respelled = ModelNaming(prefix + split(naming.model_name)[1])
    assert respelled.model_config_id == naming.model_config_id
    assert respelled.model_id == model_id


def test_the_facts_that_are_easy_to_get_wrong():
  ids = {model_id for _, model_id in KNOWN}
  assert {"meta-llama/Meta-Llama-3-70B", "google/gemma-3-1b-pt", "Qwen/Qwen2.5-14B-Instruct-1M"} <= ids
  assert ids.isdisjoint(
    {
      "meta-llama/Llama-3-70B",
      "meta-llama/Llama-3.3-70B",
      "google/gemma-3-2b",
      "google/gemma-3-1b",
      "google/gemma-1.1-2b",
      "Qwen/Qwen3-32B-Base",
      "Qwen/Qwen3-235B-A22B-Base",
      "Qwen/Qwen2.5-3B-Instruct-1M",
    }
  )
