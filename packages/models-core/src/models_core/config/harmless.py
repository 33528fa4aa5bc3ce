"""What becomes of keys of config.json that an architecture does not read.

A key is refused if transformers reads it, its value changes a logit or a mask, and nothing here implements it: for every
model (`UNIMPLEMENTED`), or for another architecture (`other_architectures`). All others are ignored.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

# Why no logit depends on them -> keys.
_WRITTEN = {
  "provenance, and the type of the stored numbers, which their files state": """
    _commit_hash _name_or_path architectures dtype model_type torch_dtype transformers_version use_bfloat16
  """,
  "the tokenizer and generation read token ids": """
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id tokenizer_class
  """,
  "how something is computed and what else a call returns": """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    cache_implementation chunk_size_feed_forward output_attentions output_hidden_states return_dict tf_legacy_loss
    torchscript use_cache
  """,
  "products that are computed in parts have the same sum": "pretraining_tp",
  "tables of positions are as long as needed": "max_position_embeddings",
  "initial values, dropout, and other heads than that of a language model": """
    attention_dropout finetuning_task id2label initializer_range label2id problem_type task_specific_params
  """,
  "of pairs of an encoder and a decoder": "cross_attention_hidden_size is_decoder tie_encoder_decoder",
  "generation, for which newer versions have a file of its own": """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
  """,
}
# Names that other architectures have, too, but that change no logit there either.
_ADDED = {
  "lengths to which inputs were cut, and of tables of positions": """
    context_length max_seq_len model_max_length n_ctx n_positions original_max_position_embeddings seq_length
  """,
  "which kernels compute something, and where": """
    deterministic_flash_attn disable_custom_kernels init_device reference_compile use_mamba_kernels
    use_memory_efficient_attention
  """,
  "of trainers, and of encoders of images and sound": """
    apply_spec_augment architecture dataset learning_rate mode num_labels output_router_logits reduction seed seq_len
    truncation trust_remote_code verbose
  """,
  "without effect unless use_sliding_window is true": "max_window_layers",
  "generation has a file of its own": "guidance_scale max_new_tokens",
}
_ADDED_NAMES = {
  "dropout": r"dropout|drop_(prob|path|rate|connect)|_pdrop$|layer_?drop",
  "initial values": r"(^|_)init(ializer)?(_|$)",
  "losses": r"(^|_)loss(_|$)|_(coef|cost)$",
  "ids that the tokenizer and inputs other than text have": r"(^|_)(token|bos|eos|pad|unk|mask)_(ids?|index)$",
  "heads of other tasks": r"^(classifier|pooler|summary)_",
}


def _keys(table: Mapping[str, str]) -> frozenset[str]:
  return frozenset(key for keys in table.values() for key in keys.split())


# What some version of transformers writes by itself: nobody chose it, so that nobody needs to hear of it.
WRITTEN = _keys(_WRITTEN)
# What trainers, converters and people add: they may have meant something by it, and are told that it is not read.
ADDED = _keys(_ADDED)
ADDED_NAMES = re.compile("|".join(_ADDED_NAMES.values()))

# Keys that transformers reads for every model, and the values with which it computes what is implemented here.
UNIMPLEMENTED: Mapping[str, tuple[object, ...]] = {
  "add_cross_attention": (False,),
  "configuration_files": ([],),  # names of other files to be read in place of config.json
  "is_causal": (True,),
  "is_encoder_decoder": (False,),
  "partial_rotary_factor": (1,),
  "per_layer_config": ({},),
  "pruned_heads": ({}, []),
  "use_bidirectional_attention": (False,),
}


# Other architectures' names of keys that are read here: to repeat a value says nothing new.
_SAME_AS = {
  same: key
  for key, names in {
    "head_dim": "kv_channels",
    "hidden_act": "activation activation_function hidden_activation",
    "hidden_size": "d_model embed_dim n_embd",
    "intermediate_size": "ffn_dim ffn_hidden_size hidden_dim n_inner",
    "num_attention_heads": "n_head n_heads num_heads",
    "num_hidden_layers": "n_layer n_layers num_layers",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "layer_norm_eps layer_norm_epsilon norm_eps",
  }.items()
  for same in names.split()
}
# Values that say what is computed here, but are not the default of an architecture that has the key, or are true.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
  "attention_softmax_in_fp32": (True,),
  "causal": (True,),
  "decoder_sparse_step": (1,),
  "moe_intermediate_size": (0,),
  "no_bias": (True,),
  "parallel_attn": (False,),
  "rotary_pct": (1,),
  "scale_attn_weights": (True,),
  "scale_emb": (1,),
  "shared_expert_intermediate_size": (0,),
}
# Lists with an entry for each layer, and the entry that all layers have here.
_OF_LAYERS: Mapping[str, object] = {
  "layer_types": "full_attention",
  "mlp_layer_types": "dense",
  "no_rope_layers": 1,
}


def transformers_keys() -> dict[str, dict[str, list[Any]]]:
  """For versions of transformers: key -> [an architecture that has it, its neutral values...]."""
  text = importlib.resources.files(__package__).joinpath("transformers_keys.json").read_text("utf-8")
  found: dict[str, dict[str, list[Any]]] = json.loads(text)
  return found


@functools.cache
def other_architectures() -> Mapping[str, tuple[str, tuple[object, ...]]]:
  """Keys that an architecture of transformers reads -> such an architecture, and the values that switch it off."""
  found: dict[str, tuple[str, tuple[object, ...]]] = {}
  for version in transformers_keys().values():
    for key, (architecture, *neutral) in version.items():
      found[key] = (architecture, (*neutral, *found.get(key, ("", ()))[1]))
  return found


def refusal(key: str, raw: Mapping[str, Any]) -> str | None:
  """Why a key of a configuration that was not read cannot be ignored; None if it can."""
  value = raw[key]
  if key in UNIMPLEMENTED:
    return None if value in UNIMPLEMENTED[key] else "read for every model"
  if key in WRITTEN or key in ADDED or ADDED_NAMES.search(key):
    return None
  if key in _OF_LAYERS and isinstance(value, list) and all(one == _OF_LAYERS[key] for one in value):
    return None
  if key in _SAME_AS and value == raw.get(_SAME_AS[key]):
    return None
  architecture, neutral = other_architectures().get(key, ("", (value,)))
  return None if value in neutral or value in _NEUTRAL.get(key, ()) else f"a key of {architecture}"


def is_silent(key: str) -> bool:
  """Whether nobody needs to hear that a key is not read."""
  return key in WRITTEN or key in UNIMPLEMENTED
