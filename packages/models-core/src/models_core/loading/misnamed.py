"""Names of tensors that are those of an architecture but for a wrapper's prefix, or of another architecture."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from models_core.weights import BASE, WeightTable

# Parts of names that wrappers of PyTorch modules add -> what adds it, and the remedy. Parts that occur together come in
# the order in which they are named.
_WRAPPERS = {
  "_orig_mod": "torch.compile adds: save model._orig_mod instead of model",
  "module": "DataParallel, DDP and DeepSpeed add: save model.module instead of model",
  "_fsdp_wrapped_module": "FSDP adds: save the state dict of the unwrapped model",
  "_checkpoint_wrapped_module": "activation checkpointing adds: save the state dict of the unwrapped model",
  "_forward_module": "Lightning adds: save the state dict of the unwrapped model",
}
# The beginning of names in a model of peft, and parts of names in its adapted modules.
_PEFT = "base_model."
_ADAPTED = frozenset(("base_layer", "lora_A", "lora_B"))
_MERGE = "merge the adapter with merge_and_unload() and save the result"

# A tensor that tells a naming scheme -> whose scheme it is, and the remedy.
_SCHEMES = {
  "tok_embeddings.weight": "Meta's own: load the repository's files for transformers, or convert these",
  "token_embd.weight": "that of GGUF files: load the GGUF file itself",
  "transformer.wte.weight": "that of GPT-2",
  "embedding.word_embeddings.weight": "Megatron's: convert them for transformers",
}
# Fewer tensors than this are listed one by one.
_FEW = 8


def misnamed(names: Collection[str], table: WeightTable) -> str | None:
  """One sentence on why no or few names are those of a table; None if most are, or nothing tells.

  Args:
    names: of all tensors of a checkpoint.
    table: of its naming scheme.
  """
  names = list(names)
  if not names or 2 * table.known(names) > len(names):
    return None
  if adapted := next((name for name in names if _ADAPTED.intersection(name.split("."))), None):
    return f"the tensors are those of a model with an adapter of peft, such as {adapted}: {_MERGE}"
  if parts := [part for part in _WRAPPERS if any(part in name.split(".") for name in names)]:
    bare = [".".join(part for part in name.split(".") if part not in parts) for name in names]
    if _are_known(bare, table):
      example = next(name for name, plain in zip(names, bare, strict=True) if name != plain)
      said = " and ".join(f"{part!r}, which {_WRAPPERS[part]}" for part in parts)
      return f"the names of the tensors, such as {example}, have the part {said}"
  for prefix in _prefixes(names, table):
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if 2 * len(inner) > len(names) and _are_known(inner, table):
      return _too_many(names, prefix)
  if len(names) < _FEW or not table.rows or table.known(names):
    return None
  why = "the checkpoint is of another architecture, or in a naming scheme that is not read"
  why = next((f"their naming scheme is {whose}" for name, whose in _SCHEMES.items() if name in names), why)
  return (
    f"none of the {len(names)} tensors, such as {names[0]}, has a name that the architecture knows: {why}"
  )


def _too_many(names: Sequence[str], prefix: str) -> str:
  own = sum(name.startswith(prefix) for name in names)
  which = f"all {own}" if own == len(names) else f"{own} of the {len(names)}"
  remedy = "save the model inside the wrapper, or remove the prefix from the names in the files"
  if prefix.startswith(_PEFT):
    remedy = f"peft adds it: {_MERGE}"
  return f"the names of {which} tensors begin with {prefix!r}, one prefix too many: {remedy}"


def _are_known(names: Collection[str], table: WeightTable) -> bool:
  return 2 * table.spelled_as(names).known(names) > len(names)


def _prefixes(names: Collection[str], table: WeightTable) -> list[str]:
  """What stands before names of the table that are the same for all layers, such as the embedding's, shortest first."""
  fixed = {form.name for row in table.rows for form in row.forms if "{" not in form.name}
  fixed |= {name.removeprefix(BASE) for name in fixed}
  ends = tuple(f".{name}" for name in fixed)
  cut = {name[: -len(end) + 1] for name in names if name.endswith(ends) for end in ends if name.endswith(end)}
  return sorted(cut, key=len)
