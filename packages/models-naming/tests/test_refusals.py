import pytest

from models_naming import ModelNaming, UnsupportedModelError

ARCHITECTURES = {
  "google/gemma-3n-E2B-it": "Gemma 3n",
  "google/gemma3n-e2b": "Gemma 3n",
  "google/gemma-4-31b-it": "Gemma 4",
  "google/gemma-4-26b-a4b-it": "Gemma 4",
  "google/shieldgemma-2-4b-it": "classifies images",
  "google/embeddinggemma-300m": "embeddings",
  "google/paligemma-3b-pt-224": "vision-language",
  "google/paligemma2-3b-pt-224": "vision-language",
  "google/recurrentgemma-2b-it": "recurrent",
  "google/t5gemma-2b-2b-ul2": "encoder-decoder",
  "google/t5gemma-2-270m-270m": "encoder-decoder",
  "google/vaultgemma-1b": "VaultGemma",
  "meta-llama/Llama-3.2-11B-Vision-Instruct": "vision-language",
  "meta-llama/Llama-Guard-3-11B-Vision": "vision-language",
  "meta-llama/Llama-4-Scout-17B-16E": "Llama 4",
  "meta-llama/Llama-Guard-4-12B": "Llama 4",
  "Qwen/Qwen2.5-VL-7B-Instruct": "vision-language",
  "Qwen/Qwen2.5-Omni-7B": "speech",
  "Qwen/Qwen2.5-Math-PRM-7B": "reward model",
  "Qwen/Qwen2.5-Math-RM-72B": "reward model",
  "Qwen/QVQ-72B-Preview": "vision-language",
  "Qwen/Qwen3-VL-8B-Instruct": "vision-language",
  "Qwen/Qwen3-Omni-30B-A3B-Instruct": "speech",
  "Qwen/Qwen3-Next-80B-A3B-Instruct": "Qwen3-Next",
  "Qwen/Qwen3-Coder-Next": "Qwen3-Next",
  "Qwen/Qwen3-Embedding-8B": "embedding",
  "Qwen/Qwen3-Reranker-4B": "reranker",
  "Qwen/Qwen3.5-9B": "Qwen3.5",
  "deepseek-ai/DeepSeek-R1": "DeepSeek-R1",
  "deepseek-ai/DeepSeek-R1-0528": "DeepSeek-R1",
  "deepseek-ai/DeepSeek-V3": "DeepSeek",
}

# id -> what is quantised in it, and the repository to take instead
QUANTISED = {
  "Qwen/Qwen3-8B-FP8": ("fp8", "Qwen/Qwen3-8B"),
  "Qwen/Qwen3-8B-AWQ": ("awq", "Qwen/Qwen3-8B"),
  "Qwen/Qwen3-30B-A3B-GPTQ-Int4": ("gptq", "Qwen/Qwen3-30B-A3B"),
  "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int8": ("gptq", "Qwen/Qwen2.5-72B-Instruct"),
  "Qwen/Qwen3-8B-GGUF": ("gguf", "Qwen/Qwen3-8B"),
  "unsloth/Qwen3-8B-bnb-4bit": ("bnb", "Qwen/Qwen3-8B"),
  "acme/Qwen3-8B-4bit": ("4bit", "Qwen/Qwen3-8B"),
  "acme/Llama-3.1-8B-NVFP4": ("nvfp4", "meta-llama/Llama-3.1-8B"),
  "acme/Llama-3.1-8B-quantized.w4a16": ("quantized", "meta-llama/Llama-3.1-8B"),
  "meta-llama/Llama-3.1-405B-FP8": ("fp8", "meta-llama/Llama-3.1-405B"),
  "meta-llama/Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8": ("spinquant", "meta-llama/Llama-3.2-1B-Instruct"),
  "meta-llama/Llama-3.2-1B-Instruct-QLORA_INT4_EO8": ("qlora", "meta-llama/Llama-3.2-1B-Instruct"),
  "meta-llama/Llama-Guard-3-1B-INT4": ("int4", "meta-llama/Llama-Guard-3-1B"),
  "meta-llama/Llama-Guard-3-8B-INT8": ("int8", "meta-llama/Llama-Guard-3-8B"),
  "google/gemma-3-1b-it-qat-q4_0-gguf": ("q4_0", "google/gemma-3-1b-it"),
  "acme/gemma-3-1b-it-qat-q4_0-unquantized-gguf": ("gguf", "google/gemma-3-1b-it-qat-q4_0-unquantized"),
  "google/gemma-3/flax/gemma3-4b-it-int4": ("int4", "gemma3-4b-it"),
}


@pytest.mark.parametrize(("model_id", "reason"), ARCHITECTURES.items())
@pytest.mark.parametrize("case", [str, str.lower, str.upper])
def test_another_architecture_is_never_taken_for_its_neighbour(model_id, reason, case):
  with pytest.raises(UnsupportedModelError) as error:
    ModelNaming(case(model_id))
  assert reason in str(error.value)
  assert "entry point" in str(error.value)


@pytest.mark.parametrize(("model_id", "marker", "original"), [(i, *v) for i, v in QUANTISED.items()])
def test_quantised_weights_name_the_original(model_id, marker, original):
  with pytest.raises(UnsupportedModelError) as error:
    ModelNaming(model_id)
  assert str(error.value).endswith(f"quantised weights ({marker}) cannot be loaded; use {original}")


@pytest.mark.parametrize(
  "name",
  [
    "gemma-3-4b-it-qat-q4_0-unquantized",
    "gemma3-4b-it-qat-int4-unquantized",
    "gemma-4b-it",
    "shieldgemma-2b",
  ],
)
def test_names_that_only_look_refused(name):
  assert ModelNaming(name).model_name == name
