"""Names that resemble a known family's but belong to other models: which are refused, and why."""

import re

from immutabledict import immutabledict

from models_naming.known import known_names

_REMEDY = "a package that implements it can announce its names with an entry point in the group models.names"

# Pattern of a name's beginning, not followed by a letter, digit or point -> why it is refused.
_ARCHITECTURES = immutabledict(
  {
    r"gemma-?3n": "Gemma 3n has a different architecture from Gemma 3",
    r"gemma-?4": "Gemma 4 has a different architecture from Gemma 3",
    r"shieldgemma-?2": "ShieldGemma 2 classifies images",
    r"embeddinggemma": "EmbeddingGemma attends in both directions and returns embeddings",
    r"paligemma-?\d*": "PaliGemma is a vision-language model",
    r"recurrentgemma": "RecurrentGemma is a recurrent architecture",
    r"t5gemma-?\d*": "T5Gemma is an encoder-decoder",
    r"vaultgemma": "VaultGemma has a different architecture from Gemma 2",
    r"llama-?4": "Llama 4 has a different architecture from Llama 3",
    r"llama-guard-?4": "Llama Guard 4 is built on Llama 4",
    r"qwen-?3-next": "Qwen3-Next mixes linear attention into Qwen3",
    r"qwen-?3-coder-next": "Qwen3-Coder-Next is built on Qwen3-Next",
    r"qwen-?3\.5": "Qwen3.5 has a different architecture from Qwen3",
    r"qvq": "QVQ is a vision-language model",
    r"deepseek-r1(?!-distill|-0528-qwen3)": "DeepSeek-R1 has a different architecture from its distilled versions",
    r"deepseek-v\d": "DeepSeek's own architecture is not one of these families",
  }
)

# Word in a name -> the kind of model that it means.
_KINDS = immutabledict(
  {
    "vision": "a vision-language model",
    "vl": "a vision-language model",
    "omni": "a model of speech and images",
    "embedding": "an embedding model, which returns no logits",
    "reranker": "a reranker, which scores pairs of texts",
    "prm": "a reward model, which has no language-model head",
    "rm": "a reward model, which has no language-model head",
    "reward": "a reward model, which has no language-model head",
  }
)

# The original's name, then the marker. The atomic group skips `-qat-...-unquantized`, whose weights are bfloat16.
_QUANTISED = (
  r"((?>(?:.*-qat-\w+-unquantized)?).*?)(?:-qat)?[-_.]"
  r"(gguf|ggml|gptq|awq|bnb|hqq|aqlm|exl[23]|quantized|spinquant|qlora"
  r"|(?:nv|mx)?fp[48]|nf4|u?int[248]|[2-8]-?bits?|w\d+a\d+|q[2-8](?:_[0-9a-z]+)*)(?![^-_.])"
)


def reason_against(name: str) -> str | None:
  """Why a model of this normalised name cannot be loaded; None if there is no reason."""
  for pattern, reason in _ARCHITECTURES.items():
    if re.match(rf"(?:{pattern})(?![a-z0-9.])", name):
      return f"{reason}; {_REMEDY}"
  for word in re.split(r"[-_.]", name):
    if word in _KINDS:
      return f"{word!r} in a name means {_KINDS[word]}; {_REMEDY}"
  quantised = re.match(_QUANTISED, name)
  if quantised:
    original, marker = quantised.groups()
    return f"quantised weights ({marker}) cannot be loaded; use {known_names().get(original, original)}"
  return None
