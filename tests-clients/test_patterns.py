"""Patterns of module paths that tunix's examples use, and the table of names in models-core's README."""

import dataclasses
import importlib
import pathlib
import re

import pytest
from flax import nnx

from models_core.adapters import match_modules, unmatched

GEMMA = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj"
OTHERS = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*down_proj|.*up_proj"
# As tunix's examples and tests give them to qwix, one of each kind.
PATTERNS = {
  "quickstart, QLoRA and SFT of Gemma": GEMMA,
  "GRPO and PPO of Gemma": f"{GEMMA}|.*attn_vec_einsum",
  "Gemma's tests": ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*up_proj|.*down_proj",
  "GRPO and PPO of Llama and Qwen": OTHERS,
  "QLoRA of Llama": ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj",
  "LoRA of one projection": ".*gate_proj",
}

# Family, as the README's table begins its name -> (tunix's model and preset, ours).
FAMILIES = {
  "Gemma 2": (("gemma", "Gemma", "gemma2_2b"), ("models_gemma.gemma", "Gemma", "gemma2_2b")),
  "Gemma 1 7B": (("gemma", "Gemma", "gemma_7b"), ("models_gemma.gemma", "Gemma", "gemma_7b")),
  "Gemma 1 2B": (("gemma", "Gemma", "gemma_2b"), ("models_gemma.gemma", "Gemma", "gemma_2b")),
  "Gemma 3": (("gemma3", "Gemma3", "gemma3_1b_it"), ("models_gemma.gemma3", "Gemma3", "gemma3_1b")),
  "Llama 3": (("llama3", "Llama3", "llama3p1_8b"), ("models_llama.llama3", "Llama3", "llama3p1_8b")),
  "Llama 3, tied": (("llama3", "Llama3", "llama3p2_1b"), ("models_llama.llama3", "Llama3", "llama3p2_1b")),
  "Qwen 2": (("qwen2", "Qwen2", "qwen2p5_0p5b"), ("models_qwen.qwen2", "Qwen2", "qwen2p5_0p5b")),
  "Qwen 3": (("qwen3", "Qwen3", "qwen3_0p6b"), ("models_qwen.qwen3", "Qwen3", "qwen3_0p6b")),
  "Qwen 3, experts": (("qwen3", "Qwen3", "qwen3_30b_a3b"), ("models_qwen.qwen3", "Qwen3", "qwen3_30b_a3b")),
}
README = pathlib.Path(__file__).parents[1] / "packages/models-core/README.md"


def structure(module, name, preset):
  """A model of two layers without values."""
  module = importlib.import_module(f"{module}.model")
  config = dataclasses.replace(getattr(module.ModelConfig, preset)(), num_layers=2)
  return nnx.eval_shape(lambda: getattr(module, name)(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
  """The same model of tunix and of ours, and the names of tunix's modules here."""
  (package, *theirs), ours = FAMILIES[request.param]
  return structure(f"tunix.models.{package}", *theirs), structure(*ours), names_of(request.param)


def names_of(family):
  """tunix's name of a module -> ours, for one family, from the README's table."""
  section = README.read_text().partition("| in tunix | families | here |")[2].partition("\n\n")[0]
  rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|$", section, re.MULTILINE)
  assert len(rows) == section.count("\n") - 1
  return {theirs: re.findall(r"`(\w+)`", ours) for theirs, whose, ours in rows if family.startswith(whose)}


def paths(model):
  return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def ours_of(path, names):
  """Our parameters that hold what a parameter of tunix holds, by the README."""
  *steps, leaf = path.split("/")
  if leaf.endswith("_bias"):
    return {"/".join([*steps, f"{leaf[0]}_proj", "b"])}
  if leaf in ("gate_proj", "up_proj", "down_proj"):
    return {"/".join([*steps, "experts", leaf])}
  leaf = leaf if leaf == "input_embedding" else "w"
  return {"/".join([*steps[:-1], name, leaf]) for name in names.get(steps[-1], [steps[-1]])}


def test_the_readme_names_each_parameter_of_tunix(pair):
  theirs, ours, names = pair
  assert set().union(*(ours_of(path, names) for path in paths(theirs))) == paths(ours)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_what_a_pattern_misses_is_found_by_the_suggestions(pair, pattern):
  theirs, ours, names = pair
  found = unmatched(ours, pattern)
  alternatives = pattern.split("|")
  assert set(found) == {one for one in alternatives if not match_modules(ours, one)}
  meant = "|".join(new for one in alternatives for new in found.get(one, (one,)))
  modules = {path.rpartition("/")[0] for path in paths(theirs)}
  wanted = {new for path in modules if re.fullmatch(pattern, path) for new in renamed(path, names)}
  assert wanted <= set(match_modules(ours, meant))
  assert all(found.values())


def renamed(path, names):
  *steps, last = path.split("/")
  return {"/".join([*steps, name]) for name in names.get(last, [last])}
