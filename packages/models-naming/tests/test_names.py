import pytest

import models_naming
from models_naming import (
  NamingError,
  UnknownModelError,
  get_model_config_category,
  get_model_config_id,
  get_model_family_and_version,
  get_model_name_from_model_id,
  split,
)

# id, name, family, version, category
MODELS = [
  ("meta-llama/Meta-Llama-3-8B", "llama-3-8b", "llama3", "8b", "llama3"),
  ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b", "llama3p1", "8b", "llama3"),
  ("meta-llama/Llama-3.1-8B", "llama-3.1-8b", "llama3p1", "8b", "llama3"),
  ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b-instruct", "llama3p2", "1b_instruct", "llama3"),
  ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b-instruct", "llama3p3", "70b_instruct", "llama3"),
  ("meta-llama/Meta-Llama-Guard-2-8B", "llama-guard-2-8b", "llama_guard2", "8b", "llama3"),
  ("meta-llama/Llama-Guard-3-1B", "llama-guard-3-1b", "llama_guard3", "1b", "llama3"),
  (
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-r1-distill-llama-8b",
    "deepseek_r1_distill_llama",
    "8b",
    "llama3",
  ),
  ("google/gemma-2b", "gemma-2b", "gemma", "2b", "gemma"),
  ("google/gemma-1.1-7b-it", "gemma-1.1-7b-it", "gemma1p1", "7b_it", "gemma"),
  ("google/gemma-2-2b-it", "gemma-2-2b-it", "gemma2", "2b_it", "gemma"),
  ("google/gemma-2-2b-jpn-it", "gemma-2-2b-jpn-it", "gemma2", "2b_jpn_it", "gemma"),
  ("google/gemma-3-1b-it", "gemma-3-1b-it", "gemma3", "1b_it", "gemma3"),
  (
    "google/gemma-3-4b-it-qat-q4_0-unquantized",
    "gemma-3-4b-it-qat-q4_0-unquantized",
    "gemma3",
    "4b_it_qat_q4_0_unquantized",
    "gemma3",
  ),
  ("google/codegemma-7b-it", "codegemma-7b-it", "codegemma", "7b_it", "gemma"),
  ("google/codegemma-1.1-2b", "codegemma-1.1-2b", "codegemma1p1", "2b", "gemma"),
  ("google/shieldgemma-2b", "shieldgemma-2b", "shieldgemma", "2b", "gemma"),
  ("google/functiongemma-270m-it", "functiongemma-270m-it", "functiongemma", "270m_it", "gemma3"),
  ("google/medgemma-27b-text-it", "medgemma-27b-text-it", "medgemma", "27b_text_it", "gemma3"),
  ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b", "qwen2p5", "0p5b", "qwen2"),
  ("Qwen/Qwen2.5-Coder-1.5B", "qwen2.5-coder-1.5b", "qwen2p5", "coder_1p5b", "qwen2"),
  ("Qwen/Qwen2.5-Math-72B-Instruct", "qwen2.5-math-72b-instruct", "qwen2p5", "math_72b_instruct", "qwen2"),
  ("Qwen/Qwen2.5-7B-Instruct-1M", "qwen2.5-7b-instruct-1m", "qwen2p5", "7b_instruct_1m", "qwen2"),
  ("Qwen/QwQ-32B", "qwq-32b", "qwq", "32b", "qwen2"),
  (
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1-distill-qwen-1.5b",
    "deepseek_r1_distill_qwen",
    "1p5b",
    "qwen2",
  ),
  ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", "qwen3", "30b_a3b", "qwen3"),
  ("Qwen/Qwen3-4B-Thinking-2507", "qwen3-4b-thinking-2507", "qwen3", "4b_thinking_2507", "qwen3"),
  (
    "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "qwen3-coder-30b-a3b-instruct",
    "qwen3",
    "coder_30b_a3b_instruct",
    "qwen3",
  ),
  (
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "deepseek-r1-0528-qwen3-8b",
    "deepseek_r1_0528_qwen3",
    "8b",
    "qwen3",
  ),
]


