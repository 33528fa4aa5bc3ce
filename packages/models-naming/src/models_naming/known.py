"""The known repositories, and those whose names are nearest to a text."""

import functools

from immutabledict import immutabledict

from models_naming.spelling import normalise, with_points

# `{a,b}` stands for a or b, as in a shell.
_KNOWN = {
  "gemma": ("google/gemma-{2b,7b}{,-it}",),
  "gemma1p1": ("google/gemma-1.1-{2b,7b}-it",),
  "gemma2": ("google/gemma-2-{2b,9b,27b}{,-it}", "google/gemma-2-2b-jpn-it"),
  "gemma3": (
    "google/gemma-3-270m{,-it}",
    "google/gemma-3-{1b,4b,12b,27b}-{pt,it}",
    "google/gemma-3-{270m,1b,4b,12b,27b}-it-qat-q4_0-unquantized",
    "google/gemma-3-{1b,4b,12b,27b}-it-qat-int4-unquantized",
  ),
  "codegemma": ("google/codegemma-{2b,7b,7b-it}",),
  "codegemma1p1": ("google/codegemma-1.1-{2b,7b-it}",),
  "shieldgemma": ("google/shieldgemma-{2b,9b,27b}",),
  "functiongemma": ("google/functiongemma-270m-it",),
  "medgemma": ("google/medgemma-27b-text-it",),
  "llama3": ("meta-llama/Meta-Llama-3-{8B,70B}{,-Instruct}",),
  "llama3p1": ("meta-llama/Llama-3.1-{8B,70B,405B}{,-Instruct}",),
  "llama3p2": ("meta-llama/Llama-3.2-{1B,3B}{,-Instruct}",),
  "llama3p3": ("meta-llama/Llama-3.3-70B-Instruct",),
  "llama_guard2": ("meta-llama/Meta-Llama-Guard-2-8B",),
  "llama_guard3": ("meta-llama/Llama-Guard-3-{1B,8B}",),
  "deepseek_r1_distill_llama": ("deepseek-ai/DeepSeek-R1-Distill-Llama-{8B,70B}",),
  "qwen2p5": (
    "Qwen/Qwen2.5-{0.5B,1.5B,3B,7B,14B,32B,72B}{,-Instruct}",
    "Qwen/Qwen2.5-{7B,14B}-Instruct-1M",
    "Qwen/Qwen2.5-Coder-{0.5B,1.5B,3B,7B,14B,32B}{,-Instruct}",
    "Qwen/Qwen2.5-Math-{1.5B,7B,72B}{,-Instruct}",
  ),
  "qwq": ("Qwen/QwQ-32B",),
  "deepseek_r1_distill_qwen": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-{1.5B,7B,14B,32B}",),
  "qwen3": (
    "Qwen/Qwen3-{0.6B,1.7B,4B,8B,14B}{,-Base}",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B{,-Base}",
    "Qwen/Qwen3-235B-A22B",
    "Qwen/Qwen3-{4B,30B-A3B,235B-A22B}-{Instruct,Thinking}-2507",
    "Qwen/Qwen3-Coder-{30B-A3B,480B-A35B}-Instruct",
  ),
  "deepseek_r1_0528_qwen3": ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",),
}


def _expand(pattern: str) -> list[str]:
  head, brace, rest = pattern.partition("{")
  if not brace:
    return [pattern]
  options, _, tail = rest.partition("}")
  return [head + option + end for option in options.split(",") for end in _expand(tail)]


@functools.cache
def known_model_ids() -> immutabledict[str, tuple[str, ...]]:
  """Standardised family -> ids of its published repositories."""
  return immutabledict(
    {
      family: tuple(i for pattern in patterns for i in _expand(pattern))
      for family, patterns in _KNOWN.items()
    }
  )


@functools.cache
def known_names() -> immutabledict[str, str]:
  """Normalised model name -> known id."""
  return immutabledict(
    {normalise(i.rpartition("/")[2]): i for ids in known_model_ids().values() for i in ids}
  )


def nearest_model_ids(text: str, count: int = 3) -> tuple[str, ...]:
  """The known ids whose spelling is nearest to `text` (an id, a name or a config id); empty if none is near."""
  import difflib  # needed for error messages only

  names = difflib.get_close_matches(normalise(with_points(text.rpartition("/")[2])), known_names(), count)
  return tuple(known_names()[name] for name in names)
