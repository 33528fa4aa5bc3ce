"""Names that look like a known family's and are not: what is refused, and why."""

import re

from immutabledict import immutabledict

from models_naming.known import known_names

_REMEDY = "a package that implements it announces its names by an entry point of the group models.names"

# How a name of another architecture begins; a letter, digit or point must not follow.
_ARCHITECTURES = immutabledict(
  {
    r"gemma-?3n": "Gemma 3n is another architecture than Gemma 3",
    r"gemma-?4": "Gemma 4 is another architecture than Gemma 3",
    r"shieldgemma-?2": "ShieldGemma 2 classifies images",
    r"embeddinggemma": "EmbeddingGemma attends in both directions and returns embeddings",
    r"paligemma-?\d*": "PaliGemma is a vision-language model",
    r"recurrentgemma": "RecurrentGemma is a recurrent architecture",
    r"t5gemma-?\d*": "T5Gemma is an encoder-decoder",
    r"vaultgemma": "VaultGemma is another architecture than Gemma 2",
    r"llama-?4": "Llama 4 is another architecture than Llama 3",
    r"llama-guard-?4": "Llama Guard 4 is built on Llama 4",
    r"qwen-?3-next": "Qwen3-Next mixes linear attention into Qwen3",
    r"qwen-?3-coder-next": "Qwen3-Coder-Next is built on Qwen3-Next",
    r"qwen-?3\.5": "Qwen3.5 is another architecture than Qwen3",
    r"qvq": "QVQ is a vision-language model",
    r"deepseek-r1(?!-distill|-0528-qwen3)": "DeepSeek-R1 is another architecture than its distilled versions",
    r"deepseek-v\d": "DeepSeek's own architecture is not one of these families",
  }
)

# Words anywhere in a name that say what the model returns or takes.
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

# The name of the original, then the marker. The atomic group passes over `-qat-...-unquantized`: those are bfloat16.
_QUANTISED = (
  r"((?>(?:.*-qat-\w+-unquantized)?).*?)(?:-qat)?[-_.]"
  r"(gguf|ggml|gptq|awq|bnb|hqq|aqlm|exl[23]|quantized|spinquant|qlora"
  r"|(?:nv|mx)?fp[48]|nf4|u?int[248]|[2-8]-?bits?|w\d+a\d+|q[2-8](?:_[0-9a-z]+)*)(?![^-_.])"
)


def reason_against(name: str) -> str | None:
  """Why a model of this normalised name cannot be loaded, or None where nothing speaks against it."""
  for pattern, reason in _ARCHITECTURES.items():
    if re.match(rf"(?:{pattern})(?![a-z0-9.])", name):
      return f"{reason}; {_REMEDY}"
  for word in re.split(r"[-_.]", name):
    if word in _KINDS:
      return f"{word!r} in a name means {_KINDS[word]}; {_REMEDY}"
  quantised = re.match(_QUANTISED, name)
  if quantised:
    original, marker = quantised.groups()
    return f"quantised weights ({marker}) are not loadable; take {known_names().get(original, original)}"
  return None
