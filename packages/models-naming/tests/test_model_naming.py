import dataclasses

import pytest

from models_naming import (
  ModelNaming,
  NamingConflictError,
  NamingError,
  UnknownModelError,
  UnsupportedModelError,
)

LLAMA = ModelNaming("meta-llama/Llama-3.1-8B")


def test_an_id_fills_every_field():
  assert dataclasses.asdict(LLAMA) == {
    "model_id": "meta-llama/Llama-3.1-8B",
    "model_name": "llama-3.1-8b",
    "model_family": "llama3p1",
    "model_version": "8b",
    "model_config_category": "llama3",
    "model_config_id": "llama3p1_8b",
  }


def test_is_frozen_and_hashable():
  with pytest.raises(dataclasses.FrozenInstanceError):
    LLAMA.model_name = "gemma-2b"  # type: ignore[misc]
  assert {LLAMA: 1}[ModelNaming("llama-3.1-8b")] == 1


@pytest.mark.parametrize(
  ("handle", "name", "config_id"),
  [
    ("google/gemma-2/flax/gemma-2-2b-it", "gemma-2-2b-it", "gemma2_2b_it"),
    ("google/gemma-2/Flax/gemma2-2b-it/1", "gemma2-2b-it", "gemma2_2b_it"),
    ("google/gemma/flax/2b-it", "gemma-2b-it", "gemma_2b_it"),
    ("google/gemma/flax/1.1-7b-it/2", "gemma-1.1-7b-it", "gemma1p1_7b_it"),
    ("google/gemma-3/flax/gemma3-1b-it", "gemma3-1b-it", "gemma3_1b_it"),
    ("google/gemma-3/flax/gemma-3-270m-it/1", "gemma-3-270m-it", "gemma3_270m_it"),
  ],
)
def test_a_kaggle_handle_stays_the_id(handle, name, config_id):
  naming = ModelNaming(handle)
  assert (naming.model_id, naming.model_name, naming.model_config_id) == (handle, name, config_id)


@pytest.mark.parametrize(
  ("text", "model_id", "name"),
  [
    ("gemma2-2b-it", "google/gemma-2-2b-it", "gemma2-2b-it"),
    ("gemma2_2b_it", "google/gemma-2-2b-it", "gemma-2-2b-it"),
    ("gemma_2_2b_it", "google/gemma-2-2b-it", "gemma-2-2b-it"),
    ("Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
    ("gemma3_1b", None, "gemma-3-1b"),
    ("llama3p1_8b_tuned", None, "llama-3.1-8b-tuned"),
    ("acme/Qwen3-8B", "acme/Qwen3-8B", "qwen3-8b"),
    ("acme/Qwen3-8B-tuned", "acme/Qwen3-8B-tuned", "qwen3-8b-tuned"),
  ],
)
def test_the_id_is_kept_or_the_known_one(text, model_id, name):
  naming = ModelNaming(text)
  assert (naming.model_id, naming.model_name) == (model_id, name)


@pytest.mark.parametrize(
  "fields",
  [
    {"model_id": "google/gemma-2-2b-it", "model_name": "gemma2-2b-it"},
    {"model_id": "google/gemma-2-2b-it", "model_config_id": "GEMMA2_2B_IT"},
    {"model_id": "google/gemma-2-2b-it", "model_version": "2b-it", "model_family": "Gemma2"},
    {"model_name": "gemma-2-2b-it", "model_config_category": "gemma"},
    {"model_family": "gemma2", "model_version": "2B-it", "model_config_category": "gemma"},
  ],
)
def test_fields_that_agree_are_accepted_in_any_spelling(fields):
  assert ModelNaming(**fields) == ModelNaming("google/gemma-2-2b-it")


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("model_name", "llama-3-8b"),
    ("model_family", "llama3"),
    ("model_version", "70b"),
    ("model_config_category", "gemma"),
    ("model_config_id", "llama3p1_70b"),
  ],
)
def test_fields_that_disagree_are_both_named(field, value):
  with pytest.raises(NamingConflictError) as error:
    ModelNaming("meta-llama/Llama-3.1-8B", **{field: value})
  for part in ("model_id='meta-llama/Llama-3.1-8B'", repr(getattr(LLAMA, field)), f"{field}={value!r}"):
    assert part in str(error.value)


def test_a_category_that_disagrees_with_the_family():
  with pytest.raises(NamingConflictError, match="model_family='llama3p1' has model_config_category 'llama3'"):
    ModelNaming(model_family="llama3p1", model_version="8b", model_config_category="qwen3")


@pytest.mark.parametrize("fields", [{}, {"model_family": "llama3p1"}, {"model_config_category": "llama3"}])
def test_fields_that_name_no_model(fields):
  with pytest.raises(NamingError, match="model_family with model_version"):
    ModelNaming(**fields)


@pytest.mark.parametrize(
  "text", ["", "acme/tuned", "llama3p1_8q", "llama3p1", "mistral_7b", "google/gemma/flax/it", "gemma2_"]
)
def test_unknown_texts(text):
  with pytest.raises(UnknownModelError):
    ModelNaming(text)


@pytest.mark.parametrize(
  "text", ["gemma3_1b_it_int4", "google/gemma-3/flax/gemma3-1b-it-int4", "qwen3_vl_8b"]
)
def test_refused_in_every_spelling(text):
  with pytest.raises(UnsupportedModelError):
    ModelNaming(text)