@pytest.mark.parametrize(("model_id", "name", "family", "version", "category"), MODELS)
def test_id_becomes_name_family_version_and_category(model_id, name, family, version, category):
  assert get_model_name_from_model_id(model_id) == name
  assert get_model_family_and_version(name) == (family, version)
  assert get_model_config_category(name) == category
  assert get_model_config_id(name) == f"{family}_{version}"


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("llama3.1-8b", ("llama3.1-", "8b")),
    ("llama-3.1-8b", ("llama-3.1-", "8b")),
    ("gemma2-2b-it", ("gemma2-", "2b-it")),
    ("gemma-2-2b-it", ("gemma-2-", "2b-it")),
    ("gemma-2b-it", ("gemma-", "2b-it")),
    ("codegemma-1.1-7b-it", ("codegemma-1.1-", "7b-it")),
    ("qwen2.5-0.5b", ("qwen2.5-", "0.5b")),
    ("qwen-2.5-0.5b", ("qwen-2.5-", "0.5b")),
    ("Meta-Llama-3-8B", ("llama-3-", "8b")),
  ],
)
def test_split_takes_the_longest_prefix(name, parts):
  assert split(name) == parts


@pytest.mark.parametrize(
  ("model_id", "name"),
  [
    ("google/gemma-2/flax/gemma-2-2b-it", "gemma-2-2b-it"),
    ("google/gemma-2/flax/gemma2-2b-it/1", "gemma2-2b-it"),
    ("google/gemma/flax/2b-it", "gemma-2b-it"),
    ("google/gemma/flax/1.1-2b-it/3", "gemma-1.1-2b-it"),
    ("google/gemma-3/flax/gemma3-1b-it", "gemma3-1b-it"),
    ("google/gemma-3/flax/gemma-3-270m-it/12", "gemma-3-270m-it"),
    ("gs://gemma-data/checkpoints/gemma2-2b-it", "gemma2-2b-it"),
    ("unsloth/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
  ],
)
def test_handles_and_paths_end_in_a_name(model_id, name):
  assert get_model_name_from_model_id(model_id) == name


@pytest.mark.parametrize("model_id", ["llama-3.1-8b", "", "google/"])
def test_an_id_without_owner_and_name_is_refused(model_id):
  with pytest.raises(NamingError, match="not a repository id") as error:
    get_model_name_from_model_id(model_id)
  assert repr(model_id) in str(error.value)
  assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
  "name",
  [
    "",
    "llama-3.1",
    "llama-3.1-",
    "gemma-5-2b",
    "qwen3-tiny",
    "llama-2-7b",
    "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b it",
  ],
)
@pytest.mark.parametrize(
  "function", [split, get_model_family_and_version, get_model_config_category, get_model_config_id]
)
def test_every_function_refuses_an_unknown_name(function, name):
  with pytest.raises(UnknownModelError, match=r"config\.json loads whatever its name"):
    function(name)


@pytest.mark.parametrize(
  ("name", "nearest"),
  [
    ("llama-3.1-8bb", "meta-llama/Llama-3.1-8B"),
    ("qwen-3.0-8b", "Qwen/Qwen3-8B"),
    ("gemma3p1_1b_it", "google/gemma-3-1b-it"),
    ("lama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
  ],
)
def test_an_unknown_name_lists_the_nearest_ids(name, nearest):
  assert nearest in models_naming.nearest_model_ids(name)
  with pytest.raises(UnknownModelError) as error:
    split(name)
  assert nearest in str(error.value)


def test_a_name_near_to_none_lists_the_families():
  assert models_naming.nearest_model_ids("zzz") == ()
  with pytest.raises(UnknownModelError, match=r"codegemma, codegemma1p1, .*, llama3p1, "):
    split("zzz")
