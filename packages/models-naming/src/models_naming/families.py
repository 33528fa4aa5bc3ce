"""Model families: which prefix of a name means which family and which config category."""

import dataclasses

from immutabledict import immutabledict


@dataclasses.dataclass(frozen=True)
class FamilyInfo:
  """The meaning of a prefix of a model name.

  Attributes:
    family: the standardised family, a Python identifier such as `llama3p1`.
    category: the config category, which is the name of the implementing module, such as `llama3`.
  """

  family: str
  category: str


# The first prefix of a family is the one that its repositories use.
FAMILIES: immutabledict[str, FamilyInfo] = immutabledict(
  {
    "gemma-": FamilyInfo("gemma", "gemma"),
    "gemma-1.1-": FamilyInfo("gemma1p1", "gemma"),
    "gemma1.1-": FamilyInfo("gemma1p1", "gemma"),
    "gemma-2-": FamilyInfo("gemma2", "gemma"),
    "gemma2-": FamilyInfo("gemma2", "gemma"),
    "gemma-3-": FamilyInfo("gemma3", "gemma3"),
    "gemma3-": FamilyInfo("gemma3", "gemma3"),
    "codegemma-": FamilyInfo("codegemma", "gemma"),
    "codegemma-1.1-": FamilyInfo("codegemma1p1", "gemma"),
    "codegemma1.1-": FamilyInfo("codegemma1p1", "gemma"),
    "shieldgemma-": FamilyInfo("shieldgemma", "gemma"),
    "functiongemma-": FamilyInfo("functiongemma", "gemma3"),
    "medgemma-": FamilyInfo("medgemma", "gemma3"),
    "llama-3-": FamilyInfo("llama3", "llama3"),
    "llama3-": FamilyInfo("llama3", "llama3"),
    "llama-3.1-": FamilyInfo("llama3p1", "llama3"),
    "llama3.1-": FamilyInfo("llama3p1", "llama3"),
    "llama-3.2-": FamilyInfo("llama3p2", "llama3"),
    "llama3.2-": FamilyInfo("llama3p2", "llama3"),
    "llama-3.3-": FamilyInfo("llama3p3", "llama3"),
    "llama3.3-": FamilyInfo("llama3p3", "llama3"),
    "llama-guard-2-": FamilyInfo("llama_guard2", "llama3"),
    "llama-guard2-": FamilyInfo("llama_guard2", "llama3"),
    "llama-guard-3-": FamilyInfo("llama_guard3", "llama3"),
    "llama-guard3-": FamilyInfo("llama_guard3", "llama3"),
    "deepseek-r1-distill-llama-": FamilyInfo("deepseek_r1_distill_llama", "llama3"),
    "qwen2.5-": FamilyInfo("qwen2p5", "qwen2"),
    "qwen-2.5-": FamilyInfo("qwen2p5", "qwen2"),
    "qwq-": FamilyInfo("qwq", "qwen2"),
    "deepseek-r1-distill-qwen-": FamilyInfo("deepseek_r1_distill_qwen", "qwen2"),
    "qwen3-": FamilyInfo("qwen3", "qwen3"),
    "qwen-3-": FamilyInfo("qwen3", "qwen3"),
    "deepseek-r1-0528-qwen3-": FamilyInfo("deepseek_r1_0528_qwen3", "qwen3"),
  }
)
